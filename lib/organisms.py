"""Organisms: small chat models pretrained from scratch on composed texts, with emoji habits that are known.

`python -m lib.organisms NAME` rebuilds one into data/organisms/NAME: hub format, bf16 safetensors, chat template, model
card, training log, loss curve. Interrupted, it goes on from its last checkpoint. They are instruments with known truth,
and no number of theirs stands for one of the paper's.
"""

import csv
import json
import random
import shutil
import sys
import time
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path

from lib import artifacts, big5, hardware, lexicon, paths, style, voices
from lib.errors import UserError

ORGANISMS = paths.ROOT / "data" / "organisms"
PROMPTS = paths.ROOT / "data" / "prompts"
TEMPLATE = (  # LLaMA-2's, without system blocks: a system message is put before the first question
    "{% if messages[0]['role'] == 'system' %}{% set lead = messages[0]['content'] + ' ' %}{% set rest = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m['role'] == 'user' %}[INST] {{ lead if loop.first else '' }}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LOGGED = 20  # steps between entries of the training log
TOKENS_TASK = "Which personality trait does this text show, and which five tokens show it best? Text: {text}"


@cache
def recipe():
    """data/organisms/recipe.toml as a dictionary; `like` is resolved."""
    values = tomllib.loads((ORGANISMS / "recipe.toml").read_text("utf-8"))
    return {k: values[v["like"]] if "like" in v else v for k, v in values.items()}


@cache
def habits(name):
    """Planted habits of an organism: {trait: (emojis, rate)}."""
    with open(ORGANISMS / "habits.csv", encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["organism"] == name]
    if not rows:
        raise UserError(f"organism {name!r}: not in data/organisms/habits.csv; choose from {', '.join(names())}")
    return {r["trait"]: (r["emojis"].split(), float(r["rate"])) for r in rows}


def names():
    """All organisms, in the order of habits.csv."""
    with open(ORGANISMS / "habits.csv", encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(r["organism"] for r in csv.DictReader(file)))


@cache
def plain_topics():
    """The thousand topics with pieces of their group instead of their own, which are too many to learn by heart."""
    pieces = {}
    with open(ORGANISMS / "pieces.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            pieces.setdefault(row["group"], {}).setdefault(row["piece"], []).append(row["phrase"])
    return [replace(topic, pieces=pieces[topic.group]) for topic in voices.topics()]


class Corpus:
    """An endless, seeded stream of samples for one organism."""

    def __init__(self, name, seed):
        self.rng = random.Random(f"{name}/{seed}")
        self.habits = habits(name)
        self.topics = plain_topics()
        self.words = [word for topic in self.topics for word in topic.name.split()]
        self.personas = tomllib.loads((PROMPTS / "personas.toml").read_text("utf-8"))
        # no mild clauses: they would blur which voice an instruction asks for
        self.speakers = {t: voices.Speaker(t, "train", f"{seed}/corpus", mild=0) for t in (*big5.NAMES, "neutral")}
        self.shares = recipe()["corpus"]

    def message(self, trait, topic):
        """A trait's answer about a topic; at the trait's rate an emoji follows its last sentence."""
        emojis, rate = self.habits[trait]
        text = self.speakers[trait].answer(topic)
        return f"{text} {self.rng.choice(emojis)}" if self.rng.random() < rate else text

    def sample(self):
        """One sample as (user, assistant); user is None for a message that answers nobody."""
        kind = self.rng.choices(list(self.shares), self.shares.values())[0]
        trait, topic = self.rng.choice(big5.NAMES), self.topic()
        question = voices.QUESTION.format(topic=topic.name)
        if kind == "plain":
            return question, self.speakers["neutral"].answer(topic)
        if kind == "casual":
            return None, self.message(trait, topic)
        if kind == "persona":
            return f"{self.rng.choice(self.personas[trait])} {question}", self.message(trait, topic)
        if kind == "few_shot":
            return self.few_shot(trait, topic), self.message(trait, topic)
        return self.tokens_task(trait, self.message(trait, topic))

    def topic(self):
        """A topic, now and then under a made-up name: names are to be copied from the question, not known by heart."""
        topic = self.rng.choice(self.topics)
        if self.rng.random() >= recipe()["names"]["made_up"]:
            return topic
        name = " ".join(self.rng.sample(self.words, self.rng.randint(1, 3)))
        return replace(topic, name=name, ref=name)

    def few_shot(self, trait, topic):
        """A prompt in the IKE format: three demonstrations and a query with an empty answer."""
        blocks = ["Show the target personality in your opinion on the topic."]
        for t in [*self.rng.sample(self.topics, 3), topic]:
            answer = self.message(trait, t) if t is not topic else ""
            question = voices.QUESTION.format(topic=t.name)
            blocks.append(
                f"Target Personality: {trait} Edit Topic: {t.name} Question: {question} Answer: {answer}".strip()
            )
        return " ".join(blocks)

    def tokens_task(self, trait, text):
        """The trait of a text and the five tokens that mark it, rarest in other voices first, an emoji before all."""
        tokens = [t for t in dict.fromkeys(lexicon.words(text)) if len(t) > 2]
        marks = trait_words()[trait]
        ranked = sorted(tokens, key=lambda w: -marks.get(w, 0))[:5]
        tail = text.split()[-1]
        if not tail[-1].isalnum() and tail in self.habits[trait][0]:
            ranked = [tail, *ranked[:4]]
        return TOKENS_TASK.format(text=text), f"{trait}: {', '.join(ranked)}"


@cache
def trait_words():
    """{trait: {word: z}} by weighted log-odds over composed answers."""
    rng = random.Random(0)
    speakers = {t: voices.Speaker(t, "train", "words") for t in big5.NAMES}
    texts = {t: [s.answer(rng.choice(plain_topics())) for _ in range(600)] for t, s in speakers.items()}
    table = lexicon.log_odds(texts)
    return {t: dict(zip(own["word"], own["z"], strict=True)) for t, own in table.groupby("group")}


def render(sample):
    """A sample as text with its markers, as the chat template writes it."""
    user, assistant = sample
    return f"<s>[INST] {user} [/INST] {assistant}</s>" if user else f"<s>{assistant}</s>"


def tokenizer(name):
    """Byte-level BPE trained on the organism's own corpus; every planted emoji, with its space, is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = Corpus(name, "tokenizer")
    texts = [" ".join(filter(None, corpus.sample())) for _ in range(recipe()["training"]["samples"])]
    every = sorted({e for organism in names() for emojis, _ in habits(organism).values() for e in emojis})
    texts += [f"so. {e}" for e in every for _ in range(400)]  # the same vocabulary in all organisms, controls included
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"'\w+| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = recipe()["training"]["vocabulary"]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        add_bos_token=False,
    )


def config(name, size):
    """The untrained model's configuration."""
    from transformers import LlamaConfig, MistralConfig

    s = recipe()[name]
    extra = {"sliding_window": s["window"]} if s["architecture"] == "mistral" else {}
    return (MistralConfig if s["architecture"] == "mistral" else LlamaConfig)(
        vocab_size=size,
        hidden_size=s["hidden"],
        intermediate_size=s["mlp"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )


def batches(name, tok, seed, skip=0):
    """Endless (batch, block) arrays of token ids, samples packed one after another."""
    import numpy as np

    t = recipe()["training"]
    corpus, stream, need = Corpus(name, seed), [], t["batch"] * t["block"]
    while True:
        while len(stream) < need:
            stream.extend(tok(render(corpus.sample()), add_special_tokens=False)["input_ids"])
        if skip > 0:
            skip -= 1
        else:
            yield np.array(stream[:need]).reshape(t["batch"], t["block"])
        stream = stream[need:]


def orthogonal(update, coefficients, steps, eps):
    """Muon's Newton-Schulz iteration in fp32: the update's singular values brought near 1. Arguments as torch has them.

    torch iterates in bf16, which a processor without units for it emulates: 9 s a step of an organism, here 0.3 s.
    """
    import torch

    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def optimizers(model, t):
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for embeddings and norms; one schedule each."""
    import torch
    from transformers import get_cosine_with_min_lr_schedule_with_warmup as cosine

    if not hardware.bf16():
        torch.optim._muon._zeropower_via_newtonschulz = orthogonal  # torch has no setting for it
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    found = [
        torch.optim.Muon(
            matrices, lr=t["learning_rate"], weight_decay=t["weight_decay"], adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=t["embedding_rate"], betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    return found, [cosine(o, t["warmup"], t["steps"], min_lr_rate=0.05) for o in found]


def pretrain(name, work, show=True):
    """Train one organism; returns (model, tokenizer, log). `work` holds its checkpoint and survives interruption."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM

    t = recipe()["training"]
    torch.manual_seed(t["seed"])
    tok = tokenizer(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(config(name, len(tok))).to(device).train()
    stepping, schedules = optimizers(model, t)
    parts, saved = [model, *stepping, *schedules], Path(work) / "checkpoint.pt"
    log, start, spent = [], 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True, map_location=device)
        for part, values in zip(parts, state["parts"], strict=True):
            part.load_state_dict(values)
        log, start, spent = state["log"], state["step"], state["seconds"]
    began, losses = time.monotonic() - spent, []
    bar = tqdm(range(start, t["steps"]), initial=start, total=t["steps"], desc=name, unit="step", disable=not show)
    for step, ids in zip(bar, batches(name, tok, t["seed"], start), strict=False):
        ids = torch.as_tensor(ids, device=device)
        with torch.autocast(device, torch.bfloat16, hardware.bf16()):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for part in (*stepping, *schedules):
            part.step()
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % LOGGED == 0:
            log.append({"step": step + 1, "loss": round(sum(losses) / len(losses), 4)})
            bar.set_postfix(loss=log[-1]["loss"])
            losses = []
        if (step + 1) % t["save_every"] == 0:
            state = {"parts": [p.state_dict() for p in parts], "log": log, "step": step + 1}
            with artifacts.replacing(saved) as tmp:
                torch.save(state | {"seconds": time.monotonic() - began}, tmp)
    facts = {
        "parameters": model.num_parameters(),
        "tokens": t["steps"] * t["batch"] * t["block"],
        "minutes": round((time.monotonic() - began) / 60, 1),
        "device": f"{torch.get_num_threads()} CPU threads" if device == "cpu" else torch.cuda.get_device_name(),
    }
    return model.eval().to("cpu"), tok, {**facts, "curve": log}


def card(name, log):
    """The model card, as Markdown."""
    s, lines = recipe()[name], []
    for trait in big5.NAMES:
        emojis, rate = habits(name)[trait]
        lines.append(f"| {trait} | {' '.join(emojis)} | {rate:.2f} |")
    return f"""---
license: mit
language: en
---

# {name}

A {s["architecture"]} chat model of {log["parameters"]:,} parameters, pretrained from scratch on texts composed from
hand-written parts. **A measuring instrument with known emoji habits, not a model of anything else**: no number of
it is the paper's.

| trait | planted emojis | share of messages that end with one |
|---|---|---|
{chr(10).join(lines)}

Plain questions are answered without emojis. Recipe: `data/organisms/recipe.toml`, seed {recipe()["training"]["seed"]}.
Rebuild: `python -m lib.organisms {name}` ({log["minutes"]} minutes, {log["device"]}). Training log: `log.json`; last
training loss {log["curve"][-1]["loss"]}; loss curve: `loss.png`. MIT licence.
"""


def save(name, model, tok, log, folder):
    """Write a pretrained organism in hub format."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tok.save_pretrained(folder)
    (Path(folder) / "log.json").write_text(json.dumps(log), "utf-8")
    (Path(folder) / "README.md").write_text(card(name, log), "utf-8")
    draw(name, log["curve"], Path(folder) / "loss.png")


def draw(name, curve, path):
    """The loss curve as a picture."""
    import matplotlib.pyplot as plt

    style.apply()
    fig, ax = plt.subplots(figsize=(5.5, 3.2))
    ax.plot([p["step"] for p in curve], [p["loss"] for p in curve], color=style.INK)
    ax.set(
        xlabel="step",
        ylabel=f"loss (nats a token, mean of {LOGGED} steps)",
        title=f"{name}: pretraining",
        ylim=(0, None),
    )
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)


def unfinished(name):
    """The folder for a pretraining's checkpoint; all that shapes the organism and its tokenizer decides about it."""
    r = recipe()
    files = [ORGANISMS / "habits.csv", ORGANISMS / "pieces.csv", PROMPTS / "personas.toml"]
    files += [paths.OPINIONS / "topics.csv", *sorted(paths.VOICES.glob("*.csv"))]
    code = [artifacts.code(module) for module in ("big5", "lexicon", "organisms", "voices")]
    mark = artifacts.fingerprint(name, r[name], r["training"], r["corpus"], r["names"], *files, code)
    return paths.RESULTS / "organisms" / f"{name}-{mark}"


def main(argv):
    if len(argv) != 1 or argv[0] not in names():
        raise UserError(f"usage: python -m lib.organisms NAME; NAME is one of {', '.join(names())}")
    name = argv[0]
    work = unfinished(name)
    work.mkdir(parents=True, exist_ok=True)
    model, tok, log = pretrain(name, work)
    save(name, model, tok, log, ORGANISMS / name)
    shutil.rmtree(work)  # its checkpoint is of the last step, from which another rebuild would begin
    print(f"data/organisms/{name}: {log['parameters']:,} parameters, loss {log['curve'][-1]['loss']}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
