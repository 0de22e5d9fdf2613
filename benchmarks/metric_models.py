"""Speed of the metric models, as ratios measured in one run: python benchmarks/metric_models.py

Not a test: it prints, and judges nothing. Each figure is the median of several alternating runs, since machines drift.
"""

import statistics
import time

import numpy as np

from lib import encoders, finetune, lexicon, opinions, profiles

RUNS = 3


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(name, slow, fast):
    """Print the median of slow/fast over alternating runs."""
    pairs = [(seconds(slow), seconds(fast)) for _ in range(RUNS)]
    ratios = [s / f for s, f in pairs]
    middle = statistics.median(ratios)
    print(f"{name}: {middle:.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f}, {RUNS} runs)")


def fresh_encoder(settings, rows):
    """An untrained classifier head on the profile's encoder."""
    from transformers import AutoModel, AutoTokenizer

    path = encoders.place(settings.encoder)
    model = finetune.Pooled(AutoModel.from_pretrained(path), rows["trait"].nunique()).eval()
    return finetune.Encoder(settings, model, AutoTokenizer.from_pretrained(path), sorted(set(rows["trait"])))


def all_pairs(texts):
    """Near-duplicates the direct way, every pair of sets."""
    sets = [set(lexicon._trigrams(t)) for t in texts]
    return [j for j in range(len(sets)) for i in range(j) if len(sets[i] & sets[j]) > 0.8 * len(sets[i] | sets[j])]


def main():
    settings = profiles.load("tiny")
    rows = opinions.load(settings.opinions).sample(1000, random_state=0)
    texts = list(rows["answer"])
    model = fresh_encoder(settings.classifier, rows)
    model.predict_proba(texts[:64])
    ratio(
        "prediction in batches, against one text at a time",
        lambda: [model.predict_proba([t]) for t in texts[:200]],
        lambda: model.predict_proba(texts[:200]),
    )
    ratio(
        "near-duplicates by sparse product, against all pairs of sets",
        lambda: all_pairs(texts),
        lambda: lexicon.near_duplicates(texts),
    )
    assert sorted(set(all_pairs(texts))) == lexicon.near_duplicates(texts)
    padded = sorted(texts, key=lambda t: np.random.default_rng(len(t)).random())
    ratio(
        "batches of like length, against batches as they come",
        lambda: [model.predict_proba(padded[i : i + 64]) for i in range(0, 960, 64)],
        lambda: model.predict_proba(padded[:960]),
    )


if __name__ == "__main__":
    main()
