"""Is it the voice or the emoji that tuning changes? Texts of one model read by another, at the end of every sentence.

Teacher forcing: a model reads a text without its emojis and is asked, after each sentence, what comes next: an emoji,
the end of the turn, or more text. Texts by base and tuned model, each read by both, make a 2 x 2 table in the sense of
causal mediation (Pearl 2001): the reader's change with the text held is the direct effect of tuning, the text's change
with the reader held the indirect one, through the voice.
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lib import artifacts, big5, chat, emojis, hub, intervals, likelihood, paths
from lib.errors import UserError

COLUMNS = ("text", "sentence", "last", "p_emoji", "p_end", "p_sentence")
SIDES = ("base", "peft")  # who wrote the text, and who reads it
TABLE = ("model", "trait", "text", "reader", "p_emoji", "p_emoji_low", "p_emoji_high", "p_end", "p_sentence")
EFFECTS = ("model", "trait", "effect", "value", "low", "high")
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
    tail = len(hub.tail(speaker.tokenizer))
    start = whole.rindex(bare.strip(), len(asked.rstrip()), len(whole) - tail) - (len(bare) - len(bare.lstrip()))
    return speaker.tokenizer([whole[: start + end] for end in ends], add_special_tokens=False)["input_ids"]


def endings(speaker, questions, texts, tokens=4096):
    """What a model expects after each sentence of each text: DataFrame with COLUMNS, a row a sentence.

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
    limit = speaker.context
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


def of_answers(settings, model, given, adapters, show=True):
    """The 2 x 2 of one model: every sentence end of its answers, by base and tuned, read by base and by tuned.

    given: the model's answers with a column method (base, peft), the same questions in both. adapters: {trait: folder}.
    An artefact a trait. Columns trait, text, reader (base or peft), question (its number), sentence, last, p_emoji,
    p_end, p_sentence. Raises UserError.
    """
    loaded, parts = [], []
    traits = [t for t in big5.ordered(given["trait"]) if t in adapters]
    for trait in tqdm(traits, desc=hub.label(model), disable=not show, unit="trait"):
        rows = pairs(given[given["trait"] == trait], settings.mediation.topics)
        if rows.empty:
            raise UserError(
                f"answers of {hub.label(model)}, {trait}: to no question have both base and tuned model a word to say; "
                "raise chat.max_new_tokens or qlora.steps"
            )

        def write(tmp, trait=trait, rows=rows):
            loaded[:] = loaded or [chat.load(model, settings.chat.precision)]
            cross(settings, loaded[0], adapters[trait], rows).to_csv(tmp / "endings.csv", index=False)

        place = artifacts.build(folder(settings, model, trait, adapters[trait], rows), write)
        parts.append(pd.read_csv(place / "endings.csv").assign(trait=trait))
    return pd.concat(parts, ignore_index=True)[["trait", "text", "reader", "question", *COLUMNS[1:]]]


def pairs(given, topics=0):
    """Answers of base and tuned to the same questions of one trait: columns question, base, peft; the first `topics`.

    Of a question that was asked more than once the first answer counts. Questions of which one answer has no word are
    left out, since there is no sentence end to read at. Raises UserError.
    """
    once = given[given["method"].isin(SIDES)].drop_duplicates(["question", "method"])
    both = once.pivot(index="question", columns="method", values="answer")
    if missing := [side for side in SIDES if side not in both]:
        raise UserError(f"answers: none by method {missing[0]!r}; notebook 03_qlora makes them, run it first")
    both = both.loc[list(dict.fromkeys(given["question"])), list(SIDES)].dropna()
    spoken = both.map(lambda text: bool(emojis.without(text)[1])).all(axis=1)
    return both[spoken].head(topics or len(both)).reset_index()


def cross(settings, plain, adapter, rows):
    """Every text of `pairs` read by the plain model and with its adapter: columns text, reader, question and more."""
    found, tokens = [], settings.mediation.batch_tokens
    for reader in SIDES:
        with chat.adapted(plain, None if reader == "base" else str(adapter)) as speaker:
            for text in SIDES:
                ends = endings(speaker, rows["question"], rows[text], tokens)
                found.append(ends.rename(columns={"text": "question"}).assign(text=text, reader=reader))
    return pd.concat(found, ignore_index=True)


def folder(settings, model, trait, adapter, rows):
    """Where the sentence ends of a model and trait are kept: texts, weights and code decide about the name."""
    from lib import mediation

    texts = artifacts.fingerprint(rows.to_csv(index=False))
    parts = [texts, Path(adapter).name, hub.identity(model), settings.chat.precision, settings.seed]
    mark = artifacts.fingerprint(*parts, mediation, emojis, chat, hub)
    return paths.RESULTS / settings.profile / f"mediation-{hub.label(model)}-{trait}-{mark}"


