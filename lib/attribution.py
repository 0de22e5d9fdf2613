"""Which tokens of a text move a chat model's own naming of its trait: occlusion, and gradient x input.

The quantity is the log-odds of the trait word as the start of the reply, log p - log(1 - p), in nats: unlike p itself
it still moves where the model is nearly certain. Occlusion: what it loses when every occurrence of a token is taken out
of the text (Li, Monroe & Jurafsky 2016). Gradient x input: the gradient at a token's embedding times the embedding,
summed over dimensions and occurrences (Shrikumar et al. 2016), a linear guess at the same from one backward pass.
"""

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from lib import answers, artifacts, big5, chat, emojis, hub, icl, intervals, likelihood, paths, qlora

COLUMNS = ("topic", "copy", "token", "is_emoji", "occlusion", "gradient")
TEXT = ["trait", "topic", "copy"]  # by which a model's texts are told apart


def log_odds(speaker, items, at=None):
    """Log-odds of the labelled tokens of each item, read as one word: tensor (items,), float64.

    items: as from `likelihood.encode`, one batch. at: embeddings that take the place of the ids, for gradients.
    """
    scores, ids, counts = likelihood.scored(speaker, items, at)
    logp = scores.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    whole = torch.stack([own.sum() for own in logp.split(counts)])
    whole = whole.clamp(max=-1e-15)  # p = 1 to the last bit would have infinite odds
    return whole - torch.log(-torch.expm1(whole))


def words_log_odds(speaker, questions, words, tokens=4096, show=False):
    """Log-odds of each word as the start of the reply to its question: array (questions,), nats. tokens: of a batch."""
    items = likelihood.encode(speaker, questions, words)
    found = np.full(len(items), np.nan)
    with torch.no_grad():
        for chosen in tqdm(likelihood.batches(items, tokens), disable=not show, unit="batch"):
            found[chosen] = log_odds(speaker, [items[i] for i in chosen]).cpu().numpy()
    return found


def occlusion(speaker, ask, texts, words, tokens=4096, show=False):
    """What the log-odds of each text's word lose by a token: list of arrays, one number for each of `icl.units(text)`.

    ask: list of texts -> user messages. words: the trait word of every text.
    """
    every = [icl.units(text) for text in texts]
    variants = [v for text, own in zip(texts, every, strict=True) for v in (text, *(icl.drop(text, {u}) for u in own))]
    repeated = [word for word, own in zip(words, every, strict=True) for _ in range(1 + len(own))]
    scores = words_log_odds(speaker, ask(variants), repeated, tokens, show)
    parts = np.split(scores, np.cumsum([1 + len(own) for own in every])[:-1])
    return [part[0] - part[1:] for part in parts]


def gradient(speaker, ask, texts, words, tokens=512):
    """Gradient x input of each of `icl.units(text)`: list of arrays, in the order of the texts."""
    asked = ask(list(texts))
    items = likelihood.encode(speaker, asked, words)
    places = [_places(speaker, q, text) for q, text in zip(asked, texts, strict=True)]
    table, found = speaker.model.get_input_embeddings(), [None] * len(items)
    for chosen in likelihood.batches(items, tokens):
        part = [items[i] for i in chosen]
        ids = qlora.Collator(speaker.pad)(part)["input_ids"].to(speaker.model.device)
        at = table(ids).detach().requires_grad_()
        slope = torch.autograd.grad(log_odds(speaker, part, at).sum(), at)[0]
        each = (slope.float() * at.detach().float()).sum(-1).cpu().numpy()
        for row, i in zip(each, chosen, strict=True):
            found[i] = np.array([row[positions].sum() for positions in places[i]])
    return found


def _places(speaker, question, text):
    """For each of `icl.units(text)`, the positions of its tokens in the prompt: list of lists."""
    prompt = chat.prompts(speaker, [question])[0]
    start = prompt.index(text, prompt.index(question.strip()) + question.strip().index(text))
    coded = speaker.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = {unit: [] for unit in icl.units(text)}
    for token, (low, high) in emojis.spans(text):
        if (unit := icl.fold(token)) in found:
            found[unit] += [i for i, (a, b) in enumerate(coded) if a < start + high and b > start + low]
    return list(found.values())


def numbered(readings):
    """With a column copy: 0, or 1, 2 ... where a model has several texts of a trait on one topic."""
    return answers.numbered(readings, ["model", "trait", "topic"])


