"""QLoRA (Dettmers et al. 2023): one low-rank adapter per model and trait, on a base that is quantised to NF4.

Questions and answers go through the model's own chat template, without a trait's name; only the answer is in the loss.
Whether the end of the turn is in it as well is the setting `qlora.end_of_turn`.
"""

import json
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from lib import answers, artifacts, big5, cache, chat, classifier, emojis, finetune, hardware, hub, paths
from lib.errors import UserError

IGNORED = -100  # a label that the loss leaves out
BY_MODEL = ("steps", "learning_rate")  # settings that a model may have of its own


def encode(tokenizer, rows, max_tokens, end_of_turn):
    """Token ids and labels of question-answer rows: list of {"input_ids", "labels"}, unpadded.

    rows: DataFrame with question and answer. Labels are -100 in the prompt and, unless `end_of_turn`, in all that the
    template writes after the answer. Rows longer than `max_tokens` are cut at the end.
    """
    pairs = list(zip(rows["question"], rows["answer"], strict=True))
    asked = hub.render(tokenizer, [[{"role": "user", "content": q}] for q, _ in pairs])
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    whole, tail = hub.render(tokenizer, turns, answered=True), len(hub.tail(tokenizer)) if pairs else 0
    items = []
    for prompt, text, (_, answer) in zip(asked, whole, pairs, strict=True):
        # an assistant's header may end in a blank, and the tail may hold what an answer says
        start = text.rindex(answer.strip(), len(prompt.rstrip()), len(text) - tail)
        stop = start + len(answer.strip()) if not end_of_turn else len(text)
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = coded["input_ids"][:max_tokens], coded["offset_mapping"][:max_tokens]
        labels = [t if low < stop and high > start else IGNORED for t, (low, high) in zip(ids, spans, strict=True)]
        items.append({"input_ids": ids, "labels": labels})
    return items


class Collator:
    """Pads rows on the right: ids with `pad`, labels with -100, and the mask that says which is which."""

    def __init__(self, pad):
        self.pad = pad

    def __call__(self, items):
        ids = [torch.tensor(i["input_ids"]) for i in items]
        labels = [torch.tensor(i["labels"]) for i in items]
        return {
            "input_ids": pad_sequence(ids, True, self.pad),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], True, 0),
            "labels": pad_sequence(labels, True, IGNORED),
        }


class Progress(TrainerCallback):
    """One bar for a training, with the time that is left; transformers' own prints a table for every adapter.

    After each of the optimiser steps `keep` it saves the adapter in a folder of its own under `folder`.
    """

    def __init__(self, name, show, keep=(), folder=None):
        self.name, self.show, self.keep, self.folder = name, show, keep, folder

    def on_train_begin(self, args, state, control, **_):
        first = {"initial": state.global_step, "total": state.max_steps}
        self.bar = tqdm(**first, desc=self.name, unit="step", disable=not self.show)

    def on_step_end(self, args, state, control, model=None, **_):
        self.bar.update()
        if state.global_step in self.keep:
            model.save_pretrained(self.folder / f"{state.global_step:06d}", safe_serialization=True)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            self.bar.set_postfix(loss=f"{float(logs['loss']):.2f}")

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


def lora(settings):
    """PEFT's LoraConfig of a profile's settings."""
    from peft import LoraConfig

    q = settings.qlora
    targets = q.target_modules[0] if q.target_modules == ["all-linear"] else list(q.target_modules)
    return LoraConfig(
        r=q.rank, lora_alpha=q.alpha, lora_dropout=q.dropout, bias="none", target_modules=targets, task_type="CAUSAL_LM"
    )


def check(settings, frame):
    """Refuse what cannot be trained, before any weights are loaded. Raises UserError.

    frame: opinions with columns trait, topic, split, answer.
    """
    check_rows(settings, frame)
    labels = [hub.label(name) for name in settings.chat.models]
    if twice := [x for x in labels if labels.count(x) > 1]:
        raise UserError(f"chat.models: two models are called {twice[0]}; rename one folder")
    for name in settings.chat.models:
        check_layers(settings.qlora, name, linear_layers(hub.check(name)[0]))


