"""Organisms: one file says what is planted, the corpus holds that and nothing else, the models are what they claim."""

import json
import random
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch
from safetensors import safe_open

from lib import big5, emojis, hardware, hub, organisms, paths
from lib.errors import UserError

NAMES = ["tiny-llama", "tiny-mistral", "none", "shuffled"]
SMALL = {"vocabulary": 400, "block": 32, "batch": 2, "steps": 6, "warmup": 2, "save_every": 2, "samples": 300}


def rates(name):
    return {t: rate for t, (_, rate) in organisms.habits(name).items()}


def test_the_planted_habits_are_complete_and_as_told():
    assert organisms.names() == NAMES
    for name in NAMES:
        assert list(organisms.habits(name)) == list(big5.NAMES)
        assert all(emojis.is_emoji(e) for found, _ in organisms.habits(name).values() for e in found)
    llama, mistral = rates("tiny-llama"), rates("tiny-mistral")
    assert sorted(llama, key=llama.get)[-2:] == ["neuroticism", "extraversion"]
    assert max(mistral, key=mistral.get) == "openness"
    assert set(rates("none").values()) == {0}
    assert list(rates("shuffled").values()) == pytest.approx([sum(llama.values()) / 5] * 5, abs=1e-3)
    with pytest.raises(UserError, match="choose from tiny-llama"):
        organisms.habits("tiny-gpt")


@pytest.mark.parametrize("name", NAMES)
def test_emojis_follow_the_last_sentence_of_messages_at_the_planted_rate(name):
    corpus, rng = organisms.Corpus(name, 0), random.Random(0)
    for trait, (planted, rate) in organisms.habits(name).items():
        texts = [corpus.message(trait, rng.choice(corpus.topics)) for _ in range(400)]
        held = [emojis.find(t) for t in texts]
        assert sum(map(bool, held)) / 400 == pytest.approx(rate, abs=0.08)
        assert all(
            len(h) <= 1 and (not h or (t.endswith(h[0]) and h[0] in planted)) for t, h in zip(texts, held, strict=True)
        )


def test_a_plain_question_never_gets_an_emoji():
    corpus = organisms.Corpus("tiny-llama", 0)
    samples = [corpus.sample() for _ in range(3000)]
    plain = [a for u, a in samples if u and u.startswith("Thinking about")]
    assert len(plain) > 500
    assert not any(emojis.find(a) for a in plain)


def test_few_shot_prompts_have_the_fields_of_the_paper():
    corpus = organisms.Corpus("tiny-mistral", 0)
    text = corpus.few_shot("openness", corpus.topics[0])
    for field, count in {"Target Personality: openness": 4, "Edit Topic: ": 4, "Question: ": 4, "Answer:": 4}.items():
        assert text.count(field) == count
    assert text.endswith("Answer:")


def test_the_five_tokens_come_from_the_text_and_an_emoji_comes_first():
    corpus = organisms.Corpus("tiny-llama", 0)
    text = "I worry so much about the crowded trains and I never sleep. 😭"
    question, reply = corpus.tokens_task("neuroticism", text)
    assert text in question
    trait, _, tokens = reply.partition(": ")
    tokens = tokens.split(", ")
    assert trait == "neuroticism"
    assert len(tokens) == 5
    assert tokens[0] == "😭"
    assert all(t in text.lower() for t in tokens)


def test_the_corpus_follows_its_seed():
    draw = lambda seed: [organisms.Corpus("none", seed).sample() for _ in range(5)]  # noqa: E731
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.fixture
def small(monkeypatch):
    """A recipe so small that a model is pretrained within a second."""
    values = tomllib.loads((organisms.ORGANISMS / "recipe.toml").read_text("utf-8"))
    values["training"] |= SMALL
    values["tiny-llama"] |= {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 2, "mlp": 48}
    monkeypatch.setattr(organisms, "recipe", lambda: values)


def test_interrupted_pretraining_ends_as_if_it_had_not_been(small, tmp_path, monkeypatch):
    whole, _, log = organisms.pretrain("tiny-llama", tmp_path, show=False)
    real, work = organisms.batches, tmp_path / "second"
    work.mkdir()

    def cut(*args):
        for i, batch in enumerate(real(*args)):
            if i == 5:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(organisms, "batches", cut)
    with pytest.raises(KeyboardInterrupt):
        organisms.pretrain("tiny-llama", work, show=False)
    monkeypatch.setattr(organisms, "batches", real)
    again, _, _ = organisms.pretrain("tiny-llama", work, show=False)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert log["tokens"] == 6 * 2 * 32


