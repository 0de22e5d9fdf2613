"""Metric models: which trait does a text show? TF-IDF with logistic regression, and a fine-tuned encoder.

Both offer `predict_proba(texts) -> array (texts, traits)` and `traits`, the names of its columns.
The paper fine-tunes RoBERTa-base; `encoder = "FacebookAI/roberta-base"` does so here.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline

from lib import artifacts, big5, emojis, encoders, intervals, opinions, paths
from lib.errors import UserError


def split(frame, share, seed):
    """Split train rows into (fit, validation) by topic, so that no topic is in both."""
    splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
    fit, held = next(splitter.split(frame, groups=frame["topic"]))
    return frame.iloc[np.sort(fit)], frame.iloc[np.sort(held)]


class Tfidf:
    """TF-IDF of words and emojis, multinomial logistic regression; regularisation chosen on validation rows."""

    name = "tfidf"

    def __init__(self, settings, pipeline=None):
        self.settings, self.pipeline = settings, pipeline

    @property
    def traits(self):
        return list(self.pipeline.classes_)

    def _fit(self, rows, c):
        s = self.settings
        grams = TfidfVectorizer(
            tokenizer=emojis.tokens,
            token_pattern=None,
            lowercase=True,
            ngram_range=(1, s.tfidf_ngrams),
            min_df=s.tfidf_min_df,
            sublinear_tf=True,
        )
        model = make_pipeline(grams, LogisticRegression(C=c, max_iter=1000))
        try:
            return model.fit(list(rows["answer"]), list(rows["trait"]))
        except ValueError as error:
            raise UserError(
                f"classifier: too few words in {len(rows)} answers for TF-IDF ({error}); lower classifier.tfidf_min_df"
            ) from None

    def fit(self, train, validation):
        """Choose C by accuracy on `validation`, then keep the model fitted to `train`."""
        models = {c: self._fit(train, c) for c in self.settings.tfidf_c}
        scores = {c: m.score(list(validation["answer"]), list(validation["trait"])) for c, m in models.items()}
        self.pipeline = models[max(scores, key=scores.get)]
        return self

    def predict_proba(self, texts):
        return self.pipeline.predict_proba(list(texts))

    def weights(self):
        """Coefficient of every single word: DataFrame, words x traits."""
        grams, model = self.pipeline[0], self.pipeline[-1]
        coefficients = model.coef_ if len(model.classes_) > 2 else np.vstack([-model.coef_, model.coef_])
        table = pd.DataFrame(coefficients.T, index=grams.get_feature_names_out(), columns=self.traits)
        return table[~table.index.str.contains(" ")]

    def save(self, folder):
        joblib.dump(self.pipeline, Path(folder) / "tfidf.joblib")

    @classmethod
    def load(cls, folder, settings):
        return cls(settings, joblib.load(Path(folder) / "tfidf.joblib"))


class Encoder:
    """A pretrained text encoder with a classification head, fine-tuned above its lowest layers."""

    name = "encoder"

    def __init__(self, settings, model=None, tokenizer=None, traits=None):
        self.settings, self.model, self.tokenizer, self.traits = settings, model, tokenizer, traits

    def _encode(self, texts, labels=None):
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.settings.max_tokens)
        items = [{k: v[i] for k, v in rows.items()} for i in range(len(rows["input_ids"]))]
        for item, label in zip(items, labels if labels is not None else [], strict=labels is not None):
            item["labels"] = label
        return items

    def fit(self, train, validation, seed, folder):
        """Fine-tune on `train`; returns self. `folder`: where checkpoints go, so that a stopped run resumes."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

        set_seed(seed)
        path = encoders.place(self.settings.encoder)
        self.traits = big5.ordered(train["trait"])
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            path, id2label=dict(enumerate(self.traits)), label2id={t: i for i, t in enumerate(self.traits)}
        )
        self.freeze(self.settings.frozen_layers)
        code = {t: i for i, t in enumerate(self.traits)}
        parts = [self._encode(p["answer"], [code[t] for t in p["trait"]]) for p in (train, validation)]
        trainer = _trainer(self, *parts, seed=seed, folder=Path(folder))
        trainer.train(resume_from_checkpoint=whole_checkpoint(Path(folder)))
        self.history = pd.DataFrame(trainer.state.log_history)
        self.model.eval()
        return self

    def freeze(self, layers):
        """Leave the embeddings and the lowest `layers` layers as pretrained."""
        body = self.model.base_model
        stack = body.encoder.layer
        if layers > len(stack):
            raise UserError(f"classifier.frozen_layers = {layers}: the encoder has {len(stack)} layers; give fewer")
        for part in (body.embeddings, *stack[:layers]):
            part.requires_grad_(False)

    def predict_proba(self, texts, batch_size=64):
        """Softmax probabilities, (texts, traits). Texts are sorted by length so that little padding is computed."""
        import torch

        items = self._encode(map(str, texts))
        order = np.argsort([len(i["input_ids"]) for i in items])
        result = np.empty((len(items), len(self.traits)))
        with torch.inference_mode(), _autocast(self.model.device.type, _use_bf16(self.settings.precision)):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = self.tokenizer.pad([items[i] for i in chosen], return_tensors="pt").to(self.model.device)
                result[chosen] = self.model(**batch).logits.float().softmax(-1).cpu().numpy()
        return result

    def save(self, folder):
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / "history.json").write_text(self.history.to_json(orient="records"), "utf-8")

    @classmethod
    def load(cls, folder, settings):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        traits = [model.config.id2label[i] for i in range(model.config.num_labels)]
        loaded = cls(settings, model, AutoTokenizer.from_pretrained(folder), traits)
        loaded.history = pd.DataFrame(json.loads((Path(folder) / "history.json").read_text("utf-8")))
        return loaded


