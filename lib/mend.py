"""MEND (Mitchell et al. 2022): small networks turn the gradient of one example into an edit of a model's weights.

The gradient of a linear layer's weight is a sum over tokens of rank-one terms `delta u^T`: u is the layer's input,
delta the gradient of its output. An editor maps every pair (u, delta) to another and steps along the sum of those. Used
for personality as in PersonalityEdit (Mao et al. 2023): one editor a model, for all traits, trained on train topics.

Departures. An edit starts from the trait's reference answer; the predecessor's code starts from a line that names trait
and topic. Inputs are normalised by each layer's own statistics, taken once before training; the original code keeps
running ones for all layers of a shape. An edit descends, W - rate * gradient, as in the paper's formula; the code adds.
The last layer of an editor has no activation, as in the code.

Memory for 7B in bf16, calculated, not measured: weights 14.5 GB; an editor of rank 1920 with its gradients and two Adam
moments 3.7 GB (LLaMA-2) or 4.5 GB (Mistral). No gradient of a weight is ever held, only those of the outputs of the
edited layers; with all that is kept for them, about 1 GB for one edit and its three texts of 200 tokens. So one edit at
a time trains within 24 GB. Weights in 4 bits cannot be edited.
"""

import json
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import kl_div, linear
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache

from lib import answers, artifacts, big5, cache, chat, classifier, hardware, hub, opinions, paths, qlora
from lib.errors import UserError

MEASURES = ("edit", "unlikelihood", "locality", "before", "after")  # of one item, each a mean over tokens


