"""Trait alignment of answers, side by side for all methods: TA, PAE, ES, DD, TPEI, coherence; tests and verdicts.

TA and PAE as the paper has them, the others as its predecessor (Mao et al. 2023, PersonalityEdit). Where that one's
code forgets the shift by one token between scores and labels, ours does not (`lib/likelihood`). Every measure has one
value an answer, a column; a row of the table is the mean over the answers of a model, method and trait.
"""

import json
from collections import Counter

import numpy as np
import pandas as pd
from scipy.stats import binom, chi2, f
from statsmodels.stats.multitest import multipletests

from lib import answers, artifacts, big5, emojis, hub, intervals, mend, paths, qlora
from lib.errors import UserError

COLUMNS = ("model", "method", "trait", "n", "ta", "ta_low", "ta_high", "pae", "es", "dd", "tpei", "coherent")
LEVEL = 0.05  # of the tests, after Holm
VERDICTS = ("holds", "does not hold", "undecided here")


def check(settings, given):
    """Refuse answers that lack a model or a method, and say which notebook makes them. Raises UserError."""
    there = set(zip(given["model"], given["method"], strict=True))
    for model in map(hub.label, settings.chat.models):
        for method in answers.METHODS:
            if (model, method) not in there:
                notebook = answers.MAKERS[method][0]
                raise UserError(
                    f"answers of {model} by {method}: not made yet for these settings; notebook {notebook} makes them: "
                    + artifacts.making(notebook, settings.profile)
                )
    return given


def kept(settings, name, notebook):
    """A table that another notebook saved, figures/<profile>/<name>.csv. Raises UserError."""
    path = paths.FIGURES / settings.profile / f"{name}.csv"
    if not path.exists():
        raise UserError(
            f"table {name}: not made yet; notebook {notebook} makes it: {artifacts.making(notebook, settings.profile)}"
        )
    return pd.read_csv(path)


# --- one value an answer


def voices(found):
    """Answers with what is right about their classifier's verdict: correct, ce.

    found: answers with predicted and p_<trait>, as `classifier.heard` gives them.
    correct: predicted is the target; its mean is TA, trait alignment (the paper's measure, PersonalityEdit's accuracy).
    ce: cross-entropy of classifier and target, -log p(target), nats, at most 27.6.
    """
    p = found.filter(regex="^p_")
    p = p.to_numpy()[np.arange(len(p)), p.columns.get_indexer("p_" + found["trait"])]
    return found.assign(correct=found["predicted"] == found["trait"], ce=-np.log(np.maximum(p, 1e-12)))


def tokens(text):
    """Words, numbers, punctuation marks and emojis of a text, in order."""
    return [m.group() for m in emojis.WORD_OR_EMOJI.finditer(text) if not m.group().isspace()]


def entropy(words, n):
    """Shannon entropy (1948) of the empirical distribution of n-grams, in bits; 0 where there is none.

    words: list of tokens, k of them. H = -sum f log2 f over the distinct n-grams, f their shares of all k - n + 1. At
    most log2(k - n + 1), when no n-gram comes twice: of 2-grams log2(k - 1).
    """
    counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()), dtype=float)
    if not len(counts):
        return 0.0
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def coherence(given, threshold):
    """Answers with tokens, entropy2, entropy3 and coherent: both entropies reach the threshold, in bits.

    The predecessor's rule against repetition, 3.5 bits for 2- and 3-grams (after Zhang et al. 2018). It is blind to
    salads of different words; perplexity sees those.
    """
    words = [tokens(text) for text in given["answer"]]
    two, three = ([entropy(w, n) for w in words] for n in (2, 3))
    coherent = np.minimum(two, three) >= threshold
    return given.assign(tokens=[len(w) for w in words], entropy2=two, entropy3=three, coherent=coherent)