def by_question(ends, trait, column="p_emoji", last=True):
    """One number a text: array (questions, 2 texts, 2 readers), base before tuned. last: the last sentence end, or all.

    Over all sentence ends of a text the mean is taken, so that every question counts once.
    """
    own = ends[(ends["trait"] == trait) & (ends["last"] if last else True)]
    cells = own.groupby(["question", "text", "reader"])[column].mean().unstack(["text", "reader"])
    order = [(text, reader) for text in SIDES for reader in SIDES]
    return cells.reindex(columns=pd.MultiIndex.from_tuples(order)).to_numpy().reshape(-1, 2, 2)


def table(ends, model, seed, draws=2000, last=True):
    """The 2 x 2 of every trait: DataFrame with TABLE, intervals by bootstrap over questions. ends: as `of_answers`."""
    found = []
    for trait in big5.ordered(ends["trait"]):
        p = {c: by_question(ends, trait, c, last) for c in COLUMNS[3:]}
        values, low, high = intervals.bootstrap(p["p_emoji"], seed, draws)
        for t, text in enumerate(SIDES):
            for r, reader in enumerate(SIDES):
                emoji = (values[t, r], low[t, r], high[t, r])
                rest = (p["p_end"][:, t, r].mean(), p["p_sentence"][:, t, r].mean())
                found.append((model, trait, text, reader, *emoji, *rest))
    return pd.DataFrame(found, columns=list(TABLE))


def effects(ends, model, seed, draws=2000, last=True):
    """Total, direct and indirect effect of tuning on the probability of an emoji: DataFrame with EFFECTS, a row each.

    total: own text read by tuned minus own text read by base (each reads its own). direct: the reader changes, the
    text is held (at base's or at tuned's); indirect: the text changes, the reader is held. The two of a kind differ
    by what text and reader do together; their mean and that of the other kind add up to the total. share_mediated: mean
    indirect effect over total; `ratio`: p_emoji of tuned over that of base, each on its own text. Bootstrap over
    questions. A share is NaN where the total's interval holds 0: of nothing there is no share.
    """
    found = []
    for trait in big5.ordered(ends["trait"]):
        p = by_question(ends, trait, last=last)
        drawn = _resampled(p, seed, draws)
        values, spread = _decomposed(p.mean(0)), _decomposed(drawn)
        bounds = {k: np.nanpercentile(v, intervals.TAILS) for k, v in spread.items() if np.isfinite(v).any()}
        none = bounds["total"][0] <= 0 <= bounds["total"][1]
        for name, value in values.items():
            low, high = bounds.get(name, (np.nan, np.nan))
            row = (np.nan,) * 3 if name == "share_mediated" and none else (float(value), low, high)
            found.append((model, trait, name, *row))
    return pd.DataFrame(found, columns=list(EFFECTS))


def _resampled(p, seed, draws):
    """Means over questions drawn with replacement: array (draws, 2, 2)."""
    rng = np.random.default_rng(seed)
    return np.stack([p[rng.integers(len(p), size=len(p))].mean(0) for _ in range(draws)])


def _decomposed(p):
    """{effect: array (...)} of cells p (..., text, reader), base before tuned."""
    total = p[..., 1, 1] - p[..., 0, 0]
    direct = p[..., 0, 1] - p[..., 0, 0], p[..., 1, 1] - p[..., 1, 0]
    indirect = p[..., 1, 0] - p[..., 0, 0], p[..., 1, 1] - p[..., 0, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        share, ratio = np.mean(indirect, axis=0) / total, p[..., 1, 1] / p[..., 0, 0]
    return {
        "total": total,
        "direct, base text": direct[0],
        "direct, tuned text": direct[1],
        "indirect, base reader": indirect[0],
        "indirect, tuned reader": indirect[1],
        "direct": np.mean(direct, axis=0),
        "indirect": np.mean(indirect, axis=0),
        "share_mediated": share,
        "ratio": ratio,
    }


def verdict(effects_of_one, least=0.05):
    """What moved the emoji in one model and trait: "voice", "emoji", "both" or "nothing to explain", by a fixed rule.

    effects_of_one: rows of `effects`. least: a rise of p_emoji below this, or one whose interval holds 0, is nothing
    to explain. "voice": more than half of the rise goes through the text, with its interval; "emoji": less than half,
    with its interval; "both": the interval of the share holds one half.
    """
    rows = effects_of_one.set_index("effect")
    total, share = rows.loc["total"], rows.loc["share_mediated"]
    if not (total["value"] >= least and total["low"] > 0):
        return "nothing to explain"
    return "voice" if share["low"] > 0.5 else "emoji" if share["high"] < 0.5 else "both"
