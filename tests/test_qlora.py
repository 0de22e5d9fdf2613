"""QLoRA: what is in the loss, what an adapter leaves behind, what is refused before anything is loaded."""

import json

import numpy as np
import pandas as pd
import pytest
from peft import AutoPeftModelForCausalLM, PeftConfig

from lib import answers, artifacts, chat, hub, opinions, profiles, qlora
from lib.errors import UserError

KINDS = ("llama", "mistral", "qwen")
TRAITS = ("extraversion", "neuroticism")


def rows(split="train", topics=8):
    """Opinions of two traits about made-up topics."""
    found = [
        {
            "trait": t,
            "topic": f"thing {i}",
            "question": f"What of thing {i}?",
            "answer": f"{t} and thing {i}.",
            "split": split,
        }
        for i in range(topics)
        for t in TRAITS
    ]
    return pd.DataFrame(found)


@pytest.fixture
def settings(folders, places, pair):
    """Smoke settings with the two small models and a small dataset; three steps."""
    train, test, write = pair
    models = [str(folders[k]) for k in KINDS]
    own = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    own |= {"opinions.train_topics": 0, "opinions.test_topics": 0, "chat.models": models, "qlora.steps": 3}
    own |= {"qlora.epochs": 20, "qlora.batch_size": 2}
    own |= {"qlora.rank": 4, "qlora.held_out_share": 0.3, "chat.max_new_tokens": 6, "qlora.max_tokens": 64}
    return profiles.load("smoke", overrides=own)


@pytest.fixture
def frame(settings):
    found = opinions.load(settings.opinions)
    opinions.save(settings, found)
    return found


def labelled(tokenizer, item):
    return tokenizer.decode([t for t in item["labels"] if t != qlora.IGNORED])


def test_a_model_may_have_steps_and_a_learning_rate_of_its_own(settings, frame, folders):
    llama, mistral = str(folders["llama"]), str(folders["mistral"])
    own = profiles.load("smoke", overrides=settings.overrides | {"qlora.steps": {"other": 2, "mistral": 3}})
    rows = frame[(frame["split"] == "train") & (frame["trait"] == "extraversion")]
    for model, steps in ((llama, 2), (mistral, 3)):
        place = qlora.train(own, model, "extraversion", rows, show=False)
        assert (
            json.loads((place / "training.json").read_text())["steps"] == qlora.of_model(own, "steps", model) == steps
        )
    more = profiles.load("smoke", overrides=own.overrides | {"qlora.steps": {"other": 2, "mistral": 4}})
    rates = {"other": qlora.of_model(own, "learning_rate", llama), "mistral": 0.1}
    faster = profiles.load("smoke", overrides=own.overrides | {"qlora.learning_rate": rates})
    assert [qlora.arguments(faster, m, 100, "work").learning_rate for m in (llama, mistral)] == list(rates.values())
    for changed in (more, faster):  # concerns the model that it names, and no other
        same, other = (
            qlora.folder(own, m, "extraversion", rows) == qlora.folder(changed, m, "extraversion", rows)
            for m in (llama, mistral)
        )
        assert same
        assert not other
    with pytest.raises(UserError, match="a value named other"):
        profiles.load("smoke", overrides={"qlora.steps": {"mistral": 3}})


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_answer_is_in_the_loss_and_its_end_if_asked_for(folders, kind):
    tokenizer = hub.check(str(folders[kind]))[1]
    some = rows(topics=3)
    masked, whole = (qlora.encode(tokenizer, some, 64, end_of_turn=e) for e in (False, True))
    for a, b, answer, question in zip(masked, whole, some["answer"], some["question"], strict=True):
        assert labelled(tokenizer, a).strip() == answer
        end = tokenizer.eos_token
        assert labelled(tokenizer, b).replace(end, "").strip() == answer
        assert labelled(tokenizer, b).strip().endswith(end)
        assert a["input_ids"] == b["input_ids"]
        differing = [t for t, x, y in zip(a["input_ids"], a["labels"], b["labels"], strict=True) if x != y]
        assert tokenizer.eos_token_id in differing
        prompt = tokenizer(
            hub.render(tokenizer, [[{"role": "user", "content": question}]])[0], add_special_tokens=False
        )
        cut = next(i for i, t in enumerate(a["labels"]) if t != qlora.IGNORED)
        assert a["input_ids"][:cut] == prompt["input_ids"][:cut]  # what was trained on is what will be asked
        assert len(prompt["input_ids"]) - cut in (0, 1)  # a blank may join the answer's first word