def threshold_fit(texts, threshold, width=5):
    """How a threshold of `coherence` fits texts of different lengths, of which one knows that they are coherent.

    Columns low, high (tokens, in classes of `width`), texts, share (of the texts that reach it), least, median (the
    smaller entropy), most (what `high` tokens can reach at all, log2(high - 2)), shortest (tokens that reach it).
    """
    frame = coherence(pd.DataFrame({"answer": list(texts)}), threshold)
    frame = frame.assign(low=frame["tokens"] // width * width, smaller=frame[["entropy2", "entropy3"]].min(axis=1))
    groups = frame.groupby("low")
    found = groups.agg(
        texts=("coherent", "size"), share=("coherent", "mean"), least=("smaller", "min"), median=("smaller", "median")
    ).reset_index()
    found.insert(1, "high", found["low"] + width - 1)
    return found.assign(most=np.log2(np.maximum(found["high"] - 2, 1)), shortest=int(np.ceil(2**threshold)) + 2)


def edit_success(plus_edit, minus_edit, plus_pre):
    """ES = sigmoid(m+_edit - m-_edit) * min(1, exp(m+_edit - m+_pre)), 0 to 1 (Mao et al. 2023).

    m: mean token log-probability, nats, of the reference answer in the target trait's voice (+) or in another trait's
    (-) on the same topic, behind the method's own prompt; pre: by the base model asked plainly. The first factor asks
    whether the target is likelier than another trait, the second takes away if it became less likely than before.
    """
    preferred = 1 / (1 + np.exp(np.asarray(minus_edit) - plus_edit))
    return preferred * np.exp(np.minimum(0, np.asarray(plus_edit) - plus_pre))


def against_base(given):
    """Answers beside the base model's answers to the same questions: further columns es, tpei, pae.

    tpei = CE(classifier(base answer), target) - CE(classifier(answer), target), nats (Mao et al. 2023): above 0 where
    the method made the trait plainer. pae = judged - judged of the base answer, -4 to 4; of all answers, where the
    predecessor left out incoherent ones. Columns ce and judged are the base's to compare with; NaN without a base.
    """
    given = answers.numbered(given)
    keys = ["model", "trait", "topic", "copy"]
    base = given[given["method"] == "base"].set_index(keys)[["ce", "judged"]]
    before = base.reindex(pd.MultiIndex.from_frame(given[keys]))
    return given.drop(columns="copy").assign(
        es=edit_success(given["m_plus_edit"], given["m_minus_edit"], given["m_plus_pre"]),
        tpei=before["ce"].to_numpy() - given["ce"],
        pae=given["judged"] - before["judged"].to_numpy(),
    )


# --- one value a model, method and trait


def table(given):
    """05_alignment.csv: columns as COLUMNS. TA with its Wilson interval, the others means; NaN values are left out.

    given: answers with all columns of this module and `lib/likelihood`. dd: drawdown, mean token KL(pre || edited) on
    another topic's reference text, nats (Mao et al. 2023).
    """
    found = []
    for key, rows in answers.groups(given):
        ta = intervals.wilson(int(rows["correct"].sum()), len(rows))
        means = (rows[c].mean() for c in ("pae", "es", "kl", "tpei", "coherent"))
        found.append((*key, len(rows), *ta, *means))
    return pd.DataFrame(found, columns=list(COLUMNS))


def leakage(given):
    """Which trait is found where which was wanted: columns model, method, trait, predicted, share. Shares add to 1."""
    found = []
    for key, rows in answers.groups(given):
        shares = rows["predicted"].value_counts(normalize=True)
        found += [(*key, p, shares.get(p, 0.0)) for p in big5.ordered(given["trait"])]
        if rest := sum(v for p, v in shares.items() if p not in set(given["trait"])):
            found.append((*key, "another", rest))
    return pd.DataFrame(found, columns=[*answers.GROUP, "predicted", "share"])


# --- paired comparison


def sign_flip(differences):
    """Two-sided p-value of the exact sign-flip permutation test (Fisher 1935) for differences of -1, 0 or 1.

    Under the null hypothesis every difference is as likely to have the other sign. Over all 2^d flips of the d that are
    not 0, the sum is 2 B - d with B binomial (d, 1/2), so nothing is drawn: the test is McNemar's exact one (1947).
    """
    differences = np.asarray(differences, dtype=int)
    d, total = np.abs(differences).sum(), abs(differences.sum())
    return 1.0 if d == 0 else min(1.0, 2 * float(binom.sf((d + total) // 2 - 1, d, 0.5)))


def cohens_h(one, other):
    """Effect size of two shares, 2 asin sqrt(one) - 2 asin sqrt(other), -pi to pi (Cohen 1988): .2 small, .8 large."""
    return 2 * np.arcsin(np.sqrt(one)) - 2 * np.arcsin(np.sqrt(other))


def compare(given, seed, draws=2000):
    """PEFT against every other method on the same questions, by trait: a row a comparison.

    Columns model, trait, method (the other one), n, peft, other (TA), difference with low and high (percentile
    bootstrap over questions), h (Cohen's), peft_only, other_only (questions that one alone got right), p (`sign_flip`),
    p_holm (Holm 1979, over all comparisons of a model).
    """
    found = []
    for (model, trait), rows in answers.numbered(given).groupby(["model", "trait"], sort=False):
        right = rows.pivot(index=["topic", "copy"], columns="method", values="correct")
        for method in [m for m in answers.METHODS if m in right and m != "peft" and "peft" in right]:
            pair = right[["peft", method]].dropna().astype(int)
            d = (pair["peft"] - pair[method]).to_numpy()
            shares = pair["peft"].mean(), pair[method].mean()
            effect = (*map(float, intervals.bootstrap(d, seed, draws)), cohens_h(*shares))
            alone = (d > 0).sum(), (d < 0).sum()
            found.append((model, trait, method, len(d), *shares, *effect, *alone, sign_flip(d)))
    names = ["model", "trait", "method", "n", "peft", "other", "difference", "low", "high", "h", "peft_only"]
    tests = pd.DataFrame(found, columns=[*names, "other_only", "p"])
    holm = tests.groupby("model", sort=False)["p"].transform(lambda p: multipletests(p, method="holm")[1])
    return tests.assign(p_holm=holm)


# --- the paper's claims


def superior(tests):
    """The claim "PEFT is superior to IKE", by the paired tests of one model: a dictionary with `verdict`.

    Rule: *holds* if PEFT's TA is clearly higher (p after Holm below .05) for at least four traits in five and IKE's
    clearly higher for none. *Does not hold* if IKE's is clearly higher for more traits than PEFT's, or if for no trait
    the interval of the difference reaches +.1, too little to matter. *Undecided here* otherwise. tests: as from
    `compare`.
    """
    own = tests[tests["method"] == "ike"]
    clear = own["p_holm"] < LEVEL
    above, below = int((clear & (own["difference"] > 0)).sum()), int((clear & (own["difference"] < 0)).sum())
    holds, alike = above >= 0.8 * len(own) and not below, (own["high"] < 0.1).all()
    verdict = VERDICTS[2 if own.empty else 0 if holds and not alike else 1 if alike or below > above else 2]
    means = {"peft": own["peft"].mean(), "ike": own["other"].mean(), "least_h": own["h"].min()}
    return {"verdict": verdict, "traits": len(own), "peft_above": above, "ike_above": below, **means}


def beyond_chance(ta, noise):
    """Standard deviation of TA over runs beyond what finite answers bring about, pooled over traits.

    ta: list over the traits of arrays (runs,). noise: of every trait the variance that chance brings about, as
    `ike.shares` has it. The root of the mean over traits of variance minus noise, 0 where chance explains it all.
    """
    return float(np.sqrt(max(0, np.mean([t.var(ddof=1) - v for t, v in zip(ta, noise, strict=True)]))))


def varies(prompts, seeds):
    """The claim "IKE varies with its prompt", more than PEFT with its seed, for one model: a dictionary with `verdict`.

    prompts: TA of IKE under every prompt, seeds: of PEFT under every seed, as from `ike.shares`. ratio: standard
    deviation of the one over that of the other, pooled over traits, with the 95 % interval of an F test (low, high),
    which takes TA as normal. Rule: *holds* if the interval lies above 1 and IKE's spread is also the larger one
    `beyond_chance`; *does not hold* if it lies below 1, or if IKE's own standard deviation has an interval
    (chi-squared) below .05, too little to matter; *undecided here* otherwise, also where a trait has one prompt or
    fewer than three seeds.
    """
    parts = [_by_trait(prompts), _by_trait(seeds)]
    ike, peft = (beyond_chance(*part) if min(map(len, part[0])) > 1 else np.nan for part in parts)
    (one, first), (two, second) = (_pooled(ta) for ta, _ in parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, most = np.float64(one) / two, np.sqrt(one * first / chi2.ppf(intervals.TAILS[0] / 100, first))
    low, high = (np.sqrt(ratio / f.ppf(t / 100, first, second)) for t in intervals.TAILS[::-1])
    runs = min(map(len, parts[1][0]))
    sure = np.isfinite(high) and runs >= 3
    verdict = VERDICTS[0 if sure and low > 1 and ike > peft else 1 if sure and (high < 1 or most < 0.05) else 2]
    spread = {"ike_sd": ike, "peft_sd": peft, "ratio": float(np.sqrt(ratio)), "low": float(low), "high": float(high)}
    ta = prompts["ta"]
    return {"verdict": verdict, **spread, "seeds": runs, "ike_least": ta.min(), "ike_most": ta.max()}


def _by_trait(table):
    """Of every trait the array of ta, and the noise: two lists."""
    own = [rows for _, rows in table.groupby("trait", sort=False)]
    return [rows["ta"].to_numpy() for rows in own], [rows["noise"].iloc[0] for rows in own]


def _pooled(ta):
    """Mean over traits of the variance over runs, and its degrees of freedom (Satterthwaite 1946); NaN for one run."""
    if min(map(len, ta)) < 2:
        return np.nan, np.nan
    own, less = np.array([t.var(ddof=1) for t in ta]), np.array([len(t) - 1 for t in ta])
    return own.mean(), own.sum() ** 2 / max((own**2 / less).sum(), 1e-300)


def gibberish(given, limit):
    """Which answers are gibberish: not `coherent`, or perplexity under the untouched base above `limit`, or none."""
    return ~given["coherent"].astype(bool) | ~(given["perplexity"] <= limit)


def readable(given, share=0.95):
    """Perplexity below which this share of human-made reference texts lies, under the base: those behind m_plus_pre."""
    return float(np.exp(-given.loc[given["method"] == "base", "m_plus_pre"].dropna()).quantile(share))


def yields_gibberish(given, method="mend"):
    """The claim "MEND yields gibberish", for the answers of one model: a dictionary with `verdict`.

    Rule: *holds* if most answers are `gibberish` (95 % Wilson interval above one half) and more than of the base model
    (intervals apart); *does not hold* if the interval lies below one half; *undecided here* otherwise. The limit on
    perplexity is what 95 in 100 reference texts stay below (`readable`). unlikely: the share that is coherent and above
    that limit, so gibberish by perplexity alone.
    """
    limit = readable(given)
    bad = gibberish(given, limit)
    shares = {m: bad[given["method"] == m] for m in (method, "base")}
    own, base = (intervals.wilson(int(b.sum()), len(b)) for b in shares.values())
    verdict = VERDICTS[0 if own[1] > max(0.5, base[2]) else 1 if own[2] < 0.5 else 2]
    medians = {f"perplexity_{m}": given.loc[given["method"] == m, "perplexity"].median() for m in shares}
    coherent = {f"coherent_{m}": given.loc[given["method"] == m, "coherent"].mean() for m in shares}
    alone = bad & given["coherent"].astype(bool)
    unlikely = {f"unlikely{end}": alone[given["method"] == m].mean() for m, end in ((method, ""), ("base", "_base"))}
    numbers = {"gibberish": own[0], "low": own[1], "high": own[2], "gibberish_base": base[0], "limit": limit}
    return {"verdict": verdict, **numbers, **unlikely, **coherent, **medians}


def combined(verdicts):
    """One verdict of several models': theirs, where they agree, and else undecided."""
    return verdicts[0] if len(set(verdicts)) == 1 else VERDICTS[2]


# --- what it costs


def cost(settings, given, frame):
    """What a method costs: model, method, minutes (of training, on the machine that trained), prompt_tokens (mean)."""
    models, found = {hub.label(m): m for m in settings.chat.models}, []
    for (model, method), rows in given.groupby(["model", "method"], sort=False):
        seconds = [_seconds(settings, f, method) for f in _trained(settings, models[model], method, rows, frame)]
        found.append((model, method, sum(seconds) / 60, rows["prompt_tokens"].mean()))
    return pd.DataFrame(found, columns=["model", "method", "minutes", "prompt_tokens"])


def _trained(settings, model, method, rows, frame):
    """The folders of what a method has trained for a model."""
    if method == "mend":
        return [mend.folder(settings, model, frame)]
    train = frame[frame["split"] == "train"]
    traits = big5.ordered(rows["trait"]) if method == "peft" else []
    return [qlora.folder(settings, model, t, train[train["trait"] == t]) for t in traits]


def _seconds(settings, folder, method):
    place = artifacts.require(folder, answers.MAKERS[method][0], settings.profile)
    return json.loads((place / "training.json").read_text("utf-8"))["seconds"]