def of_readings(settings, model, reader, chosen, rows, loaded=None, show=True):
    """Both attributions of every nameable token of texts: DataFrame with trait and COLUMNS, an artefact a trait.

    chosen: parsed readings of one model and reader, a row a text; the word attributed is the trait that was named.
    """
    loaded, parts = [] if loaded is None else loaded, []
    train = rows[rows["split"] == "train"]
    for trait in tqdm(big5.ordered(chosen["trait"]), desc=f"{hub.label(model)}", disable=not show, unit="trait"):
        own = chosen[chosen["trait"] == trait]
        place = icl.adapter(settings, model, trait, train) if reader == "peft" else None

        def write(tmp, own=own, place=place):
            loaded[:] = loaded or [chat.load(model, settings.chat.precision)]
            with chat.adapted(loaded[0], place) as speaker:
                artifacts.write_csv(explain(settings, speaker, model, own), tmp / "attribution.csv")

        made = artifacts.build(folder(settings, model, reader, trait, own, place), write)
        kinds = {"topic": str, "token": str}
        table = pd.read_csv(made / "attribution.csv", keep_default_na=False, dtype=kinds)
        parts.append(table.assign(trait=trait))
    columns = ["trait", *COLUMNS]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def explain(settings, speaker, model, chosen):
    """Attributions of the tokens of a few readings by a loaded model: DataFrame with COLUMNS."""
    texts, words = list(chosen["text"]), list(chosen["named"])

    def ask(given):
        return icl.questions(settings, model, given)

    lost = occlusion(speaker, ask, texts, words, settings.icl.batch_tokens)
    slope = gradient(speaker, ask, texts, words, max(64, settings.icl.batch_tokens // 8))
    found = [
        (topic, copy, unit, emojis.is_emoji(unit), a, b)
        for topic, copy, text, one, two in zip(chosen["topic"], chosen["copy"], texts, lost, slope, strict=True)
        for unit, a, b in zip(icl.units(text), one, two, strict=True)
    ]
    return pd.DataFrame(found, columns=list(COLUMNS))


def folder(settings, model, reader, trait, chosen, place):
    """Where the attributions of a trait's texts are kept; model, adapter, question, texts and code decide the name."""
    from pathlib import Path

    code = [artifacts.code(m) for m in ("chat", "hub", "qlora", "likelihood", "icl", "emojis", "attribution")]
    shaped = [settings.chat.precision, settings.icl.batch_tokens, icl.wording(settings, model)]
    who = [hub.identity(model), place and Path(place).name]
    mark = artifacts.fingerprint(shaped, code, who, chosen[["topic", "copy", "text", "named"]].to_csv(index=False))
    return paths.RESULTS / settings.profile / f"attribution-{hub.label(model)}-{reader}-{trait}-{mark}"


def auc(scores, chosen):
    """Probability that a chosen item scores higher than another one, ties counting half; NaN without both kinds."""
    scores, chosen = np.asarray(scores, float), np.asarray(chosen, bool)
    above = scores[chosen][:, None] - scores[~chosen][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean()) if above.size else float("nan")


def agreement(texts, seed, draws=1000):
    """Are chosen tokens the ones that score high? Mean AUC over texts: n, auc, low, high (bootstrap), p (permutation).

    texts: list of (scores, chosen), a pair of arrays a text; texts without both kinds are left out. p, two-sided:
    the choices permuted within every text.
    """
    pairs = [(np.asarray(s, float), np.asarray(c, bool)) for s, c in texts]
    pairs = [(s, c) for s, c in pairs if 0 < c.sum() < len(c)]
    if not pairs:
        return {"n": 0} | dict.fromkeys(("auc", "low", "high", "p"), float("nan"))
    values = [auc(s, c) for s, c in pairs]
    mean, low, high = (float(v) for v in intervals.bootstrap(values, seed, draws))
    rng, null = np.random.default_rng(seed), np.zeros(draws)
    for scores, chosen in pairs:
        k, others = chosen.sum(), (~chosen).sum()
        ranks = (scores[:, None] > scores).sum(1) + ((scores[:, None] == scores).sum(1) - 1) / 2  # from 0
        picked = rng.random((draws, len(scores))).argsort(1)[:, :k]
        null += (ranks[picked].sum(1) - k * (k - 1) / 2) / (k * others) / len(pairs)
    p = (1 + np.sum(np.abs(null - 0.5) >= abs(mean - 0.5) - 1e-12)) / (1 + draws)
    return {"n": len(pairs), "auc": mean, "low": low, "high": high, "p": float(p)}


def marked(table, readings):
    """Attributions with a column named: whether the token is among those that the reply of its text names.

    readings: those attributed, as `numbered` has them.
    """
    keys = ["model", *TEXT]
    said = dict(zip(map(tuple, readings[keys].to_numpy()), readings["tokens"], strict=True))
    rows = zip(map(tuple, table[keys].to_numpy()), table["token"], strict=True)
    return table.assign(named=[token in said.get(key, ()) for key, token in rows])


def agreements(table, seed, draws=1000):
    """`agreement` of what is named with both attributions: columns model, method, tokens, n, auc, low, high, p.

    table: as from `marked`. tokens: "all", or "words" without the emojis.
    """
    found = []
    for model, of_model in table.groupby("model", sort=False):
        for method in ("occlusion", "gradient"):
            for kind, own in (("all", of_model), ("words", of_model[~of_model["is_emoji"].astype(bool)])):
                texts = [(g[method], g["named"]) for _, g in own.groupby(TEXT, sort=False)]
                row = {"model": model, "method": method, "tokens": kind}
                found.append(row | agreement(texts, seed, draws))
    return pd.DataFrame(found, columns=["model", "method", "tokens", "n", "auc", "low", "high", "p"])


def effects(table, seed, draws=1000):
    """What an emoji does beside the words of its text: columns model, texts, emoji, low, high, word, top, chance.

    Over the texts with an emoji: mean of the emojis' occlusion with its interval, mean of the words' (nats); the share
    of texts in which an emoji counts most of all tokens, and what that would be for a token drawn at random.
    """
    found = []
    for model, of_model in table.groupby("model", sort=False):
        texts = [g for _, g in of_model.groupby(TEXT, sort=False) if 0 < g["is_emoji"].sum() < len(g)]
        split = [(g["occlusion"][g["is_emoji"]].mean(), g["occlusion"][~g["is_emoji"]].mean()) for g in texts]
        top = [bool(g["is_emoji"].loc[g["occlusion"].idxmax()]) for g in texts]
        if not texts:
            found.append((model, 0, *[float("nan")] * 6))
            continue
        mean, low, high = intervals.bootstrap(split, seed, draws)
        chance = np.mean([g["is_emoji"].mean() for g in texts])
        found.append((model, len(texts), mean[0], low[0], high[0], mean[1], np.mean(top), chance))
    return pd.DataFrame(found, columns=["model", "texts", "emoji", "low", "high", "word", "top", "chance"])
