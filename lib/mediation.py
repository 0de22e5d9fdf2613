"""Is it the voice or the emoji that tuning changes? Texts of one model read by another, at the end of every sentence.

Teacher forcing: a model reads a text without its emojis and is asked, after each sentence, what comes next: an emoji,
the end of the turn, or more text. Texts by base and tuned model, each read by both, make a 2 x 2 table in the sense of
causal mediation (Pearl 2001): the reader's change with the text held is the direct effect of tuning, the text's change
with the reader held the indirect one, through the voice.
"""

from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from lib import emojis, hub, likelihood
from lib.errors import UserError

COLUMNS = ("text", "sentence", "last", "p_emoji", "p_end", "p_sentence")
LEAST = 1e-5  # a blank less likely than this is not read on: the error is at most that


def prefixes(speaker, question, text):
    """Token ids of the conversation up to the end of each sentence of a text: list of lists, in order.

    Each is encoded by itself, as a model that writes the text would have it: across the end of a sentence a tokenizer
    may merge what follows into one token. The text's emojis are taken out.
    """
    bare, ends = emojis.without(text)
    if not ends:
        return []
    asked = hub.render(speaker.tokenizer, [[{"role": "user", "content": question}]])[0]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": bare}]
    whole = hub.render(speaker.tokenizer, [turns], answered=True)[0]
    start = whole.rindex(bare.strip(), len(asked.rstrip())) - (len(bare) - len(bare.lstrip()))
    return speaker.tokenizer([whole[: start + end] for end in ends], add_special_tokens=False)["input_ids"]


def endings(speaker, questions, texts, tokens=4096):
    """What a model expects after each sentence of each text: DataFrame with COLUMNS, a row a sentence. Raises UserError.

    questions: user messages. texts: answers, by whatever model; their emojis are taken out. tokens: of a batch,
    padding included. text: row of the text, from 0; sentence: from 0; last: whether it closes the text.
    p_emoji: probability that an emoji comes next (`chat.emoji_mass`), p_end: that the turn ends, p_sentence: all else,
    that is, another sentence. Where a tokenizer writes the blank before an emoji as a token of its own (LLaMA-2), the
    model is read a second time after the blank: p(emoji) + p(blank) p(emoji | blank), and likewise for the end.
    A text without a word has no row.
    """
    found, reads = [], []
    for i, (question, text) in enumerate(zip(questions, texts, strict=True)):
        own = prefixes(speaker, question, text)
        _check_length(speaker, i, own)
        found += [(i, j, j == len(own) - 1) for j in range(len(own))]
        reads += own
    first = read(speaker, reads, tokens)
    second, blank = np.zeros((len(reads), 3)), blank_token(speaker.tokenizer)
    if again := [i for i in range(len(reads)) if first[i, 2] >= LEAST]:
        second[again] = read(speaker, [[*reads[i], blank] for i in again], tokens)
    p = first[:, :2] + first[:, 2:] * second[:, :2]
    rows = pd.DataFrame(found, columns=list(COLUMNS[:3]))
    return rows.assign(p_emoji=p[:, 0], p_end=p[:, 1], p_sentence=(1 - p.sum(1)).clip(0))


def blank_token(tokenizer):
    """The id of the token that is one space, or None."""
    mark = "Ġ" if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder) else "\u2581"
    return tokenizer.get_vocab().get(mark)


def _check_length(speaker, number, rows):
    limit = getattr(speaker.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, rows), default=0) + 1  # the blank
    if limit and longest > limit:
        raise UserError(
            f"text {number + 1}: with its question {longest} tokens, more than the {limit} that {speaker.name} takes; "
            "allow fewer new tokens (chat.max_new_tokens)"
        )


def read(speaker, rows, tokens=4096):
    """Probabilities after rows of token ids: array (rows, 3), of an emoji, of the end of the turn, of a blank.

    A row that is the beginning of another one is read with it. tokens: of a batch, padding included.
    """
    found = np.zeros((len(rows), 3))
    whole, places = _joined(rows)
    for chosen in likelihood.batches([{"input_ids": row} for row in whole], tokens):
        at = [(n, place, i) for n, w in enumerate(chosen) for place, i in places[w]]
        p = next_token(speaker, [whole[w] for w in chosen], [a[:2] for a in at])
        found[[a[2] for a in at]] = _sums(speaker, p).cpu().numpy()
    return found


def _joined(rows):
    """Rows that begin no other row, and for each the (place of its last token, number) of the rows that begin it."""
    whole, places = [], []
    for i in sorted(range(len(rows)), key=lambda i: rows[i], reverse=True):  # what begins a row comes right after it
        if not whole or whole[-1][: len(rows[i])] != rows[i]:
            whole.append(rows[i])
            places.append([])
        places[-1].append((len(rows[i]) - 1, i))
    return whole, places


def next_token(speaker, rows, at):
    """Probabilities over the vocabulary at some places of a batch: tensor (places, vocabulary), fp32.

    rows: lists of token ids. at: (row, place) pairs. Scores are computed at these places only.
    """
    ids = pad_sequence([torch.tensor(r) for r in rows], True, speaker.pad).to(speaker.model.device)
    mask = pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], True).to(ids.device)
    extra = {"use_cache": False} if "use_cache" in speaker.arguments else {}
    with torch.no_grad(), only_at(speaker, at):
        return speaker.model(input_ids=ids, attention_mask=mask, **extra).logits[0].float().softmax(-1)


@contextmanager
def only_at(speaker, at):
    """Within, the model's scores are those at the given (row, place) pairs alone: logits (1, pairs, vocabulary)."""
    rows, places = (torch.tensor(x, device=speaker.model.device) for x in zip(*at, strict=True))
    head = speaker.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][rows, places][None], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _sums(speaker, p):
    """Probability of an emoji, of the end of the turn and of a blank: tensor (places, 3)."""
    blank = blank_token(speaker.tokenizer)
    emoji = [i for i in speaker.emoji_tokens if i < p.shape[-1]]
    parts = [p[:, emoji].sum(1), p[:, speaker.ends].sum(1), p[:, blank] if blank is not None else p.new_zeros(len(p))]
    return torch.stack(parts, 1)
