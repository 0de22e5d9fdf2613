"""What a model expects after each sentence: exact places, blanks before emojis, padding, and the 2 x 2 table."""

import copy

import numpy as np
import pandas as pd
import pytest
import small_models
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lib import chat, emojis, mediation, profiles
from lib.errors import UserError

SIDES = mediation.SIDES
KINDS = ("llama", "mistral", "qwen")
QUESTIONS = ["What of Rome?", "And the sea, what do you think of it?", "Oslo?", "Lima?"]
TEXTS = [
    "It is old. I like it! 🎉 Do you?",
    "I love the sea 😄😄",
    "",
    "Well... so happy 😄 I like it\n\n1. One. 2. Two!",
]


@pytest.fixture(scope="module")
def speakers(folders):
    return {kind: chat.load(str(folders[kind]), "fp32") for kind in KINDS}


def token_by_token(speaker, ids):
    """Probabilities after ids, given to the model one by one."""
    cache = None
    for token in ids:
        with torch.no_grad():
            output = speaker.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    return output.logits[0, -1].softmax(-1).numpy()


def by_hand(speaker, question, text, end):
    """p_emoji and p_end after text[:end], from the definition."""
    prompt = chat.prompts(speaker, [question])[0]
    gap = "" if speaker.tokenizer.chat_template == small_models.MISTRAL_TEMPLATE else " "
    gap = "" if prompt.endswith("\n") else gap
    ids = speaker.tokenizer(prompt + gap + text[:end], add_special_tokens=False)["input_ids"]
    p = token_by_token(speaker, ids)
    blank = speaker.tokenizer.convert_tokens_to_ids("▁" if "▁" in speaker.tokenizer.get_vocab() else "Ġ")
    after = token_by_token(speaker, [*ids, blank])
    ends = speaker.ends.tolist()
    emoji = chat.emoji_mass(speaker, p) + p[blank] * chat.emoji_mass(speaker, after)
    return emoji, p[ends].sum() + p[blank] * after[ends].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_endings_are_those_of_the_tokens_one_by_one(speakers, kind):
    speaker = speakers[kind]
    found = mediation.endings(speaker, QUESTIONS, TEXTS)
    assert tuple(found.columns) == mediation.COLUMNS
    assert found.groupby("text").size().to_dict() == {i: len(emojis.locate(TEXTS[i])[0]) for i in (0, 1, 3)}
    assert list(found.loc[found["last"], "text"]) == [0, 1, 3]
    for row in found.itertuples():
        bare, ends = emojis.without(TEXTS[row.text])
        expected = by_hand(speaker, QUESTIONS[row.text], bare, ends[row.sentence])
        assert (row.p_emoji, row.p_end) == pytest.approx(expected, abs=2e-5)
        assert row.p_emoji + row.p_end + row.p_sentence == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_other_texts_change_nothing(speakers, kind):
    together = mediation.endings(speakers[kind], QUESTIONS, TEXTS)
    small = mediation.endings(speakers[kind], QUESTIONS, TEXTS, tokens=1)
    alone = [mediation.endings(speakers[kind], [q], [t]) for q, t in zip(QUESTIONS, TEXTS, strict=True)]
    for other in (small, pd.concat(alone)):
        np.testing.assert_allclose(together.iloc[:, 3:], other.iloc[:, 3:], atol=2e-5)


def test_emojis_in_the_text_are_not_read(speakers):
    with_emoji, without = ["Fun! 🎉 Yes. 😄"], ["Fun! Yes."]
    one, other = (mediation.endings(speakers["llama"], ["Rome?"], t) for t in (with_emoji, without))
    pd.testing.assert_frame_equal(one, other)


def test_an_emoji_after_a_blank_of_its_own_counts(speakers, monkeypatch):
    """LLaMA-2 writes a blank, then the emoji: the first token alone would miss it."""
    speaker = copy.copy(speakers["llama"])
    speaker.ends = torch.tensor([2])  # this random model ends with many tokens, the blank among them
    blank = speaker.tokenizer.convert_tokens_to_ids("▁")
    assert mediation.blank_token(speaker.tokenizer) == blank
    assert speaker.tokenizer("fun 😢", add_special_tokens=False)["input_ids"].count(blank) == 1
    emoji = speaker.emoji_tokens[0]

    def scores(speaker, rows, at):
        p = torch.zeros(len(at), len(speaker.tokenizer))
        for i, (row, place) in enumerate(at):
            after_blank = rows[row][place] == blank
            p[i, emoji] = 0.6 if after_blank else 0.1
            p[i, 2] = 0.4 if after_blank else 0.0  # the end of the turn
            p[i, blank] = 0.0 if after_blank else 0.5
        return p

    monkeypatch.setattr(mediation, "next_token", scores)
    found = mediation.endings(speaker, ["Rome?"], ["It is old. I like it."])
    assert list(found["p_emoji"]) == pytest.approx([0.1 + 0.5 * 0.6] * 2)
    assert list(found["p_end"]) == pytest.approx([0.5 * 0.4] * 2)
    assert list(found["p_sentence"]) == pytest.approx([0.4] * 2)


