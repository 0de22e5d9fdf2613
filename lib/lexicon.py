"""Measures of wording: diversity, near-duplicates, what tells groups of texts apart, themes."""

import numpy as np
import pandas as pd
import regex
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

_WORD = regex.compile(r"\p{L}[\p{L}\p{M}'\u2019-]*|\p{N}+")
_SENTENCE_END = regex.compile(r"[.!?]+[\"'\u201d\u2019)]*(?=\s|$)")


def words(text):
    """Lower-case words of a text, apostrophes and inner hyphens kept."""
    return _WORD.findall(text.lower())


def sentences(text):
    """Number of sentences, at least one: runs of . ! ? before white space or the end."""
    return max(1, len(_SENTENCE_END.findall(text.strip())))


def distinct(texts, n):
    """Distinct-n: different word n-grams / all word n-grams over all texts (Li et al. 2016)."""
    grams = [tuple(w[i : i + n]) for w in map(words, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def mtld(texts, threshold=0.72):
    """Measure of textual lexical diversity over the texts read as one (McCarthy & Jarvis 2010)."""
    from lexicalrichness import LexicalRichness

    joined = " ".join(" ".join(words(t)) for t in texts)
    return LexicalRichness(joined, preprocessor=None, tokenizer=str.split).mtld(threshold=threshold)


def measures(texts):
    """Length and diversity of a list of texts, as one dictionary."""
    texts = list(texts)
    lengths = np.array([len(words(t)) for t in texts])
    low, high = np.percentile(lengths, [5, 95])
    return {
        "texts": len(texts),
        "distinct texts": len(set(texts)),
        "words, mean": lengths.mean(),
        "words, 5th percentile": low,
        "words, 95th percentile": high,
        "sentences, mean": np.mean([sentences(t) for t in texts]),
        "distinct words": len({w for t in texts for w in words(t)}),
        "distinct-1": distinct(texts, 1),
        "distinct-2": distinct(texts, 2),
        "MTLD": mtld(texts),
        "near-duplicates, %": 100 * len(near_duplicates(texts)) / len(texts),
    }


def near_duplicates(texts, threshold=0.8):
    """Positions of texts whose word-3-gram Jaccard similarity with an earlier text exceeds `threshold`."""
    texts = list(texts)
    counter = CountVectorizer(analyzer=_trigrams, binary=True, dtype=np.int32)
    grams = counter.fit_transform(texts)
    sizes = np.asarray(grams.sum(1)).ravel()
    found = []
    for start in range(0, len(texts), 500):  # in blocks: the full product is large
        block = (grams[start : start + 500] @ grams.T).tocoo()
        row, column, shared = block.row + start, block.col, block.data
        jaccard = shared / (sizes[row] + sizes[column] - shared)
        found.extend(row[(column < row) & (jaccard > threshold)])
    return sorted(set(map(int, found)))


def _trigrams(text):
    w = words(text)
    return [" ".join(w[i : i + 3]) for i in range(max(1, len(w) - 2))]


def log_odds(groups, prior_words=500.0):
    """Weighted log-odds of each word, each group against all others, with z-scores.

    Monroe, Colaresi & Quinn (2008), section 3.3.1, equations 15, 16, 19-22: an informative Dirichlet prior in
    proportion to the word's overall frequency, `prior_words` in sum. groups: {name: texts}.
    Returns columns group, word, count, log_odds, z, sorted by z within a group.
    """
    counter = CountVectorizer(analyzer=words)
    counts = counter.fit_transform([" ".join(texts) for texts in groups.values()]).toarray().astype(float)
    total = counts.sum(0)
    prior = prior_words * total / total.sum()
    parts = []
    for name, own in zip(groups, counts, strict=True):
        other = total - own
        own_odds = (own + prior) / (own.sum() + prior_words - own - prior)
        other_odds = (other + prior) / (other.sum() + prior_words - other - prior)
        delta = np.log(own_odds) - np.log(other_odds)
        z = delta / np.sqrt(1 / (own + prior) + 1 / (other + prior))
        part = {"group": name, "word": counter.get_feature_names_out(), "count": own, "log_odds": delta, "z": z}
        parts.append(pd.DataFrame(part).sort_values("z", ascending=False))
    return pd.concat(parts, ignore_index=True)


def themes(vectors, texts, count, seed, top=6):
    """Themes as clusters of text embeddings (k-means), each named by the words that mark it.

    vectors: (texts, dimensions), unit length. Words are ranked by `log_odds` of the cluster against the others, as in
    class-based TF-IDF (Grootendorst 2022) but with a stated statistic. Returns (cluster of each text, their names).
    """
    labels = KMeans(count, n_init=4, random_state=seed).fit_predict(vectors)
    texts = np.asarray(list(texts), dtype=object)
    odds = log_odds({k: list(texts[labels == k]) for k in range(count)})
    odds = odds[[len(w) > 2 and w not in ENGLISH_STOP_WORDS for w in odds["word"]]]
    return labels, odds.groupby("group")["word"].apply(lambda w: ", ".join(w.head(top))).tolist()


def main(path):
    """Print the measures of the E, A and N rows of a CSV in the published columns, as a CSV with its checksum."""
    from lib import artifacts, opinions

    frame = opinions.read_csv(path)
    chosen = frame[frame["trait"].isin(("extraversion", "agreeableness", "neuroticism"))]
    rows = measures(chosen["answer"])
    table = pd.DataFrame({"measure": list(rows), "value": [round(float(v), 4) for v in rows.values()]})
    print(table.assign(sha256=artifacts.sha256(path)[:12]).to_csv(index=False), end="")


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