def check_rows(settings, frame):
    """Refuse tuning texts that are missing, too few or not free of emojis."""
    train = frame[frame["split"] == "train"]
    for trait in frame["trait"].unique():
        own = train[train["trait"] == trait]
        if own.empty:
            raise UserError(f"opinions: no train rows for {trait}; add some, or remove the trait from the test file")
        if own["topic"].nunique() < 2:
            raise UserError(f"opinions: train rows for {trait} are of one topic only; add more, some are held out")
        held = own["answer"].map(lambda text: bool(emojis.find(text))).sum()
        if held and not settings.opinions.allow_emoji:
            raise UserError(f"opinions: {held} train rows for {trait} hold an emoji; remove it, or set allow_emoji")


def check_layers(q, name, sizes):
    """Refuse target modules that a model does not have and a rank that they do not allow. sizes: {layer: dimension}."""
    every = q.target_modules == ["all-linear"]
    for target in [] if every else q.target_modules:
        if target not in sizes:
            known = ", ".join(sorted(sizes))
            raise UserError(f"qlora.target_modules: {name} has no layer {target!r}; choose from {known}, all-linear")
    if not sizes:
        raise UserError(f"qlora: {name} has no linear layers that could be adapted; choose another model")
    used = {layer: size for layer, size in sizes.items() if every or layer in q.target_modules}
    least = min(used, key=used.get)
    if q.rank > used[least]:
        raise UserError(
            f"qlora.rank = {q.rank}: layer {least} of {name} has {used[least]} rows or columns only; lower the rank"
        )


def linear_layers(folder):
    """{last part of a linear layer's name: its smaller dimension}, from the configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings()
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return {name.rsplit(".", 1)[-1]: min(m.in_features, m.out_features) for name, m in layers}


def of_model(settings, key, model):
    """What a training of a model takes of `qlora.steps` or `qlora.learning_rate`: its own value, or any other's."""
    table = getattr(settings.qlora, key)
    return table.get(hub.label(model), table["other"])


def values(settings, model):
    """The section qlora as a dictionary, of the tables by model only what this model takes."""
    return settings.qlora.model_dump(mode="json") | {key: of_model(settings, key, model) for key in BY_MODEL}


def folder(settings, model, trait, rows):
    """Where the adapter of a model and trait is kept; settings, rows, weights and code decide about the name."""
    digest = artifacts.fingerprint(rows[["question", "answer"]].to_csv(index=False))
    shaped = [values(settings, model), settings.chat.precision, settings.seed]
    mark = artifacts.fingerprint(shaped, digest, hub.identity(model), *_code())
    return paths.RESULTS / settings.profile / f"adapter-{hub.label(model)}-{trait}-{mark}"


def _code():
    from lib import qlora

    return cache, chat, classifier, finetune, hub, qlora


def train(settings, model, trait, rows, show=True):
    """Train the adapter of a model and trait, or find it trained: its folder, in PEFT's format, with `training.json`.

    rows: the trait's train rows. A share of their topics is held out for the second loss curve. In the folder `steps`
    are the adapters of the steps `qlora.keep`. An interrupted training goes on from its last checkpoint. Raises
    UserError.
    """
    place = folder(settings, model, trait, rows)
    work = place.with_name(f"{place.name}.checkpoints")

    def make(tmp):
        progress = Progress(f"{hub.label(model)}, {trait}", show, settings.qlora.keep, work / "kept")
        fit(settings, model, rows, work, tmp, progress)
        if (work / "kept").exists():
            shutil.move(work / "kept", tmp / "steps")
        shutil.rmtree(work, ignore_errors=True)

    return artifacts.build(place, make)


def course(place):
    """{optimiser step: folder} of the adapters that a training has kept, the finished one last. place: its folder."""
    kept = {int(p.name): p for p in sorted((Path(place) / "steps").glob("*"))}
    facts = json.loads((Path(place) / "training.json").read_text("utf-8"))
    return kept | {facts["steps"]: Path(place)}