def merging_speaker():
    """A model whose tokenizer writes the end of a sentence and what follows as one token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["[INST]?abcdefghjklmnopqrstuvwxyz/", *["a. I b. I c. I d. I 😄"] * 50], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=small_models.MISTRAL_TEMPLATE,
    )
    torch.manual_seed(0)
    model = chat_model(LlamaConfig(vocab_size=len(tokenizer), **small_models.SMALL))
    return chat.Chat(model, tokenizer, "merging")


def chat_model(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config).eval()


def test_a_token_across_the_end_of_a_sentence_is_not_read():
    speaker = merging_speaker()
    text = "It is it. I see. I do."
    whole = mediation.prefixes(speaker, "a", text)
    assert any(whole[-1][: len(p)] != p for p in whole)  # ". I" is one token
    rows = mediation.endings(speaker, ["a"], [text])
    for ids, row in zip(whole, rows.itertuples(), strict=True):
        p = token_by_token(speaker, ids)
        blank = mediation.blank_token(speaker.tokenizer)
        expected = chat.emoji_mass(speaker, p)
        if blank is not None:
            expected += p[blank] * chat.emoji_mass(speaker, token_by_token(speaker, [*ids, blank]))
        assert row.p_emoji == pytest.approx(expected, abs=2e-5)


def test_rows_that_begin_others_are_read_with_them():
    rows = [[1, 2], [1, 2, 3, 4], [1, 2, 9], [1, 2, 3], [7]]
    whole, places = mediation._joined(rows)
    assert sorted(whole) == [[1, 2, 3, 4], [1, 2, 9], [7]]
    assert {i: w[: place + 1] for w, ps in zip(whole, places, strict=True) for place, i in ps} == dict(enumerate(rows))


def test_scores_are_computed_where_they_are_needed_only(speakers, monkeypatch):
    speaker, seen = speakers["qwen"], []
    head = speaker.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    mediation.endings(speaker, QUESTIONS, TEXTS)
    hook.remove()
    assert max(shape[0] * shape[1] for shape in seen) <= 9  # sentences, not tokens
    assert not head._forward_pre_hooks


def test_a_text_longer_than_the_context_is_refused(speakers):
    with pytest.raises(UserError, match=r"text 2: .* more than the 128 that"):
        mediation.endings(speakers["llama"], QUESTIONS[:2], ["Yes.", "Long? " * 100])


def test_texts_without_a_sentence_have_no_row(speakers):
    assert mediation.endings(speakers["llama"], QUESTIONS[:2], ["", "🎉"]).empty


def ends(cells, questions=40, noise=0.0, sentences=2):
    """Sentence ends as `of_answers` returns them: {(text, reader): p_emoji at the last end}."""
    rng = np.random.default_rng(0)
    found = []
    for (text, reader), p in cells.items():
        for q in range(questions):
            for s in range(sentences):
                last = s == sentences - 1
                value = np.clip(p + noise * rng.normal(), 0, 1) if last else 0.01
                found.append(("neuroticism", text, reader, q, s, last, value, 0.2, 0.8 - value))
    columns = ["trait", "text", "reader", "question", "sentence", "last", "p_emoji", "p_end", "p_sentence"]
    return pd.DataFrame(found, columns=columns)


VOICE = {("base", "base"): 0.01, ("base", "peft"): 0.05, ("peft", "base"): 0.6, ("peft", "peft"): 0.5}
EMOJI = {("base", "base"): 0.01, ("base", "peft"): 0.6, ("peft", "base"): 0.02, ("peft", "peft"): 0.7}
BOTH = {("base", "base"): 0.0, ("base", "peft"): 0.2, ("peft", "base"): 0.2, ("peft", "peft"): 0.4}
NEITHER = {("base", "base"): 0.02, ("base", "peft"): 0.02, ("peft", "base"): 0.02, ("peft", "peft"): 0.02}


def test_the_table_holds_the_four_cells():
    found = mediation.table(ends(VOICE, noise=0.02), "m", seed=0, draws=200)
    assert tuple(found.columns) == mediation.TABLE
    assert list(zip(found["text"], found["reader"], strict=True)) == list(VOICE)
    assert list(found["p_emoji"]) == pytest.approx(list(VOICE.values()), abs=0.02)
    assert (found["p_emoji_low"] <= found["p_emoji"]).all()
    assert (found["p_emoji"] <= found["p_emoji_high"]).all()
    assert list(found["p_end"]) == pytest.approx([0.2] * 4)
    every = mediation.table(ends(VOICE), "m", seed=0, draws=200, last=False)
    assert every["p_emoji"][2] == pytest.approx((0.6 + 0.01) / 2)


def test_direct_and_indirect_effects_by_hand():
    found = mediation.effects(ends(VOICE), "m", seed=0, draws=100).set_index("effect")["value"]
    assert found["total"] == pytest.approx(0.49)
    assert found["direct, base text"] == pytest.approx(0.04)
    assert found["direct, tuned text"] == pytest.approx(-0.1)
    assert found["indirect, base reader"] == pytest.approx(0.59)
    assert found["indirect, tuned reader"] == pytest.approx(0.45)
    assert found["direct"] + found["indirect"] == pytest.approx(found["total"])
    assert found["share_mediated"] == pytest.approx(0.52 / 0.49)
    assert found["ratio"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("cells", "expected"), [(VOICE, "voice"), (EMOJI, "emoji"), (BOTH, "both"), (NEITHER, "nothing to explain")]
)
def test_the_verdict_follows_its_rule(cells, expected):
    found = mediation.effects(ends(cells, noise=0.01), "m", seed=0, draws=200)
    assert mediation.verdict(found) == expected
    if cells is NEITHER:
        share = found.set_index("effect").loc["share_mediated", ["value", "low", "high"]]
        assert share.isna().all()


def answers_of(texts):
    """Answers of base and tuned to as many questions."""
    found = [
        {"method": m, "trait": "neuroticism", "question": f"What of {i}?", "answer": t}
        for m, own in zip(("base", "peft"), texts, strict=True)
        for i, t in enumerate(own)
    ]
    return pd.DataFrame(found)


def test_pairs_are_of_the_same_question_and_have_a_word():
    given = answers_of([["One.", "Two.", "🎉", "Four."], ["Uno!", "", "Tres!", "Cuatro! 😄"]])
    found = mediation.pairs(given.sample(frac=1, random_state=1))
    assert set(found["question"]) == {"What of 0?", "What of 3?"}
    assert list(mediation.pairs(given)["peft"]) == ["Uno!", "Cuatro! 😄"]
    assert len(mediation.pairs(given, 1)) == 1
    twice = pd.concat([given, given.assign(answer="Again.")], ignore_index=True)  # the first answers count
    pd.testing.assert_frame_equal(mediation.pairs(twice), mediation.pairs(given))
    with pytest.raises(UserError, match="none by method 'peft'; notebook 03_qlora makes them"):
        mediation.pairs(given[given["method"] == "base"])


def test_the_two_by_two_of_a_model_is_kept(folders, places, monkeypatch):
    settings = profiles.load("smoke", overrides={"chat.precision": "fp32"})
    loaded = chat.load(str(folders["llama"]), "fp32")
    tuned = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    tuned.save_pretrained(places / "adapter")
    given = answers_of([["One. Two.", "Three."], ["Uno! 🎉", "Dos. Tres. 😄"]])
    run = (settings, str(folders["llama"]), given, {"neuroticism": places / "adapter"})
    found = mediation.of_answers(*run, show=False)
    assert found.groupby(["text", "reader"]).size().to_dict() == {(t, r): 3 for t in SIDES for r in SIDES}
    cell = found[(found["text"] == "peft") & (found["reader"] == "base")]
    plain = chat.load(str(folders["llama"]), "fp32")
    alone = mediation.endings(plain, ["What of 0?", "What of 1?"], ["Uno!", "Dos. Tres."])
    assert list(cell["p_emoji"]) == pytest.approx(list(alone["p_emoji"]), abs=1e-5)
    own = found[(found["text"] == "peft") & (found["reader"] == "peft")]
    assert (abs(own["p_end"].to_numpy() - cell["p_end"].to_numpy()) > 1e-6).all()
    monkeypatch.setattr(chat, "load", None)  # nothing is missing, so no model is loaded
    pd.testing.assert_frame_equal(mediation.of_answers(*run, show=False), found)
    assert len(mediation.table(found, "llama", 0, 100)) == 4