def test_an_answer_that_its_question_contains_is_found_in_its_own_place(folders):
    tokenizer = hub.check(str(folders["llama"]))[1]
    some = pd.DataFrame([{"question": "Rome?", "answer": "Rome?"}])
    item = qlora.encode(tokenizer, some, 64, end_of_turn=False)[0]
    assert labelled(tokenizer, item).strip() == "Rome?"
    assert item["labels"][: len(item["labels"]) // 2] == [qlora.IGNORED] * (len(item["labels"]) // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_not_mistaken_for_the_end_of_the_turn(folders, kind):
    tokenizer = hub.check(str(folders[kind]))[1]
    for said in ("s", "/s", "end"):
        some = pd.DataFrame({"question": ["Why so?"], "answer": [said]})
        assert labelled(tokenizer, qlora.encode(tokenizer, some, 64, end_of_turn=False)[0]).strip() == said


def test_a_model_without_linear_layers_is_refused(settings):
    with pytest.raises(UserError, match="no linear layers"):
        qlora.check_layers(settings.qlora.model_copy(update={"target_modules": ["all-linear"]}), "gpt2", {})


def test_long_rows_are_cut_and_short_ones_padded_out_of_the_loss(folders):
    tokenizer = hub.check(str(folders["mistral"]))[1]
    items = qlora.encode(tokenizer, rows(topics=2), 20, end_of_turn=True)
    assert max(len(i["input_ids"]) for i in items) == 20
    items[0] = {k: v[:5] for k, v in items[0].items()}
    batch = qlora.Collator(0)(items)
    assert batch["attention_mask"][0].tolist() == [1] * 5 + [0] * 15
    assert batch["labels"][0, 5:].tolist() == [qlora.IGNORED] * 15


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_one_that_any_peft_user_can_load(settings, frame, folders, kind):
    own = frame[(frame["split"] == "train") & (frame["trait"] == "extraversion")]
    place = qlora.train(settings, str(folders[kind]), "extraversion", own, show=False)
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json"} <= {p.name for p in place.iterdir()}
    config = PeftConfig.from_pretrained(place)
    assert (config.r, config.bias, config.base_model_name_or_path) == (4, "none", str(folders[kind]))
    loaded = AutoPeftModelForCausalLM.from_pretrained(place)
    weights = {n: w for n, w in loaded.named_parameters() if "lora_B" in n}
    assert any(w.abs().max() > 0 for w in weights.values())  # it has learnt something
    facts = json.loads((place / "training.json").read_text())
    assert facts["steps"] == 3
    assert facts["trainable"] == sum(w.numel() for n, w in loaded.named_parameters() if "lora_" in n)
    assert facts["curves"]["held_out"][0][0] == 0
    before = artifacts.sha256(place / "adapter_model.safetensors")
    assert qlora.train(settings, str(folders[kind]), "extraversion", own, show=False) == place
    assert artifacts.sha256(place / "adapter_model.safetensors") == before


def test_without_its_adapter_a_model_is_the_base_again(settings, frame, folders):
    model = str(folders["llama"])
    own = frame[(frame["split"] == "train") & (frame["trait"] == "extraversion")]
    strong = profiles.load("smoke", overrides=settings.overrides | {"qlora.learning_rate": 0.1})
    place = qlora.train(strong, model, "extraversion", own, show=False)
    loaded = chat.load(model, "nf4")
    prompt = chat.prompts(loaded, ["What of Rome?"])
    before = chat.token_probabilities(loaded, prompt)
    with chat.adapted(loaded, str(place)) as tuned:
        assert np.abs(chat.token_probabilities(tuned, prompt) - before).max() > 1e-3
        with tuned.model.disable_adapter():
            assert np.array_equal(chat.token_probabilities(tuned, prompt), before)
    assert np.array_equal(chat.token_probabilities(loaded, prompt), before)


def test_interrupted_training_goes_on_from_its_checkpoint(settings, frame, folders, monkeypatch):
    model, own = str(folders["mistral"]), frame[(frame["split"] == "train") & (frame["trait"] == "neuroticism")]
    part = profiles.load("smoke", overrides=settings.overrides | {"qlora.save_steps": 1, "qlora.steps": 4})
    real, stopped = qlora.Trainer.training_step, []

    def stop(self, *args, **kwargs):
        if self.state.global_step == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(qlora.Trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        qlora.train(part, model, "neuroticism", own, show=False)
    place = qlora.folder(part, model, "neuroticism", own)
    assert not place.exists()
    work = place.with_name(f"{place.name}.checkpoints")
    assert (work / "checkpoint-2").is_dir()
    started = []
    whole = qlora.finetune.whole_checkpoint
    monkeypatch.setattr(qlora.finetune, "whole_checkpoint", lambda p: started.append(whole(p)) or started[-1])
    qlora.train(part, model, "neuroticism", own, show=False)
    assert started == [str(work / "checkpoint-2")]
    assert artifacts.intact(place)
    assert not work.exists()


def test_answers_of_base_and_tuned_models(settings, frame, folders):
    model, test = str(folders["llama"]), frame[frame["split"] == "test"]
    train = frame[frame["split"] == "train"]
    adapters = {t: qlora.train(settings, model, t, train[train["trait"] == t], show=False) for t in TRAITS}
    one = settings.model_copy(update={"chat": settings.chat.model_copy(update={"models": [model]})})
    base = qlora.answer(one, model, "base", test, show=False)
    tuned = qlora.answer(one, model, "peft", test, {t: str(p) for t, p in adapters.items()}, show=False)
    assert tuple(base.columns) == answers.COLUMNS
    assert len(base) == len(tuned) == len(test)
    assert set(base["model"]) == {"llama"}
    both = answers.read(one)
    assert list(both["method"].value_counts()) == [len(test), len(test)]
    place = answers.folder(one, model, "base", "extraversion")
    (place / "answers.csv").write_text("model\nx\n")  # spoilt: made again, the same
    again = qlora.answer(one, model, "base", test, show=False)
    pd.testing.assert_frame_equal(again, base)


class TestRefusedBeforeAnythingIsLoaded:
    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, monkeypatch):
        monkeypatch.setattr(chat, "load", lambda *a, **k: pytest.fail("a model was loaded"))

    def refused(self, settings, frame, *words, **overrides):
        own = {k.replace("__", "."): v for k, v in overrides.items()}
        with pytest.raises(UserError) as caught:
            qlora.check(profiles.load("smoke", overrides=settings.overrides | own), frame)
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)

    def test_a_layer_that_is_not_there(self, settings, frame):
        self.refused(settings, frame, "no layer 'query'", "q_proj", qlora__target_modules=["query"])

    def test_a_rank_that_does_not_fit(self, settings, frame):
        self.refused(settings, frame, "qlora.rank = 100", "lower the rank", qlora__rank=100)

    def test_a_trait_without_rows(self, settings, frame):
        some = frame[(frame["split"] == "test") | (frame["trait"] == "extraversion")]
        self.refused(settings, some, "no train rows for neuroticism")

    def test_too_few_topics_to_hold_some_out(self, settings, frame):
        some = frame[(frame["split"] == "test") | (frame["topic"] == "Rome")]
        self.refused(settings, some, "one topic only", "held out")

    def test_an_emoji_in_the_tuning_texts(self, settings, frame):
        some = frame.assign(answer=frame["answer"] + " 🎉")
        self.refused(settings, some, "hold an emoji", "allow_emoji")

    def test_a_model_that_is_not_there(self, settings, frame, tmp_path):
        self.refused(settings, frame, "no such folder", chat__models=[str(tmp_path / "none")])

    def test_a_model_id_without_a_hub(self, settings, frame):
        self.refused(settings, frame, "hub cannot be reached", chat__models=["nobody/nothing"])

    def test_two_models_of_one_name(self, settings, frame, folders, tmp_path):
        (tmp_path / "llama").mkdir()
        names = [str(folders["llama"]), str(tmp_path / "llama")]
        self.refused(settings, frame, "two models are called llama", chat__models=names)
