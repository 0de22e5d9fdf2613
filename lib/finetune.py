"""A pretrained text encoder fine-tuned to tell traits apart: the paper's metric model, of any size.

The paper fine-tunes RoBERTa-base; `classifier.encoder = "FacebookAI/roberta-base"` does so here.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from lib import big5, encoders, hardware
from lib.errors import UserError

SAVED_EVERY = 100  # steps between checkpoints, from which an interrupted training goes on


class Pooled(torch.nn.Module):
    """A pretrained encoder whose token vectors are averaged and mapped to traits by one linear layer.

    Averaging is what sentence encoders were trained for; the first token's vector, the usual choice, did worse on
    validation topics.
    """

    def __init__(self, body, classes):
        super().__init__()
        self.body, self.config = body, body.config
        self.dropout = torch.nn.Dropout(0.1)
        self.head = torch.nn.Linear(body.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask, labels=None, **_):
        """Logits (texts, classes), and the loss where labels are given."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(self.dropout(encoders.average(states, attention_mask)))
        if labels is None:
            return {"logits": logits}
        return {"loss": torch.nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


class Encoder:
    """A pretrained text encoder with a classification head, fine-tuned above its lowest layers."""

    name = "encoder"

    def __init__(self, settings, model=None, tokenizer=None, traits=None):
        self.settings, self.model, self.tokenizer, self.traits = settings, model, tokenizer, traits

    def _encode(self, texts, labels=None):
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.settings.max_tokens)
        items = [{k: rows[k][i] for k in ("input_ids", "attention_mask")} for i in range(len(rows["input_ids"]))]
        for item, label in zip(items, labels if labels is not None else [], strict=labels is not None):
            item["labels"] = label
        return items

    def fit(self, train, validation, seed, folder):
        """Fine-tune on `train`; returns self. `folder`: where checkpoints go, so that a stopped run resumes.

        Raises UserError where the encoder cannot be fine-tuned with these settings.
        """
        encoders.check(self.settings.encoder)
        set_seed(seed)
        path = encoders.place(self.settings.encoder)
        self.traits = big5.ordered(train["trait"])
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = Pooled(AutoModel.from_pretrained(path), len(self.traits))
        set_dropout(self.model.body, self.settings.dropout)
        self.freeze(self.settings.frozen_layers)
        code = {t: i for i, t in enumerate(self.traits)}
        parts = [self._encode(p["answer"], [code[t] for t in p["trait"]]) for p in (train, validation)]
        trainer = _trainer(self, *parts, seed=seed, folder=Path(folder))
        trainer.train(resume_from_checkpoint=whole_checkpoint(Path(folder)))
        self.history = pd.DataFrame(trainer.state.log_history)
        self.model.eval()
        return self

    def freeze(self, layers):
        """Leave the embeddings and the lowest `layers` layers as pretrained. Raises UserError."""
        stack = encoders.stack(self.model.body)
        if layers > len(stack):
            raise UserError(f"classifier.frozen_layers = {layers}: the encoder has {len(stack)} layers; give fewer")
        for part in (self.model.body.embeddings, *stack[:layers]):
            part.requires_grad_(False)

    def predict_proba(self, texts, batch_size=64):
        """Softmax probabilities, (texts, traits). Texts are sorted by length so that little padding is computed."""
        items = self._encode(map(str, texts))
        order = np.argsort([len(i["input_ids"]) for i in items])
        result = np.empty((len(items), len(self.traits)))
        device = self.model.head.weight.device
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, _use_bf16(self.settings.precision)):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = self.tokenizer.pad([items[i] for i in chosen], return_tensors="pt").to(device)
                result[chosen] = self.model(**batch)["logits"].float().softmax(-1).cpu().numpy()
        return result

    def save(self, folder):
        folder = Path(folder)
        self.model.body.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in self.model.head.state_dict().items()}, folder / "head.safetensors")
        (folder / "traits.json").write_text(json.dumps(self.traits), "utf-8")
        (folder / "history.json").write_text(self.history.to_json(orient="records"), "utf-8")

    @classmethod
    def load(cls, folder, settings):
        folder = Path(folder)
        traits = json.loads((folder / "traits.json").read_text("utf-8"))
        model = Pooled(AutoModel.from_pretrained(folder), len(traits))
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
        if torch.cuda.is_available():
            model.cuda()
        loaded = cls(settings, model.eval(), AutoTokenizer.from_pretrained(folder), traits)
        loaded.history = pd.DataFrame(json.loads((folder / "history.json").read_text("utf-8")))
        return loaded


def set_dropout(model, share):
    """Have a model's own dropout layers hide this share of their inputs in training, whatever its config says."""
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = share


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
    """Whether to compute in bf16: "auto" does on a GPU."""
    return hardware.bf16() if precision == "auto" else precision == "bf16"


class ThinningCollator(DataCollatorWithPadding):
    """Pads a batch; while the model trains, it first leaves out a share of each text's tokens, drawn at random."""

    def __init__(self, tokenizer, share, model):
        super().__init__(tokenizer)
        self.share, self.model = share, model

    def __call__(self, items):
        return super().__call__([self.thin(i) for i in items] if self.model.training and self.share else items)

    def thin(self, item):
        """A text's item without the tokens left out. Those that the tokenizer adds stay, and one of the text's own."""
        ids = torch.tensor(item["input_ids"])
        own = (~torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))).nonzero().flatten()
        kept = torch.ones(len(ids), dtype=torch.bool)
        kept[own[torch.randperm(len(own))[: min(round(self.share * len(own)), len(own) - 1)]]] = False
        return item | {"input_ids": ids[kept].tolist(), "attention_mask": [1] * int(kept.sum())}


def _trainer(encoder, train, validation, seed, folder):
    """A transformers.Trainer with the profile's schedule; batches hold texts of like length."""
    s = encoder.settings
    steps = min(s.steps, s.epochs * -(-len(train) // s.batch_size))
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
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
        save_strategy="steps",
        save_steps=SAVED_EVERY,
        save_total_limit=1,
        logging_steps=max(1, steps // 25),
        report_to="none",
        seed=seed,
        data_seed=seed,
    )
    collate = ThinningCollator(encoder.tokenizer, s.token_dropout, encoder.model)
    return Trainer(encoder.model, arguments, train_dataset=train, eval_dataset=validation, data_collator=collate)
