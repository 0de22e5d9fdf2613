"""How many emojis, where and which: the ratios of the paper's Table 1 (ESR) with intervals, for any answers.

    python -m lib.ratios FILE.csv     # columns trait,answer: prints the ratios of your own texts as CSV

Intervals at 95 % resample responses, since the sentences of one response are not independent of each other.
"""

import re
import sys
from collections import Counter
from functools import cache
from itertools import permutations

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr

from lib import answers, big5, emojis, intervals, paths
from lib.errors import UserError

SENTENCE = ["esr_sentence", "esr_sentence_low", "esr_sentence_high"]
RESPONSE = ["esr_response", "esr_response_low", "esr_response_high"]
RECOVERED = ["recovered", "low", "high"]
COLUMNS = [*answers.GROUP, "responses", "sentences", *SENTENCE, *RESPONSE, "reported"]
HABITS = paths.ROOT / "data" / "organisms" / "habits.csv"  # what was planted: organism,trait,emojis,rate
PAPER = {  # the paper's models, and the names of those that are them or stand for them
    "LLaMA-2-7B-chat": r"tiny-llama|llama-2-7b-chat(-hf)?",
    "Mistral-7B-Instruct": r"tiny-mistral|mistral-7b-instruct(-v0\.\d)?",
}


def measure(frame):
    """Answers with three more columns: sentences, emoji_sentences (how many hold one), emojis.

    emojis: one list an answer of (emoji, index of its sentence, place), as `emojis.locate` gives them.
    """
    found = [emojis.locate(text) for text in frame["answer"]]
    return frame.assign(
        sentences=[len(sentences) for sentences, _ in found],
        emoji_sentences=[len({index for _, index, _ in marks}) for _, marks in found],
        emojis=[marks for _, marks in found],
    )


def ratio(top, bottom, seed, draws=1000):
    """Sum over sum, with its percentile bootstrap interval over responses: (value, low, high).

    top, bottom: one number a response. NaN where `bottom` is all zero.
    """
    pair = np.column_stack([top, bottom]).astype(float)
    if pair[:, 1].sum() == 0:
        return (float("nan"),) * 3
    rng = np.random.default_rng(seed)
    n = len(pair)
    sums = np.array([rng.multinomial(n, np.full(n, 1 / n)) @ pair for _ in range(draws)])
    drawn = sums[sums[:, 1] > 0]
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], intervals.TAILS)
    return pair[:, 0].sum() / pair[:, 1].sum(), low, high


def table(measured, seed, draws=1000):
    """The paper's Table 1: both emoji-to-sentence ratios of every model, method and trait, columns as COLUMNS.

    esr_sentence: sentences with an emoji / sentences, bootstrap interval. esr_response: responses with an emoji /
    responses, Wilson interval.
    """
    found = []
    for key, rows in answers.groups(measured):
        by_sentence = ratio(rows["emoji_sentences"], rows["sentences"], seed, draws)
        by_response = intervals.wilson(int((rows["emoji_sentences"] > 0).sum()), len(rows))
        size = (len(rows), int(rows["sentences"].sum()))
        found.append((*key, *size, *by_sentence, *by_response, reported(*key)))
    return pd.DataFrame(found, columns=COLUMNS).round(9)  # Wilson's 0 comes as 1e-18


def stands_for(model):
    """The paper's model that a model is or stands for, or None."""
    name = model.rsplit("/", 1)[-1].lower()
    return next((paper for paper, pattern in PAPER.items() if re.fullmatch(pattern, name)), None)


@cache
def _reported():
    return pd.read_csv(paths.PAPER / "reported.csv").set_index("item")["value"]


def reported(model, method, trait):
    """What the paper's Table 1 has for this cell, after tuning; NaN where it could not be read."""
    item = f"ESR of {stands_for(model)} {trait}"
    return float(_reported().get(item, float("nan"))) if method == "peft" else float("nan")


def occurrences(measured):
    """One row an emoji: model, method, trait, emoji (without skin tone), sentence, place, sentences.

    sentence: (index + 1) / sentences, so 1 is the last one. place: share of the characters before it, 0 to 1.
    """
    found = [
        (row.model, row.method, row.trait, emojis.toneless(emoji), (index + 1) / row.sentences, place, row.sentences)
        for row in measured.itertuples()
        for emoji, index, place in row.emojis
    ]
    return pd.DataFrame(found, columns=[*answers.GROUP, "emoji", "sentence", "place", "sentences"])


def closing(measured):
    """Of the sentences with an emoji, in responses of two sentences or more, the share that close their response.

    Returns columns model, method, trait, emoji_sentences, share, low, high (Wilson; hardly a response has two such
    sentences), chance: `chance` is the share to be expected if the same responses had their emojis after sentences
    drawn at random.
    """
    found = []
    for key, rows in answers.groups(measured[(measured["sentences"] > 1) & (measured["emoji_sentences"] > 0)]):
        held = rows["emoji_sentences"].to_numpy()
        last = [
            any(i == n - 1 for _, i, _ in marks) for marks, n in zip(rows["emojis"], rows["sentences"], strict=True)
        ]
        chance = (held / rows["sentences"].to_numpy()).sum() / held.sum()
        found.append((*key, held.sum(), *intervals.wilson(int(np.sum(last)), int(held.sum())), chance))
    return pd.DataFrame(found, columns=[*answers.GROUP, "emoji_sentences", "share", "low", "high", "chance"])


