"""What a model expects after each sentence: exact places, blanks before emojis, padding, and the 2 x 2 table."""

import numpy as np
import pandas as pd
import pytest
import small_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lib import chat, emojis, mediation
from lib.errors import UserError

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
    speaker = speakers["llama"]
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
