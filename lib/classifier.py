"""Metric models: which trait does a text show? Train, predict, score.

Both kinds, `tfidf.Tfidf` and `finetune.Encoder`, offer `predict_proba(texts) -> array (texts, traits)` and `traits`,
the names of its columns.
"""

import hashlib
import shutil

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupShuffleSplit

from lib import artifacts, emojis, encoders, finetune, intervals, opinions, paths, tfidf
from lib.errors import UserError
from lib.finetune import Encoder
from lib.tfidf import Tfidf


def split(frame, share, seed):
    """Split train rows into (fit, validation) by topic, so that no topic is in both. Raises UserError."""
    splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
    try:
        fit, held = next(splitter.split(frame, groups=frame["topic"]))
    except ValueError:  # one side would be empty
        raise UserError(
            f"train topics: {frame['topic'].nunique()} cannot be split with a held-out share of {share:g}; give more "
            "(opinions.train_topics), or another classifier.validation_share (of tuning and MEND: held_out_share)"
        ) from None
    return frame.iloc[np.sort(fit)], frame.iloc[np.sort(held)]


def folder(kind, settings, rows, seed):
    """Where a trained classifier of `kind` ("tfidf", "encoder") on these rows is kept."""
    from lib import classifier

    digest = hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()
    linear = kind == "tfidf"
    values = settings.classifier.model_dump(mode="json")
    own = {k: v for k, v in values.items() if "curve" not in k and k.startswith("tfidf") == linear}
    own["validation_share"] = values["validation_share"]
    if not linear:
        own["encoder"] = encoders.identity(values["encoder"])
    code = (tfidf, emojis) if linear else (finetune, encoders)  # every module that shapes the trained model
    mark = artifacts.fingerprint(kind, own, digest, seed, classifier, *code)
    return paths.RESULTS / settings.profile / f"{kind}-{mark}"


def train(kind, settings, rows, seed):
    """Train a classifier on train rows, or load it if these very rows, settings and seed were trained before."""
    place = folder(kind, settings, rows, seed)
    fit_rows, validation = split(rows, settings.classifier.validation_share, seed)

    def make(tmp):
        if kind == "tfidf":
            Tfidf(settings.classifier).fit(fit_rows, validation).save(tmp)
        else:
            work = place.with_name(f"{place.name}.checkpoints")
            Encoder(settings.classifier).fit(fit_rows, validation, seed, work).save(tmp)
            shutil.rmtree(work, ignore_errors=True)

    artifacts.build(place, make)
    return (Tfidf if kind == "tfidf" else Encoder).load(place, settings.classifier)


def trained(kind, settings, seed):
    """The classifier that notebook 02 trained. Raises UserError if it has not."""
    place = folder(kind, settings, read_opinions(settings)[0], seed)
    artifacts.require(place, "02_classifier", settings.profile)
    return (Tfidf if kind == "tfidf" else Encoder).load(place, settings.classifier)


def predict(model, frame):
    """The frame with columns predicted and confidence, and one probability column p_<trait> a trait."""
    p = model.predict_proba(list(frame["answer"]))
    best = p.argmax(1)
    columns = {f"p_{t}": p[:, i] for i, t in enumerate(model.traits)}
    return frame.assign(predicted=np.array(model.traits)[best], confidence=p[np.arange(len(p)), best], **columns)


def heard(settings, given):
    """Answers with what the trained encoder makes of them: `predict`, kept, so that no other notebook reads them again.

    given: answers with model, method and trait; any index. Read, and kept, are the answers of each of these groups, in
    their order. Raises UserError if notebook 02 has not trained the encoder.
    """
    judge, name = [], folder("encoder", settings, read_opinions(settings)[0], settings.seed).name
    parts = []
    for _, own in given.groupby(["model", "method", "trait"], sort=False):

        def make(tmp, own=own):
            judge[:] = judge or [trained("encoder", settings, settings.seed)]
            predict(judge[0], own[["answer"]]).drop(columns="answer").to_csv(tmp / "heard.csv", index=False)

        place = paths.RESULTS / settings.profile / f"heard-{artifacts.fingerprint(name, list(own['answer']))}"
        kept = pd.read_csv(artifacts.build(place, make) / "heard.csv", float_precision="round_trip")
        parts.append(kept.set_index(own.index))
    return given.join(pd.concat(parts)) if parts else given


def score(predictions, model_name, split_name):
    """One row of 02_classifier.csv: accuracy with its Wilson interval, and macro-F1."""
    hits = int((predictions["predicted"] == predictions["trait"]).sum())
    accuracy, low, high = intervals.wilson(hits, len(predictions))
    macro = f1_score(predictions["trait"], predictions["predicted"], average="macro", zero_division=0)
    counts = {"model": model_name, "split": split_name, "n": len(predictions)}
    return {**counts, "accuracy": accuracy, "low": low, "high": high, "macro_f1": macro}


def calibration(predictions, bins=10):
    """Reliability: confidence against accuracy in bins of equal count, with Wilson intervals.

    Returns (table, ece): ece is the expected calibration error, the mean |accuracy - confidence| weighted by
    bin size (Guo et al. 2017).
    """
    ordered = predictions.sort_values("confidence")
    rows = []
    for part in np.array_split(np.arange(len(ordered)), min(bins, len(ordered))):
        chunk = ordered.iloc[part]
        accuracy, low, high = intervals.wilson(int((chunk["predicted"] == chunk["trait"]).sum()), len(chunk))
        confidence = chunk["confidence"].mean()
        rows.append({"n": len(chunk), "confidence": confidence, "accuracy": accuracy, "low": low, "high": high})
    table = pd.DataFrame(rows)
    ece = float(((table["accuracy"] - table["confidence"]).abs() * table["n"]).sum() / table["n"].sum())
    return table, ece


def curve_c(settings):
    """The one inverse regularisation of TF-IDF's learning curve: the middle candidate of a profile's [classifier]."""
    return settings.tfidf_c[len(settings.tfidf_c) // 2]


def learning_curve(kind, settings, rows, test, sizes, seeds):
    """Test accuracy after training on the rows of so many topics: columns model, topics, seed, accuracy.

    seeds: how many trainings a point, the first with the run's own seed. TF-IDF keeps the regularisation in the middle
    of the profile's candidates, so that a point costs one fit.
    """
    fixed = settings.classifier.model_copy(update={"tfidf_c": [curve_c(settings.classifier)]})
    settings = settings.model_copy(update={"classifier": fixed})
    found = []
    for size in sizes:
        for seed in range(settings.seed, settings.seed + seeds):
            topics = rows["topic"].drop_duplicates().sample(size, random_state=seed)
            model = train(kind, settings, rows[rows["topic"].isin(topics)], seed)
            hits = predict(model, test)
            accuracy = float((hits["predicted"] == hits["trait"]).mean())
            found.append({"model": kind, "topics": size, "seed": seed, "accuracy": accuracy})
    return pd.DataFrame(found)


def read_opinions(settings):
    """The checked rows of notebook 01 as (train, test)."""
    frame = opinions.read(settings)
    return tuple(frame[frame["split"] == s].reset_index(drop=True) for s in ("train", "test"))
