"""Do named tokens mean anything? Their emojis against those of the texts, and what happens when a text's emoji changes.

All take readings as `icl.parsed` gives them. Intervals are 95 %: Wilson for shares, bootstrap over texts otherwise.
Nulls: permutation for associations, the exact McNemar test (1947) for paired shares.
"""

from collections import Counter

import numpy as np
import pandas as pd
from scipy.stats import binomtest, rankdata

from lib import answers, big5, emojis, icl, intervals

PAIR = ["model", "trait", "topic"]
INSIDE = ["model", "reader", "n", "own", "own_low", "own_high", "other", "difference", "low", "high", "p"]


def good(readings):
    """Readings that could be parsed."""
    return readings[readings["fault"] == ""]


def held(text):
    """The emojis of a text, folded, each once."""
    return list(dict.fromkeys(icl.fold(e) for e in emojis.find(text)))


def naming(readings):
    """Is an emoji named because it is there? Columns model, reader, trait, texts, emoji, low, high, first, word.

    Of the texts that hold an emoji (`texts`): the share whose reply names one of theirs, with its interval; the share
    that names it before all words; and how many of the words that could be named are (share, mean over texts).
    """
    found = []
    for key, own in good(readings).groupby(icl.CELL, sort=False):
        own = own.assign(held=own["text"].map(held))
        own = own[own["held"].map(len) > 0]
        named = [bool(set(r.tokens) & set(r.held)) for r in own.itertuples()]
        first = [r.tokens[0] in r.held for r in own.itertuples()]
        words = [{u for u in icl.units(r.text) if not emojis.is_emoji(u)} for r in own.itertuples()]
        shares = [len(w & set(t)) / len(w) for w, t in zip(words, own["tokens"], strict=True) if w]
        cells = [np.mean(v) if len(v) else float("nan") for v in (first, shares)]
        found.append((*key, len(own), *intervals.wilson(sum(named), len(own)), *cells))
    return pd.DataFrame(found, columns=[*icl.CELL, "texts", "emoji", "low", "high", "first", "word"]).round(9)


def inside(readings, seed, draws=1000):
    """Are the words named those of this very text? Columns as in INSIDE.

    own: share of a reply's words that its text holds, mean over n replies with its bootstrap interval. other: the same
    for another text written for the same trait, which a stock list would fit as well; mean over permutations of the
    texts within traits. low, high: of the difference, bootstrap over replies; p: one-sided, of a permutation that fits
    as well as the truth.
    """
    found = []
    for key, rows in good(readings).groupby(["model", "reader"], sort=False):
        named = words(rows["tokens"])
        rows = rows[[bool(w) for w in named]]
        named, held_by = [w for w in named if w], [icl.every(text) for text in rows["text"]]
        if not len(rows):
            found.append((*key, 0, *[float("nan")] * 8))
            continue
        rng, places = np.random.default_rng(seed), list(rows.groupby("trait").indices.values())
        own, null = _shares(named, held_by), []
        for _ in range(min(draws, 200)):  # of hundreds of replies each: more would change no digit that is shown
            order = np.arange(len(rows))
            for at in places:
                order[at] = rng.permutation(at)
            null.append(_shares(named, [held_by[i] for i in order]))
        both = [own, own - np.mean(null, axis=0)]
        mean, low, high = intervals.bootstrap(np.column_stack(both), seed, draws)
        p = (1 + sum(n.mean() >= own.mean() for n in null)) / (1 + len(null))
        gain = (np.mean(null), mean[1], low[1], high[1], p)
        found.append((*key, len(rows), mean[0], low[0], high[0], *gain))
    return pd.DataFrame(found, columns=INSIDE)


def _shares(named, texts):
    """Share of each set of words that is in its text: array."""
    return np.array([len(w & t) / len(w) for w, t in zip(named, texts, strict=True)])


def information(holds, groups):
    """Association in bits of each group with each token: array (groups, tokens), as `ratios.association` defines it.

    holds: (texts, tokens), whether a text holds a token. groups: (texts, groups), whether a text is of a group.
    log2((observed + 1/2) / (expected + 1/2)) over texts (the information component of Noren et al. 2013).
    """
    holds, groups = np.asarray(holds, float), np.asarray(groups, float)
    expected = np.outer(groups.sum(0), holds.sum(0)) / max(1, len(holds))
    return np.log2((groups.T @ holds + 0.5) / (expected + 0.5))


def _spearman(one, other):
    one, other = rankdata(one), rankdata(other)
    return float(np.corrcoef(one, other)[0, 1]) if one.std() and other.std() else float("nan")