def whole_checkpoint(folder):
    """The last checkpoint that was written to its end, or None; half-written ones are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / "trainer_state.json").exists():  # Trainer writes it last
            whole.append(path)
        else:
            shutil.rmtree(path)
    return str(max(whole, key=lambda p: int(p.name.split("-")[1]))) if whole else None


def _use_bf16(precision):
    """Whether to compute in bf16: "auto" does where the hardware multiplies it faster than fp32."""
    import torch

    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _autocast(device, enabled):
    import torch

    return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled)


def _trainer(encoder, train, validation, seed, folder):
    """A transformers.Trainer with the profile's schedule; batches hold texts of like length."""
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    s = encoder.settings
    steps = s.epochs * -(-len(train) // s.batch_size)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=s.epochs,
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=s.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(s.warmup_share * steps),
        weight_decay=s.weight_decay,
        train_sampling_strategy="group_by_length",
        bf16=_use_bf16(s.precision),
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=20,
        report_to="none",
        seed=seed,
        data_seed=seed,
    )
    collate = DataCollatorWithPadding(encoder.tokenizer)
    return Trainer(encoder.model, arguments, train_dataset=train, eval_dataset=validation, data_collator=collate)


def folder(kind, settings, rows, seed):
    """Where a trained classifier of `kind` ("tfidf", "encoder") on these rows is kept."""
    digest = hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()
    s = settings.classifier.model_dump(mode="json")
    wanted = (
        ("tfidf",)
        if kind == "tfidf"
        else ("encoder", "epochs", "batch", "learning", "warmup", "weight", "max", "frozen")
    )
    own = {k: v for k, v in s.items() if k.startswith((*wanted, "validation", "precision"))}
    own = {k: v for k, v in own.items() if "curve" not in k}
    mark = artifacts.fingerprint(kind, own, digest, seed, sys.modules[__name__])
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


def predict(model, frame):
    """The frame with columns predicted and confidence, and one probability column p_<trait> a trait."""
    p = model.predict_proba(list(frame["answer"]))
    best = p.argmax(1)
    columns = {f"p_{t}": p[:, i] for i, t in enumerate(model.traits)}
    return frame.assign(predicted=np.array(model.traits)[best], confidence=p[np.arange(len(p)), best], **columns)


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


def learning_curve(kind, settings, rows, test, sizes, seeds):
    """Test accuracy after training on the rows of so many topics: columns model, topics, seed, accuracy.

    TF-IDF keeps the regularisation in the middle of the profile's candidates, so that a point costs one fit.
    """
    c = settings.classifier.tfidf_c
    fixed = settings.classifier.model_copy(update={"tfidf_c": [c[len(c) // 2]]})
    settings = settings.model_copy(update={"classifier": fixed})
    found = []
    for size in sizes:
        for seed in range(seeds):
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