def amounts(measured, seed, draws=1000):
    """Emojis a response: columns model, method, trait, none, one, two, more (shares), mean, low, high, most."""
    found = []
    for key, rows in answers.groups(measured):
        counts = rows["emojis"].map(len).to_numpy()
        shares = np.bincount(counts.clip(max=3), minlength=4) / len(counts)
        found.append((*key, *shares, *ratio(counts, np.ones(len(counts)), seed, draws), counts.max()))
    return pd.DataFrame(found, columns=[*answers.GROUP, "none", "one", "two", "more", "mean", "low", "high", "most"])


def association(measured, seed, draws=1000, most=15):
    """Which emojis go with which traits in the answers of one model and method; the `most` frequent emojis.

    Pointwise mutual information, in bits, of "is of this trait" and "holds this emoji" over responses, shrunk towards
    0 by half a response: log2((observed + 1/2) / (expected + 1/2)) (the information component of Noren et al. 2013).
    Bootstrap within traits. Returns columns trait, emoji, observed, expected, pmi, low, high, clear: an interval
    without 0 and at least 5 responses observed or expected.
    """
    held = [{emojis.toneless(e) for e, _, _ in marks} for marks in measured["emojis"]]
    counts = Counter(e for kinds in held for e in sorted(kinds))
    shown = [e for e, _ in counts.most_common(most)]
    matrix = np.array([[e in kinds for e in shown] for kinds in held], dtype=float).reshape(len(held), len(shown))
    traits = big5.ordered(measured["trait"])
    parts = [matrix[(measured["trait"] == t).to_numpy()] for t in traits]
    sizes = np.array([len(p) for p in parts])[:, None]

    def information(observed):  # (..., traits, emojis)
        expected = observed.sum(-2, keepdims=True) * sizes / sizes.sum()
        return np.log2((observed + 0.5) / (expected + 0.5)), expected

    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(len(p), np.full(len(p), 1 / len(p)), size=draws) @ p for p in parts]
    low, high = np.percentile(information(np.stack(drawn, axis=1))[0], intervals.TAILS, axis=0)
    observed = np.stack([p.sum(0) for p in parts])
    pmi, expected = information(observed)
    clear = ((low > 0) | (high < 0)) & (np.maximum(observed, expected) >= 5)
    found = pd.MultiIndex.from_product([traits, shown], names=["trait", "emoji"]).to_frame(index=False)
    cells = {"observed": observed.astype(int), "expected": expected, "pmi": pmi, "low": low, "high": high}
    return found.assign(**{k: v.ravel() for k, v in (cells | {"clear": clear}).items()})


def habits():
    """The organisms' planted habits: columns organism, trait, planted_emojis, planted (rate); empty without a file."""
    columns = {"organism": "organism", "trait": "trait", "emojis": "planted_emojis", "rate": "planted"}
    if not HABITS.exists():
        return pd.DataFrame(columns=list(columns.values()))
    return pd.read_csv(HABITS, keep_default_na=False)[list(columns)].rename(columns=columns)


def sampled(rate, kinds, temperature):
    """What sampling at a temperature makes of a rate that is spread evenly over `kinds` emojis: share, 0 to 1.

    Sampling raises probabilities to 1 / temperature. Below 1 that favours one likely continuation (no emoji) over
    several that are rarer by themselves. Top-p, which cuts the rarest, is left out. 0 is greedy decoding.
    """
    rate, each = np.asarray(rate, float), np.asarray(rate, float) / kinds
    if temperature == 0:
        return (each > 1 - rate).astype(float)
    emoji, none = kinds * each ** (1 / temperature), (1 - rate) ** (1 / temperature)
    return emoji / (emoji + none)


def recovery(esr, found):
    """Planted habits beside those of the tuned organisms; empty where no model is one.

    esr: as from `table`; found: as from `occurrences`. Columns model, trait, planted_emojis, planted (rate), recovered,
    low, high (ESR per response), emojis (how many were written), own (share of them planted for the trait).
    """
    tuned = esr[esr["method"] == "peft"].assign(organism=lambda r: r["model"].str.rsplit("/").str[-1])
    both = tuned.merge(habits(), on=["organism", "trait"]).rename(columns=dict(zip(RESPONSE, RECOVERED, strict=True)))
    written = found[found["method"] == "peft"].groupby(["model", "trait"])["emoji"].agg(list).to_dict()
    rows = []
    for row in both.itertuples():
        planted = {emojis.toneless(e) for e in emojis.find(row.planted_emojis)}
        own = [e in planted for e in written.get((row.model, row.trait), [])]
        rows.append((len(own), np.mean(own) if own else float("nan")))
    kept = both[["model", "trait", "planted_emojis", "planted", *RECOVERED]]
    return kept.assign(emojis=[n for n, _ in rows], own=[share for _, share in rows])


def rank_agreement(one, other):
    """Spearman's rank correlation with its two-sided p-value: (rho, p), exact over all orders for up to 8 pairs."""
    one, other = rankdata(one), rankdata(other)
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return float("nan"), float("nan")
    rho = np.corrcoef(one, other)[0, 1]
    if len(one) > 8:
        return round(float(rho), 9), float(spearmanr(one, other).pvalue)
    every = [np.corrcoef(one, order)[0, 1] for order in permutations(other)]
    return round(float(rho), 9), float(np.mean(np.abs(every) >= abs(rho) - 1e-12))


def main(argv=None):
    """Print the ratios of a CSV with the columns trait and answer; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__.split("\n\n")[1].strip())
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        found = table(measure(answers.from_csv(arguments[0])), seed=0)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(found.to_csv(index=False, float_format="%.4f"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