def _tail(values):
    """The ends of the middle 95 % of values, NaN left out."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, intervals.TAILS)) if len(values) else (float("nan"),) * 2


def association(readings, seed, draws=1000, most=15):
    """Which emoji goes with which trait, in the texts and in what is said of them, for one model and reader.

    In the texts: the trait that a text was written for, and the emojis that it holds. Said: the trait that its reply
    names, and the emojis that it names. Returns (table, agreement). table: trait, emoji, texts, replies (how many),
    pmi_text, pmi_said (bits), for the `most` frequent emojis of the texts. agreement: Spearman's rho over these cells,
    its bootstrap interval over texts, p (two-sided) by permuting the named traits among replies, cells, n (texts).
    """
    own = good(readings)
    inside, said = own["text"].map(held), own["tokens"]
    counts = Counter(e for kinds in inside for e in kinds)
    shown = [e for e, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]
    traits = big5.ordered([*own["trait"], *own["named"]])
    columns = ["trait", "emoji", "texts", "replies", "pmi_text", "pmi_said"]
    agreement = dict.fromkeys(("rho", "low", "high", "p"), float("nan")) | {"cells": 0, "n": len(own)}
    if not shown:
        return pd.DataFrame(columns=columns), agreement
    a, b = (np.array([[e in kinds for e in shown] for kinds in lists], float) for lists in (inside, said))
    g, h = (np.array([[t == x for t in traits] for x in own[c]], float) for c in ("trait", "named"))
    one, other = information(a, g), information(b, h)
    rho, rng = _spearman(one.ravel(), other.ravel()), np.random.default_rng(seed)
    picks = rng.integers(len(own), size=(draws, len(own)))
    drawn = [_spearman(information(a[i], g[i]).ravel(), information(b[i], h[i]).ravel()) for i in picks]
    null = [_spearman(one.ravel(), information(b, rng.permutation(h)).ravel()) for _ in range(draws)]
    beyond = np.sum(np.abs(null) >= abs(rho) - 1e-12)
    p = float("nan") if np.isnan(rho) else (1 + beyond) / (1 + draws)
    agreement |= dict(zip(("rho", "low", "high", "p"), (rho, *_tail(drawn), p), strict=True)) | {"cells": one.size}
    table = pd.MultiIndex.from_product([traits, shown], names=["trait", "emoji"]).to_frame(index=False)
    cells = {"texts": (g.T @ a).astype(int), "replies": (h.T @ b).astype(int), "pmi_text": one, "pmi_said": other}
    return table.assign(**{k: v.ravel() for k, v in cells.items()})[columns], agreement


def paired(readings):
    """One row a text whose readings in all forms were parsed: PAIR, of, holds, and by form named_, tokens_, emoji_.

    Several texts about a topic are told apart by their order. holds: whether the text had an emoji. Greedy replies
    only: one that was drawn might differ by chance.
    """
    copies = answers.numbered(readings, [*PAIR, "form"])
    wide = good(copies[copies["tries"] == 1]).assign(holds=readings["text"].map(lambda t: bool(held(t))))
    wide = wide.pivot(index=[*PAIR, "copy"], columns="form", values=["named", "tokens", "emoji", "of", "holds"])
    wide = wide.reindex(columns=pd.MultiIndex.from_product([wide.columns.levels[0], icl.FORMS])) if len(wide) else wide
    found = {f"{what}_{form}": (what, form) for what in ("named", "tokens", "emoji") for form in icl.FORMS}
    if wide.empty:
        return pd.DataFrame(columns=[*PAIR, *found, "of", "holds"])
    wide = wide[wide["named"].notna().all(axis=1)]
    flat = {name: wide[place] for name, place in found.items()}
    table = pd.DataFrame(flat | {"of": wide["of", "other"], "holds": wide["holds", "written"]})
    return table.droplevel("copy").reset_index()


def contrast(one, other, seed, draws=1000):
    """Two yes-or-no outcomes of the same texts: n, one, other (shares), difference, low, high, p (McNemar, exact).

    p: probability of a split of the disagreeing texts as uneven as this, or more so, if each were a coin toss.
    """
    one, other = np.asarray(one, bool), np.asarray(other, bool)
    if not len(one):
        return {"n": 0} | dict.fromkeys(("one", "other", "difference", "low", "high", "p"), float("nan"))
    difference, low, high = (float(v) for v in intervals.bootstrap(one.astype(float) - other, seed, draws))
    up, down = int((one & ~other).sum()), int((other & ~one).sum())
    p = binomtest(up, up + down).pvalue if up + down else 1.0
    shares = {"n": len(one), "one": one.mean(), "other": other.mean()}
    return shares | {"difference": difference, "low": low, "high": high, "p": p}


def words(lists):
    """The words of token lists, emojis left out: list of sets."""
    return [{t for t in tokens if not emojis.is_emoji(t)} for tokens in lists]


def _moved(rows, form):
    """Whether the words named differ from those named for the text as it was written."""
    return [a != b for a, b in zip(words(rows[f"tokens_{form}"]), words(rows["tokens_written"]), strict=True)]


def _put(rows, form):
    """Whether the emoji that was put there is named."""
    return [icl.fold(e) in tokens for e, tokens in zip(rows[f"emoji_{form}"], rows[f"tokens_{form}"], strict=True)]


EDITS = {  # name: (one, other, on which texts), the outcomes of `paired` rows that are compared
    "trait changes: emoji out, against a word out": (
        lambda r: r["named_none"] != r["named_written"],
        lambda r: r["named_word"] != r["named_written"],
        lambda r: r["holds"].astype(bool),
    ),
    "trait named is the emoji's: other trait's emoji put, against own": (
        lambda r: r["named_other"] == r["of"],
        lambda r: r["named_own"] == r["of"],
        None,
    ),
    "trait named is the text's: own emoji put, against none": (
        lambda r: r["named_own"] == r["trait"],
        lambda r: r["named_none"] == r["trait"],
        None,
    ),
    "emoji put is named: own, against other": (lambda r: _put(r, "own"), lambda r: _put(r, "other"), None),
    "words named change: emoji swapped for another trait's, against own": (
        lambda r: _moved(r, "other"),
        lambda r: _moved(r, "own"),
        lambda r: r["holds"].astype(bool),
    ),
}


def counterfactual(pairs, seed, draws=1000):
    """What an edit of the emoji does: a row a model, reader and comparison of EDITS, columns as in `contrast`.

    pairs: as from `paired`, with a column reader.
    """
    found = []
    for (model, reader), own in pairs.groupby(["model", "reader"], sort=False):
        for name, (one, other, which) in EDITS.items():
            rows = own if which is None else own[which(own)]
            outcome = contrast(one(rows), other(rows), seed, draws)
            found.append({"model": model, "reader": reader, "comparison": name} | outcome)
    return pd.DataFrame(found)