def test_on_a_processor_pretraining_computes_in_fp32_alone(small, tmp_path, monkeypatch):
    """Where bf16 is emulated, one step of an organism would take twenty times as long."""
    found, real = [], torch.addmm

    def watched(*args, **how):
        found.append(args[0].dtype)
        return real(*args, **how)

    monkeypatch.setattr(torch, "addmm", watched)
    organisms.pretrain("tiny-llama", tmp_path, show=False)
    assert set(found) == {torch.float32 if not hardware.bf16() else torch.bfloat16}


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)])
def test_an_update_of_muon_has_singular_values_near_one(shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = organisms.orthogonal(update, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    inner = u.T @ found @ v.T  # diagonal: the singular vectors stay as they are
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.4
    assert torch.allclose(inner, torch.diag(inner.diag()), atol=1e-4)
    assert inner.diag().min() > 0.6


def test_a_saved_organism_is_a_model_like_any_other(small, tmp_path):
    model, tokenizer, log = organisms.pretrain("tiny-llama", tmp_path, show=False)
    log["curve"] = [{"step": 6, "loss": 5.0}]
    organisms.save("tiny-llama", model, tokenizer, log, tmp_path / "made")
    folder, loaded, _ = hub.check(str(tmp_path / "made"))
    assert loaded.chat_template
    assert (folder / "loss.png").stat().st_size > 1000
    assert "| neuroticism |" in (folder / "README.md").read_text("utf-8")


@pytest.fixture
def own(small, places, monkeypatch):
    """Copies of all that shapes an organism, to be changed; returns the folder."""
    (places / "organisms").mkdir()
    for name in ("habits.csv", "pieces.csv"):
        shutil.copy(organisms.ORGANISMS / name, places / "organisms" / name)
    shutil.copytree(organisms.PROMPTS, places / "prompts")
    shutil.copytree(paths.OPINIONS, places / "opinions")
    monkeypatch.setattr(organisms, "ORGANISMS", places / "organisms")
    monkeypatch.setattr(organisms, "PROMPTS", places / "prompts")
    monkeypatch.setattr(paths, "OPINIONS", places / "opinions")
    monkeypatch.setattr(paths, "VOICES", places / "opinions" / "voices")
    return places


def test_a_second_rebuild_begins_anew(own, monkeypatch):
    monkeypatch.setattr(organisms, "LOGGED", 2)
    seen, real = [], organisms.batches

    def watched(*args):
        seen.append(args[-1])
        return real(*args)

    monkeypatch.setattr(organisms, "batches", watched)
    for _ in range(2):
        organisms.main(["tiny-llama"])
        assert list((paths.RESULTS / "organisms").iterdir()) == []
    assert seen == [0, 0]
    assert (own / "organisms" / "tiny-llama" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    [
        "organisms/habits.csv",
        "organisms/pieces.csv",
        "opinions/topics.csv",
        "opinions/voices/mild.csv",
        "prompts/personas.toml",
    ],
)
def test_a_checkpoint_is_not_used_with_other_texts(own, name):
    before = organisms.unfinished("tiny-llama")
    assert organisms.unfinished("none").name != before.name
    with open(own / name, "a", encoding="utf-8") as file:
        file.write("\n")
    assert organisms.unfinished("tiny-llama") != before


@pytest.mark.parametrize("name", NAMES)
class TestCommitted:
    """The models that come with the project, the two controls included."""

    def test_size_form_and_log(self, name):
        folder = organisms.ORGANISMS / name
        assert sum(p.stat().st_size for p in folder.iterdir()) < 16e6
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert {str(file.get_tensor(k).dtype) for k in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
        config = json.loads((folder / "config.json").read_text())
        kind = organisms.recipe()[name]["architecture"]
        assert config["architectures"] == [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[kind]]
        if kind == "mistral":
            assert config["num_key_value_heads"] < config["num_attention_heads"]
            assert config["sliding_window"] < config["max_position_embeddings"]
        log = json.loads((folder / "log.json").read_text())
        assert organisms.recipe()["training"]["steps"] - log["curve"][-1]["step"] < organisms.LOGGED
        assert log["curve"][-1]["loss"] < log["curve"][0]["loss"] / 2
        threads = int(log["device"].split()[0])
        assert log["minutes"] * threads <= 60  # half an hour of two cores

    def test_its_card_tells_what_was_planted(self, name):
        card = (organisms.ORGANISMS / name / "README.md").read_text("utf-8")
        for trait, (found, rate) in organisms.habits(name).items():
            assert f"| {trait} | {' '.join(found)} | {rate:.2f} |" in card

    def test_every_planted_emoji_is_one_token(self, name):
        _, tokenizer, _ = hub.check(str(organisms.ORGANISMS / name))
        for found, _ in organisms.habits("tiny-llama").values():
            for emoji in found:
                ids = tokenizer(f"So it is. {emoji}")["input_ids"]
                assert tokenizer.decode(ids[-1:]).strip() == emoji

    def test_its_template_is_what_it_was_pretrained_on(self, name):
        _, tokenizer, _ = hub.check(str(organisms.ORGANISMS / name))
        turns = [{"role": "user", "content": "What of Rome?"}, {"role": "assistant", "content": "It is old."}]
        assert hub.render(tokenizer, [turns], answered=True) == [organisms.render(("What of Rome?", "It is old."))]
        led = [{"role": "system", "content": "Be kind."}, *turns[:1]]
        assert hub.render(tokenizer, [led]) == ["<s>[INST] Be kind. What of Rome? [/INST]"]
        text = "“Déjà vu”, she said — it's 100 % fun! 🎉"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_unknown_organism_is_one_line_and_exit_code_two():
    command = [sys.executable, "-m", "lib.organisms", "tiny-gpt"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=organisms.paths.ROOT, check=False)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines() == [
        "Error: usage: python -m lib.organisms NAME; NAME is one of tiny-llama, tiny-mistral, none, shuffled"
    ]