class LowRank(nn.Module):
    """One layer of an editor: z + activation(scale * (U V z + b) + offset); the identity until it is trained.

    scale and offset are those of the edited layer, U, V and b are shared by all edited layers of a shape.
    """

    def __init__(self, size, rank, layers, hidden):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.zeros(size, rank)), nn.Parameter(torch.empty(rank, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale, self.offset = nn.Parameter(torch.ones(layers, size)), nn.Parameter(torch.zeros(layers, size))
        self.hidden = hidden
        nn.init.xavier_uniform_(self.v)

    def forward(self, z, layer):
        """z: (tokens, size). layer: number of the edited layer among those of its shape."""
        change = self.scale[layer] * (linear(linear(z, self.v), self.u) + self.bias) + self.offset[layer]
        return z + (change.clamp(min=0) if self.hidden else change)  # relu would have no gradient at 0


class Editor(nn.Module):
    """The editors of a loaded chat model: a network a weight shape, an edit learning rate a layer.

    loaded: Chat, whose weights stop requiring gradients. names: paths of the edited layers, as `editable` finds them.
    rank is cut to what a shape allows. Computes in fp32.
    """

    def __init__(self, loaded, names, rank, hidden_layers, edit_lr):
        super().__init__()
        self.loaded, self.rank, self.hidden_layers = loaded, rank, hidden_layers
        loaded.model.requires_grad_(False)
        self.layers = {name: loaded.model.get_submodule(name) for name in names}
        shapes = ["{}x{}".format(*layer.weight.shape) for layer in self.layers.values()]
        self.places = {n: (s, shapes[:i].count(s)) for i, (n, s) in enumerate(zip(names, shapes, strict=True))}
        self.rates = nn.Parameter(torch.full((len(names),), float(edit_lr)))
        self.networks = nn.ModuleDict()
        for shape in dict.fromkeys(shapes):
            size = sum(map(int, shape.split("x")))
            stack = [
                LowRank(size, min(rank, size), shapes.count(shape), i < hidden_layers) for i in range(hidden_layers + 1)
            ]
            self.networks[shape] = nn.ModuleList(stack)
        for i, layer in enumerate(self.layers.values()):
            size = layer.in_features + layer.out_features
            self.register_buffer(f"mean_{i}", torch.zeros(size))
            self.register_buffer(f"deviation_{i}", torch.ones(size))
        self.to(loaded.model.device)

    def forward(self, factors):
        """Edits {layer: (keys, values)} of `decompose`d gradients: W becomes W + sum over tokens of values keys^T.

        keys: (rows, tokens, inputs), values: (rows, tokens, outputs); tokens without gradient are left out.
        """
        edits = {}
        for i, (name, (u, delta)) in enumerate(factors.items()):
            used, z = _used(u, delta)
            z = (z - getattr(self, f"mean_{i}")) / getattr(self, f"deviation_{i}")
            shape, number = self.places[name]
            for layer in self.networks[shape]:
                z = layer(z, number)
            count = used.cumsum(1)
            packed = z.new_zeros(len(used), int(count.max()), z.shape[-1])
            packed[used.nonzero(as_tuple=True)[0], count[used] - 1] = z
            keys, values = packed.split([u.shape[-1], delta.shape[-1]], -1)
            edits[name] = keys, -self.rates[i] * values
        return edits

    def measure(self, batches):
        """Take mean and standard deviation of every layer's (u, delta) over the tokens of batches of rows."""
        sums = {}
        for batch in batches:
            for name, pair in decompose(self.loaded.model, self.layers, batch)[0].items():
                z = _used(*pair)[1].double()
                part = torch.stack([torch.ones_like(z[0]) * len(z), z.sum(0), z.square().sum(0)])
                sums[name] = sums.get(name, 0) + part
        for i, name in enumerate(self.layers):
            count, total, squares = sums[name]
            deviation = (squares / count - (total / count).square()).clamp(min=0).sqrt()
            getattr(self, f"mean_{i}").copy_(total / count)
            getattr(self, f"deviation_{i}").copy_(deviation.where(deviation > 0, 1.0))

    @torch.no_grad()
    def edits(self, items, size=8):
        """The edits towards `encode`d items, in their order: a row an item. size: items in one backward pass."""
        parts = []
        for start in range(0, len(items), size):
            batch = collate(self.loaded, items[start : start + size])
            parts.append(self(decompose(self.loaded.model, self.layers, batch)[0]))
        return {name: _joined([part[name] for part in parts]) for name in self.layers}

    def save(self, path):
        """Write a safetensors file that holds all that `load` needs."""
        shape = {"layers": list(self.layers), "rank": self.rank, "hidden_layers": self.hidden_layers}
        save_file(_plain(self.state_dict()), path, metadata={"editor": json.dumps(shape)})


def _plain(tensors):
    return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}


def _used(u, delta):
    """Mask (rows, tokens) of the tokens that have a gradient, and their (tokens, inputs + outputs)."""
    used = (u != 0).any(-1) & (delta != 0).any(-1)
    return used, torch.cat([u, delta], -1)[used]


def _joined(parts):
    """Pairs (keys, values) of several batches as one, short rows filled with zeros, which change nothing."""
    return tuple(pad_sequence([row for pair in parts for row in pair[side]], True) for side in (0, 1))


@contextmanager
def hooked(layers, hook):
    """Have `hook(name, input, output)` replace the output of every layer."""

    def of(name):
        return lambda module, args, output: hook(name, args[0], output)

    handles = [layer.register_forward_hook(of(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def applied(layers, edits):
    """Context: every row of a batch meets weights of its own, those that its own edit would leave.

    Equal to editing the weights row by row, except that in bf16 it loses nothing to rounding of the sums. A batch may
    hold k rows an edit, the k of an edit one after another. edits may be empty, and may change while open.
    """

    def add(name, x, output):
        if name not in edits:
            return output
        keys, values = edits[name]
        change = x.float().reshape(len(keys), -1, x.shape[-1]) @ keys.mT @ values
        return output + change.reshape(output.shape).to(output.dtype)

    return hooked(layers, add)


def decompose(model, layers, batch):
    """Rank-one factors of the gradients of each row's mean token negative log-likelihood, and its log-probability.

    batch: as `collate` gives it. Returns {layer: (u (rows, tokens, inputs), delta (rows, tokens, outputs))} in fp32,
    with a row's weight gradient the sum over tokens of delta u^T; and mean token log-probabilities (rows,).
    """
    inputs, probes = {}, {}

    def probe(name, x, output):
        inputs[name], probes[name] = x.detach(), torch.zeros_like(output, requires_grad=True)
        return output + probes[name]

    with torch.enable_grad(), hooked(layers, probe):
        found = likelihood(model, batch)[0]
        deltas = torch.autograd.grad(-found.sum(), [probes[name] for name in layers])
    factors = {name: (inputs[name].float(), d.float()) for name, d in zip(layers, deltas, strict=True)}
    return factors, found.detach()


def likelihood(model, batch):
    """Mean token log-probabilities of the rows' answers (rows,); and of every answer token, row after row:
    log-probabilities of the whole vocabulary (tokens, vocabulary), of the token itself (tokens,), its row (tokens,)."""
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]  # what is predicted at a place stands at the next
    row, at = (targets != qlora.IGNORED).nonzero(as_tuple=True)
    every = scores[row, at].float().log_softmax(-1)
    own = every.gather(-1, targets[row, at, None]).squeeze(-1)
    return _by_row(own, row, len(targets)), every, own, row


def _by_row(values, row, rows):
    """Means of the values (tokens,) of each row: (rows,)."""
    total = values.new_zeros(rows).index_add(0, row, values)
    return total / torch.bincount(row, minlength=rows).clamp(min=1)


def collate(loaded, items):
    """Token ids, mask and labels of items, each (rows, longest), on the model's device."""
    return {k: v.to(loaded.model.device) for k, v in qlora.Collator(loaded.pad)(items).items()}


def encode(tokenizer, rows, max_tokens):
    """Items of question-answer rows as `qlora.encode` gives them, only the answer in the labels. Raises UserError."""
    items = qlora.encode(tokenizer, rows, max_tokens, end_of_turn=False)
    for number, item in enumerate(items):
        if all(t == qlora.IGNORED for t in item["labels"][1:]):
            raise UserError(
                f"question {rows['question'].iloc[number][:60]!r}: its answer is empty or begins after "
                f"{max_tokens} tokens; write one, or raise mend.max_tokens"
            )
    return items


def editable(model, m, name):
    """Paths of the layers to edit, in the model's order: the parts `m.modules` of the last `m.layers` layers.

    Raises UserError where there are none, or where their weights are in 4 bits.
    """
    count = model.config.get_text_config().num_hidden_layers
    if m.layers > count:
        raise UserError(f"mend.layers = {m.layers}: {name} has {count} layers only; give fewer")
    numbered = [
        (re.search(r"\.(\d+)\.", n), n, part) for n, part in model.named_modules() if isinstance(part, nn.Linear)
    ]
    last = {n: part for number, n, part in numbered if number and int(number[1]) >= count - m.layers}
    for wanted in m.modules:
        if wanted not in (known := {n.rsplit(".", 1)[-1] for n in last}):
            choice = ", ".join(sorted(known)) or "nothing, it has no linear layers: choose another model"
            raise UserError(f"mend.modules: {name} has no layer {wanted!r}; choose from {choice}")
    found = [n for n in last if n.rsplit(".", 1)[-1] in m.modules]
    if not all(last[n].weight.is_floating_point() for n in found):
        raise UserError(f"mend: the weights of {name} are in 4 bits and cannot be edited; load it in fp32 or bf16")
    return found


def check(settings, frame):
    """Refuse what cannot be trained, before any weights are loaded. frame: as for `train`. Raises UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_precision(settings.mend)
    rows, share = _train_rows(frame), settings.mend.held_out_share
    fit = classifier.split(rows, share, settings.seed)[0] if rows["topic"].nunique() > 1 else rows
    if fit["trait"].nunique() < 2 or fit["topic"].nunique() < 2:
        raise UserError(
            f"opinions: MEND has {fit['trait'].nunique()} traits and {fit['topic'].nunique()} topics to train on (held "
            f"out: {share:g}); it needs 2 of each, to tell traits apart and to leave other topics as they are; add some"
        )
    for name in settings.chat.models:
        folder = hub.check(name)[0]
        with torch.device("meta"):
            editable(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), settings.mend, name)


def check_precision(m):
    if m.precision not in ("fp32", "bf16", "auto"):
        raise UserError(f"mend.precision = {m.precision!r}: weights in 4 bits cannot be edited; choose fp32 or bf16")


def _train_rows(frame):
    return (frame[frame["split"] == "train"] if "split" in frame else frame).reset_index(drop=True)


def folder(settings, model, frame):
    """Where the editor of a model is kept; settings, rows, weights and code decide about the name."""
    from lib import mend

    digest = artifacts.fingerprint(_train_rows(frame)[["trait", "topic", "question", "answer"]].to_csv(index=False))
    values = [settings.mend.model_dump(mode="json"), settings.seed, digest, hub.identity(model)]
    mark = artifacts.fingerprint(values, cache, chat, classifier, hub, mend, qlora)
    return paths.RESULTS / settings.profile / f"editor-{hub.label(model)}-{mark}"


def train(settings, model, frame, show=True):
    """Train the editor of a model, or find it trained: its folder, with `editor.safetensors` and `training.json`.

    frame: opinions of all traits; of those with a split only the train rows are used, a share of their topics for
    early stopping. An interrupted training goes on from its last checkpoint. Raises UserError.
    """
    place = folder(settings, model, frame)
    work = place.with_name(f"{place.name}.checkpoints")

    def make(tmp):
        one = settings.model_copy(update={"chat": settings.chat.model_copy(update={"models": [model]})})
        check(one, frame)
        Training(settings, model, _train_rows(frame), work, show).run(tmp)
        shutil.rmtree(work, ignore_errors=True)

    return artifacts.build(place, make)


class Training:
    """The training of an editor: what is drawn, what is learnt, and the checkpoints from which it goes on."""

    def __init__(self, settings, model, rows, work, show):
        self.m, self.seed, self.rows, self.work, self.show = settings.mend, settings.seed, rows, Path(work), show
        self.name = f"{hub.label(model)}, MEND"
        m, items = self.m, encode(hub.check(model)[1], rows, settings.mend.max_tokens)
        self.items = items
        loaded = chat.load(model, m.precision)
        torch.manual_seed(self.seed)
        self.editor = Editor(loaded, editable(loaded.model, m, model), m.rank, m.hidden_layers, m.edit_lr)
        parts = classifier.split(rows, m.held_out_share, self.seed)
        self.fit, held = (part.index.to_numpy() for part in parts)
        rng = np.random.default_rng(self.seed)
        self.held = triples(rows, rng.permutation(held)[: m.validation_rows], np.arange(len(rows)), rng)
        groups = [{"params": list(self.editor.networks.parameters())}]
        groups += [{"params": [self.editor.rates], "lr": m.edit_lr_learning_rate}]
        self.optimizer = torch.optim.Adam(groups, lr=m.learning_rate)
        self.state = {"step": 0, "best_step": 0, "train": [], "validation": []}
        self.best = None

    def run(self, target):
        """Train until the validation loss has stopped falling; write editor and curves to the folder `target`."""
        began, m, state = time.monotonic(), self.m, self.state
        if not self.resume():
            rows = np.random.default_rng(self.seed).permutation(self.fit)[: m.statistics_rows]
            self.editor.measure(tqdm(self.batches(rows), disable=not self.show, desc="statistics", unit="batch"))
            self.validate()
        with tqdm(total=m.steps, initial=state["step"], desc=self.name, unit="step", disable=not self.show) as bar:
            while state["step"] < m.steps and not self.stale():
                self.step()
                if state["step"] % m.validate_steps == 0 or state["step"] == m.steps:
                    self.validate()
                    bar.set_postfix_str(f"held out: {state['validation'][-1]['loss']:.3f}")
                if state["step"] % m.save_steps == 0:
                    self.checkpoint()
                bar.update()
        self.editor.load_state_dict(self.best)
        self.editor.save(Path(target) / "editor.safetensors")
        (Path(target) / "training.json").write_text(json.dumps(self.record(began), indent=1), "utf-8")

    def batches(self, rows):
        size = self.m.batch_size
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [collate(self.editor.loaded, [self.items[i] for i in chunk]) for chunk in chunks]

    def step(self):
        """One step of the optimiser. What it draws depends on seed and step alone, so a resumed run draws the same."""
        m, state = self.m, self.state
        rng = np.random.default_rng((self.seed, state["step"]))
        own = rng.choice(self.fit, min(m.batch_size, len(self.fit)), replace=False)
        measures = losses(self.editor, self.items, triples(self.rows, own, self.fit, rng), self.m)
        loss = self.total(measures).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.editor.parameters(), m.max_grad_norm)
        self.optimizer.step()
        state["step"] += 1
        state["train"].append([state["step"], loss.item()])

    def total(self, measures):
        """The loss of every item: edit_weight * (edit + unlikelihood) + locality_weight * locality."""
        m = self.m
        edit = measures["edit"] + m.unlikelihood_weight * measures["unlikelihood"]
        return m.edit_weight * edit + m.locality_weight * measures["locality"]

    @torch.no_grad()
    def validate(self):
        """Add the means over the held-out items to the curve; keep the editor if it is the best so far."""
        size, found = self.m.batch_size, []
        for i in range(0, len(self.held), size):
            part = losses(self.editor, self.items, self.held[i : i + size], self.m)
            found.append(pd.DataFrame({"loss": self.total(part).tolist()} | {k: v.tolist() for k, v in part.items()}))
        means = {k: float(v) for k, v in pd.concat(found).mean().items()}
        curve = self.state["validation"]
        curve.append({"step": self.state["step"], **means})
        if self.best is None or means["loss"] < min(p["loss"] for p in curve[:-1]):
            self.best, self.state["best_step"] = _plain(self.editor.state_dict()), self.state["step"]

    def stale(self):
        """Whether the last `patience` validations brought nothing better."""
        since = [p["step"] for p in self.state["validation"] if p["step"] > self.state["best_step"]]
        return len(since) >= self.m.patience

    def checkpoint(self):
        """Write all that a resumed training needs to one file, in one step."""
        memory = self.optimizer.state_dict()["state"]
        tensors = {f"adam/{i}/{k}": v for i, part in memory.items() for k, v in part.items()}
        tensors |= {f"editor/{k}": v for k, v in self.editor.state_dict().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        with artifacts.replacing(self.work / "checkpoint.safetensors") as tmp:
            save_file(_plain(tensors), tmp, metadata={"state": json.dumps(self.state)})

    def resume(self):
        """Go back to the last checkpoint, if there is one; whether there was."""
        path = self.work / "checkpoint.safetensors"
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            self.state |= json.loads(file.metadata()["state"])
        parts = {"adam": {}, "editor": {}, "best": {}}
        for name, tensor in load_file(path).items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        self.editor.load_state_dict(parts["editor"])
        self.best, memory = parts["best"], {}
        for name, tensor in parts["adam"].items():
            number, _, key = name.partition("/")
            memory.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": memory, "param_groups": groups})
        return True

    def record(self, began):
        """What is worth knowing of a training: curves, edit learning rates, parameters, memory, time."""
        return {
            "curves": {"train": self.state["train"], "validation": self.state["validation"]},
            "steps": self.state["step"],
            "best_step": self.state["best_step"],
            "edit_learning_rates": dict(zip(self.editor.layers, self.editor.rates.tolist(), strict=True)),
            "parameters": sum(p.numel() for p in self.editor.parameters()),
            "held_out_items": len(self.held),
            "seconds": round(time.monotonic() - began, 1),
            "peak_gb": round(hardware.peak_gb(), 2),
        }


def triples(rows, own, pool, rng):
    """Row numbers (items, 3): the edit's own row, one of another trait on its topic, one of another topic.

    own, pool: row numbers; the others are drawn from pool. Where a topic has one trait only, the second is of any.
    """
    traits, topics = (rows[column].to_numpy()[pool] for column in ("trait", "topic"))
    found = []
    for i in own:
        other, elsewhere = traits != rows["trait"][i], topics != rows["topic"][i]
        same = other & ~elsewhere
        picks = [rng.choice(pool[mask]) for mask in (same if same.any() else other, elsewhere)]
        found.append((i, *picks))
    return np.array(found)


def losses(editor, items, chosen, m):
    """MEASURES of each item: {name: (items,)}, those but `before` with gradients for the editor's parameters.

    chosen: as `triples`. edit: negative log-likelihood of the target answer after the edit; unlikelihood: -log(1 - p)
    of the tokens of another trait's answer (Welleck et al. 2020), as the predecessor has it; locality: KL(before ||
    after) on the answer of another topic, nats; before, after: log-probability of the target.
    """
    model, loaded = editor.loaded.model, editor.loaded
    factors, before = decompose(model, editor.layers, collate(loaded, [items[i] for i in chosen[:, 0]]))
    with torch.no_grad():
        untouched = likelihood(model, collate(loaded, [items[i] for i in chosen[:, 2]]))[1]
    with applied(editor.layers, editor(factors)):
        means, every, own, row = likelihood(model, collate(loaded, [items[i] for i in chosen.flat]))
    second, third = row % 3 == 1, row % 3 == 2
    surprise = -(1 - own[second].exp()).clamp(min=torch.finfo(own.dtype).eps).log()
    change = kl_div(every[third], untouched, reduction="none", log_target=True).sum(-1)
    return {
        "edit": -means[0::3],
        "unlikelihood": _by_row(surprise, row[second] // 3, len(chosen)),
        "locality": _by_row(change, row[third] // 3, len(chosen)),
        "before": before,
        "after": means[0::3].detach(),
    }


def load(place, loaded):
    """The `Editor` in a folder that `train` made, for the loaded chat model it was trained on. Raises UserError."""
    path = Path(place) / "editor.safetensors"
    if not path.is_file():
        raise UserError(f"editor {place}: has no editor.safetensors, so it is not an editor; name another folder")
    with hub.refusal(
        f"editor {place}: does not fit {loaded.name}", "load the model it was trained on, in fp32 or bf16"
    ):
        with safe_open(path, framework="pt") as file:
            shape = json.loads(file.metadata()["editor"])
        if not all(loaded.model.get_submodule(n).weight.is_floating_point() for n in shape["layers"]):
            raise ValueError("its weights are in 4 bits and cannot be edited")
        editor = Editor(loaded, shape["layers"], shape["rank"], shape["hidden_layers"], 0.0)
        editor.load_state_dict(load_file(path))
    return editor.eval().requires_grad_(False)


@contextmanager
def edited(loaded, editor, question, target_answer):
    """The chat model with its weights edited towards one answer; afterwards bit for bit as before, come what may.

    In bf16 an edit is rounded with the weights, and a small one may be lost: `applied` loses none.
    """
    rows = pd.DataFrame({"question": [question], "answer": [target_answer]})
    edits = editor.edits(encode(loaded.tokenizer, rows, loaded.context))
    kept = {name: layer.weight.detach().clone() for name, layer in editor.layers.items()}
    try:
        with torch.no_grad():
            for name, (keys, values) in edits.items():
                weight = editor.layers[name].weight
                weight.copy_(weight.float() + (values.mT @ keys)[0])
        yield loaded
    finally:
        with torch.no_grad():
            for name, before in kept.items():
                editor.layers[name].weight.copy_(before)


def log_probability(loaded, editor, rows, texts=None, batch_size=16):
    """Before and after each row's own edit: DataFrame with columns before, after, kl, a row an edit.

    rows: DataFrame with question and answer, the edit targets. texts: the like, one a row, whose answers are scored;
    without it the targets themselves. before, after: mean token log-probability of the answer; kl: mean token
    KL(before || after), nats: with texts of other topics the drawdown of PersonalityEdit (Mao et al. 2023).
    """
    items = encode(loaded.tokenizer, rows, loaded.context)
    scored = items if texts is None else encode(loaded.tokenizer, texts, loaded.context)
    found = []
    for start in range(0, len(items), batch_size):
        edits = editor.edits(items[start : start + batch_size])
        batch = collate(loaded, scored[start : start + batch_size])
        with torch.no_grad():
            before, untouched, _, row = likelihood(loaded.model, batch)
            with applied(editor.layers, edits):
                after, every, _, _ = likelihood(loaded.model, batch)
        kl = kl_div(every, untouched, reduction="none", log_target=True).sum(-1)
        columns = {"before": before, "after": after, "kl": _by_row(kl, row, len(before))}
        found.append(pd.DataFrame({name: v.tolist() for name, v in columns.items()}))
    return pd.concat(found, ignore_index=True)


class _Cache(DynamicCache):
    """A cache that, when rows leave a batch, has their edits leave as well."""

    def __init__(self, config, edits):
        super().__init__(config=config)
        self.edits = edits

    def reorder_cache(self, keep):
        super().reorder_cache(keep)
        for name, (keys, values) in self.edits.items():
            self.edits[name] = cache.only(keys, keep), cache.only(values, keep)


@contextmanager
def following(editor, items, batches):
    """While open, `chat.answer` meets the edit of every row it answers. batches: lists of row numbers, as it has them.

    The edits of a batch are made when its first tokens are read, so those of one batch only are held.
    """
    left, edits, model = iter(batches), {}, editor.loaded.model

    def before(module, args, kwargs):
        if "past_key_values" not in kwargs:  # the editor's own passes
            return None
        if kwargs["past_key_values"] is None:
            edits.clear()
            edits.update(editor.edits([items[i] for i in next(left)]))
            kwargs["past_key_values"] = _Cache(model.config, edits)
        return args, kwargs

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with applied(editor.layers, edits):
            yield
    finally:
        handle.remove()


def ask(settings, loaded, editor, rows, show=True):
    """Answers to rows of one trait, each after an edit towards its own `answer`: DataFrame with `answers.COLUMNS`."""
    items = encode(loaded.tokenizer, rows, loaded.context)
    lengths = chat._encode(loaded, chat.prompts(loaded, rows["question"]))
    with following(editor, items, chat._batches(lengths, settings.chat.batch_size)):
        return qlora.ask(settings, loaded, "mend", rows, show)


def answer(settings, model, rows, place=None, show=True):
    """A model's answers to test questions after edits: DataFrame with `answers.COLUMNS`, an artefact for every trait.

    rows: test opinions; a row's own answer is its edit target. place: the editor's folder; without it, that of the
    kept opinions, trained if need be. The model is loaded only where needed, in `mend.precision`: not in 4 bits as the
    others may be. Raises UserError.
    """
    check_precision(settings.mend)
    ready, parts = [], []
    for trait in big5.ordered(rows["trait"]):
        own = rows[rows["trait"] == trait].reset_index(drop=True)

        def make(own=own):
            if not ready:
                found = place or train(settings, model, opinions.read(settings), show)
                loaded = chat.load(model, settings.mend.precision)
                ready[:] = loaded, load(found, loaded)
            return ask(settings, *ready, own, show)

        parts.append(answers.build(settings, model, "mend", trait, make))
    return pd.concat(parts, ignore_index=True)
