"""Word attributions of a trait classifier by LIME and SHAP, and checks of what they are worth.

Both see the same tokens, words and emojis, and give one weight per distinct token (SHAP's are summed over
repetitions). Positive pushes towards the trait. LIME: Ribeiro et al. 2016. SHAP: Lundberg & Lee 2017.
"""

import os

import numpy as np
import pandas as pd

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # compiling shap's loops takes 3 s, interpreting them .02 s a text
import shap
from lime.lime_text import LimeTextExplainer
from scipy.stats import spearmanr

from lib import emojis, intervals

PAPER_WORDS = {"contributions": 1, "acknowledge": 1, "believe": 1, "consequences": -1}  # signs in Figures 51 and 52
PAPER_TRAIT = "agreeableness"  # which those two explain
ABSENT = "absent from this text"


def lime(model, text, trait, samples, seed):
    """LIME weights of a text's distinct tokens for the probability of `trait`: Series, in order of appearance."""
    explainer = LimeTextExplainer(
        class_names=model.traits, split_expression=emojis.tokens, feature_selection="none", random_state=seed
    )
    label = model.traits.index(trait)
    tokens = list(dict.fromkeys(emojis.tokens(text)))
    found = explainer.explain_instance(
        text, model.predict_proba, labels=(label,), num_features=len(tokens), num_samples=samples
    )
    return pd.Series(dict(found.as_list(label=label))).reindex(tokens)


def _tokenizer(text, return_offsets_mapping=True):
    """The tokenizer interface that shap.maskers.Text expects, over words and emojis."""
    spans = emojis.spans(text)
    if text and not spans:  # the mask itself, which holds neither word nor emoji
        spans = [(text, (0, len(text)))]
    return {"input_ids": [t for t, _ in spans], "offset_mapping": [s for _, s in spans]}


def shap_values(model, text, trait, evaluations, seed):
    """SHAP (partition, i.e. Owen) values of a text's distinct tokens for the probability of `trait`, as `lime`."""
    masker = shap.maskers.Text(_tokenizer, mask_token="...", collapse_mask_token=True)
    label = model.traits.index(trait)
    explainer = shap.Explainer(
        lambda texts: model.predict_proba([str(t) for t in texts])[:, label], masker, algorithm="partition", seed=seed
    )
    values = explainer([text], max_evals=evaluations, silent=True)
    tokens = emojis.tokens(text)
    return pd.Series(values.values[0], index=tokens).groupby(level=0, sort=False).sum()


METHODS = {"LIME": lime, "SHAP": shap_values}


def agreement(one, other):
    """Spearman rank correlation of two attributions over the tokens both have."""
    shared = one.index.intersection(other.index)
    if len(shared) < 3 or one[shared].nunique() < 2 or other[shared].nunique() < 2:
        return float("nan")
    return float(spearmanr(one[shared], other[shared]).statistic)


def delete(text, tokens):
    """The text without every occurrence of the given tokens."""
    gone = set(tokens)
    kept, last = [], 0
    for token, (start, end) in emojis.spans(text):
        if token in gone:
            kept.append(text[last:start])
            last = end
    return " ".join("".join([*kept, text[last:]]).split())


def deletion_curve(model, rows, attributions, most, draws, seed):
    """How far the trait's probability falls when the top k tokens go, and when k random ones go.

    rows: DataFrame with answer and trait; attributions: one Series a row, tokens in order of appearance, which makes
    the random orders the same for every model. Returns a DataFrame with columns order (top, random, difference), k,
    drop, low, high: mean fall in probability, interval by bootstrap over rows; difference is top minus random.
    """
    rng = np.random.default_rng(seed)
    texts, keys = [], []
    for i, (text, weights) in enumerate(zip(rows["answer"], attributions, strict=True)):
        orders = [("top", list(weights.sort_values(ascending=False).index))]
        orders += [("random", list(rng.permutation(list(weights.index)))) for _ in range(draws)]
        for order, tokens in orders:
            for k in range(1, most + 1):
                texts.append(delete(text, tokens[:k]))
                keys.append((i, order, k))
    label = np.array([model.traits.index(t) for t in rows["trait"]])
    before = model.predict_proba(list(rows["answer"]))[np.arange(len(rows)), label]
    after = pd.DataFrame(keys, columns=["row", "order", "k"])
    after["drop"] = before[after["row"]] - model.predict_proba(texts)[np.arange(len(texts)), label[after["row"]]]
    table = after.groupby(["order", "k", "row"])["drop"].mean().unstack()
    table = pd.concat([table, pd.concat({"difference": table.loc["top"] - table.loc["random"]}, names=["order"])])
    found = []
    for (order, k), drops in table.iterrows():
        mean, low, high = intervals.bootstrap(drops.to_numpy(), seed)
        found.append({"order": order, "k": k, "drop": mean, "low": low, "high": high})
    return pd.DataFrame(found)


def global_importance(rows, attributions, least=3):
    """Mean weight of each lower-case token over the explained rows of a trait that hold it at least `least` times.

    Returns columns trait, token, rows, weight, sorted by weight within a trait.
    """
    parts = [
        pd.DataFrame({"trait": trait, "token": w.index.str.lower(), "weight": w.to_numpy()})
        for trait, w in zip(rows["trait"], attributions, strict=True)
    ]
    grouped = pd.concat(parts).groupby(["trait", "token"])["weight"]
    table = grouped.agg(rows="size", weight="mean").reset_index()
    return table[table["rows"] >= least].sort_values(["trait", "weight"], ascending=[True, False])


def paper_words(attributions, text):
    """The paper's four words against attributions {(classifier, method): Series}: one row a word and attribution.

    Columns word, paper, classifier, method, weight, verdict (keeps its sign, changes its sign, absent).
    """
    present = {t.lower() for t in emojis.tokens(text)}
    found = []
    for word, sign in PAPER_WORDS.items():
        for (classifier, method), weights in attributions.items():
            own = weights[weights.index.str.lower() == word]
            weight = float(own.sum()) if word in present else float("nan")
            same = "keeps its sign" if weight * sign > 0 else "changes its sign"
            verdict = same if word in present else ABSENT
            row = {"word": word, "paper": "+" if sign > 0 else "-", "classifier": classifier, "method": method}
            found.append({**row, "weight": weight, "verdict": verdict})
    return pd.DataFrame(found, columns=["word", "paper", "classifier", "method", "weight", "verdict"])


def example_row(frame, topic, trait):
    """The row of a topic and trait, or the first row of that trait where the data has no such topic."""
    of_trait = frame[frame["trait"] == trait]
    if of_trait.empty:
        of_trait = frame
    wanted = of_trait[of_trait["topic"].str.casefold() == topic.casefold()]
    return (wanted if len(wanted) else of_trait).iloc[0]