def fit(settings, model, rows, work, target, progress):
    """Train on rows, checkpoints in `work`, and write adapter and `training.json` to the folder `target`."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    q, began = settings.qlora, time.monotonic()
    set_seed(settings.seed)
    loaded = chat.load(model, settings.chat.precision)
    base = prepare_model_for_kbit_training(loaded.model, use_gradient_checkpointing=q.gradient_checkpointing)
    tuned = get_peft_model(base, lora(settings))
    parts = [
        encode(loaded.tokenizer, part, q.max_tokens, q.end_of_turn)
        for part in classifier.split(rows, q.held_out_share, settings.seed)
    ]
    trainer = Trainer(
        tuned,
        arguments(settings, model, len(parts[0]), work),
        train_dataset=parts[0],
        eval_dataset=parts[1],
        data_collator=Collator(loaded.pad),
        callbacks=[progress],
    )
    for own in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(own)
    trainer.train(resume_from_checkpoint=finetune.whole_checkpoint(Path(work)))
    if trainer.state.global_step % trainer.args.eval_steps:  # the curve ends where the training does
        trainer.evaluate()
    tuned.save_pretrained(target, safe_serialization=True)
    facts = record(trainer, parts[0], tuned, began)
    (Path(target) / "training.json").write_text(json.dumps(facts, indent=1), "utf-8")


def arguments(settings, model, rows, work):
    """TrainingArguments of a profile's settings, for the `steps` of a model unless the epochs end first."""
    q, gpu = settings.qlora, torch.cuda.is_available()
    most = min(of_model(settings, "steps", model), int(np.ceil(q.epochs * rows / (q.batch_size * q.accumulation))))
    often = max(1, most // 20)
    return TrainingArguments(
        str(work),
        max_steps=most,
        per_device_train_batch_size=q.batch_size,
        per_device_eval_batch_size=q.batch_size,
        gradient_accumulation_steps=q.accumulation,
        activation_checkpointing=q.gradient_checkpointing,
        learning_rate=of_model(settings, "learning_rate", model),
        lr_scheduler_type=q.schedule,
        warmup_steps=round(q.warmup_share * most),
        weight_decay=q.weight_decay,
        max_grad_norm=q.max_grad_norm,
        optim=q.optimizer if gpu or "8bit" not in q.optimizer else "adamw_torch",  # 8-bit optimisers need a GPU
        bf16=hardware.bf16(),
        use_cpu=not gpu,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=-(-most // 2),
        eval_on_start=True,
        logging_steps=often,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=q.save_steps,
        save_total_limit=1,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        seed=settings.seed,
        data_seed=settings.seed,
    )


def record(trainer, items, model, began):
    """What is worth knowing of a training: losses, parameters, memory, time."""
    log = pd.DataFrame(trainer.state.log_history)
    curves = {
        name: log.loc[log[column].notna(), ["step", column]].to_numpy().tolist()
        for name, column in (("train", "loss"), ("held_out", "eval_loss"))
    }
    trainable, every = model.get_nb_trainable_parameters()
    return {
        "curves": curves,
        "trainable": trainable,
        "parameters": every,
        "steps": trainer.state.global_step,
        "tokens_in_loss": sum(t != IGNORED for i in items for t in i["labels"]),
        "seconds": round(time.monotonic() - began, 1),
        "peak_gb": round(hardware.peak_gb(), 2),
    }


def answer(settings, model, method, rows, adapters=None, show=True):
    """A model's answers to test questions: DataFrame with `answers.COLUMNS`, an artefact for every trait.

    rows: test opinions; the question of every row is asked once, so the untuned model is asked as often as the tuned
    ones together. method: "base", or "peft" with adapters {trait: folder}. The model is loaded only where needed.
    """
    loaded, parts = [], []
    for trait in big5.ordered(rows["trait"]):
        own = rows[rows["trait"] == trait]

        def make(own=own, trait=trait):
            loaded[:] = loaded or [chat.load(model, settings.chat.precision)]
            with chat.adapted(loaded[0], (adapters or {}).get(trait)) as speaker:
                return ask(settings, speaker, method, own, show)

        parts.append(answers.build(settings, model, method, trait, make))
    return pd.concat(parts, ignore_index=True)


def ask(settings, loaded, method, rows, show=True, within=("trait",), **how):
    """A loaded chat model's answers to the questions of rows: DataFrame with `answers.COLUMNS`, in the rows' order.

    how: as `chat.answer` takes it, beside the profile's settings. The draws of a row are those of the run's seed, the
    method, its trait and its number among the rows that are alike in the columns `within`.
    """
    c = settings.chat
    seeds = {t: zlib.crc32(f"{settings.seed}/{method}/{t}".encode()) for t in rows["trait"].unique()}
    given = chat.answer(
        loaded,
        rows["question"],
        max_new_tokens=c.max_new_tokens,
        temperature=c.temperature,
        top_p=c.top_p,
        seed=list(zip(rows["trait"].map(seeds), rows.groupby(list(within)).cumcount(), strict=True)),
        batch_size=c.batch_size,
        show=show,
        **how,
    )
    facts = rows[["trait", "topic", "question"]].reset_index(drop=True)
    return facts.assign(model=hub.label(loaded.name), method=method).join(given)[list(answers.COLUMNS)]
