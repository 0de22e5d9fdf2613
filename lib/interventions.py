"""Cause, not correlation: units of one model set to what they are in another, while it writes.

Two directions: "off", the tuned model's units set to the base's activations, and "on", the base's set to the tuned
model's. Both models read the same tokens side by side, and at every token the chosen units of the one that writes (the
recipient) take the other's (the donor's) value for that very context. A mean activation would be simpler, but it would
also flatten whatever else a unit does; so patched, a unit is exactly as it would be without (or with) tuning, and
setting all hidden dimensions of the last layer gives the donor's own answers token for token.
"""

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lib import artifacts, cache, chat, emojis, hub, intervals, likelihood, mediation, neurons, paths, ratios
from lib.errors import UserError

DIRECTIONS = ("off", "on")
COLUMNS = ("model", "trait", "intervention", "neurons", "k", "esr_response", "low", "high", "perplexity")


def attribution(recipient, donor, questions, texts, site, tokens=2048):
    """What setting each unit to the donor's activation would do to the emoji: DataFrame, a row a unit.

    Attribution patching (Nanda 2023; Syed et al. 2023), the first-order estimate of activation patching: the difference
    of activations times the gradient of the log-odds of an emoji after the text's last sentence, summed over tokens and
    averaged over texts, in nats. questions, texts: what is read, the texts without their emojis. tokens: of a batch.
    Columns layer, unit, effect, size (mean absolute activation in the recipient), change (donor minus recipient at the
    last sentence end).
    """
    rows = [p[-1] for q, t in zip(questions, texts, strict=True) if (p := mediation.prefixes(recipient, q, t))]
    if not rows:
        raise UserError("interventions: no text with a sentence to select units on; raise interventions.train_topics")
    sums, blank = {}, mediation.blank_token(recipient.tokenizer)
    for chosen in likelihood.batches([{"input_ids": row} for row in rows], tokens):
        own = [rows[i] for i in chosen]
        ids, mask, ends = _batch(recipient, own, blank)
        with torch.no_grad():
            _, given = _run(donor, site, ids, mask, ends)
        scores, kept = _run(recipient, site, ids, mask, ends)
        slopes = torch.autograd.grad(_log_odds(recipient, scores, len(own), blank).sum(), list(kept.values()))
        for (number, x), slope in zip(kept.items(), slopes, strict=True):
            found = _measured(x.detach(), given[number], slope, mask, [len(r) - 1 for r in own])
            sums[number] = sums.get(number, 0) + found
    read = sum(map(len, rows)) + len(rows) * (blank is not None)
    counts = np.array([len(rows), read, len(rows)])[:, None]
    parts = {n: pd.DataFrame((s / counts).T, columns=["effect", "size", "change"]) for n, s in sorted(sums.items())}
    return pd.concat(parts, names=["layer", "unit"]).reset_index()


def _batch(speaker, rows, blank):
    """Ids and mask of rows with a blank after each, and the places to read at: before it, then after it."""
    rows = [[*r, blank] if blank is not None else list(r) for r in rows]
    ids = pad_sequence([torch.tensor(r) for r in rows], True, speaker.pad).to(speaker.model.device)
    mask = pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], True).to(ids.device)
    last = [len(r) - 1 for r in rows]
    if blank is None:
        return ids, mask, list(enumerate(last))
    return ids, mask, [(i, n - 1) for i, n in enumerate(last)] + list(enumerate(last))


def _run(speaker, site, ids, mask, ends):
    """Log-probabilities of the next token at some places, and the activations of every layer that led there."""
    kept = {}
    watch = {n: lambda x, n=n: kept.__setitem__(n, x) for n in range(len(neurons.layers(speaker)))}
    extra = {"use_cache": False} if "use_cache" in speaker.arguments else {}
    start = speaker.model.get_input_embeddings().register_forward_hook(lambda _, args, out: _leaf(out))
    try:
        with mediation.only_at(speaker, ends), neurons.hooked(speaker, site, watch):
            scores = speaker.model(input_ids=ids, attention_mask=mask, **extra).logits[0]
    finally:
        start.remove()
    return scores.float().log_softmax(-1), kept


def _leaf(x):
    """Where gradients start, whether or not the weights below have any."""
    return x.detach().requires_grad_() if torch.is_grad_enabled() else x


def _log_odds(speaker, scores, count, blank):
    """Log-odds of an emoji next, at once or after a blank: tensor (texts,). scores: as `_batch` orders its places.

    From log-probabilities throughout, so that a probability of 1 still has a slope.
    """
    is_emoji = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    is_emoji[[i for i in speaker.emoji_tokens if i < len(is_emoji)]] = True
    if blank is None:
        return scores[:, is_emoji].logsumexp(1) - scores[:, ~is_emoji].logsumexp(1)
    first, second, other = scores[:count], scores[count:], ~is_emoji
    rest = other.clone()
    rest[blank] = False
    yes = torch.logaddexp(first[:, is_emoji].logsumexp(1), first[:, blank] + second[:, is_emoji].logsumexp(1))
    no = torch.logaddexp(first[:, rest].logsumexp(1), first[:, blank] + second[:, other].logsumexp(1))
    return yes - no


def _measured(own, other, slope, mask, last):
    """Sums over a batch: array (3, units) of effects, absolute activations and changes at the last sentence end."""
    own, other, slope, inside = own.float(), other.float(), slope.float(), mask[..., None].float()
    change = other - own
    at = change[torch.arange(len(last)), last]
    found = (change * slope * inside).sum((0, 1)), (own.abs() * inside).sum((0, 1)), at.sum(0)
    return torch.stack(found).cpu().numpy().astype(float)


def choose(found, kind, k, direction, seed=0, near=20):
    """k units of an attribution table: array (k, 2) of (layer, unit).

    selected: whose patching should lower the emoji's log-odds most ("off") or raise them most ("on"). changed: whose
    activation differs most between the models at sentence ends, as one would find units without a gradient. random:
    for each selected unit one drawn from the `near` ones of the nearest size that are not selected. all: all.
    """
    pairs = found[["layer", "unit"]].to_numpy()
    if kind == "all":
        return pairs
    if kind == "changed":
        return pairs[np.argsort(-found["change"].abs().to_numpy(), kind="stable")[:k]]
    sign = 1 if direction == "off" else -1
    best = np.argsort(sign * found["effect"].to_numpy(), kind="stable")[:k]
    return pairs[best if kind == "selected" else _matched(found["size"].to_numpy(), best, seed, near)]


def _matched(size, best, seed, near):
    """For each of the units `best` another one of like size, drawn without repeats: numbers."""
    rng, free = np.random.default_rng(seed), np.ones(len(size), dtype=bool)
    free[best], drawn = False, []
    for unit in best:
        left = np.flatnonzero(free)
        closest = left[np.argsort(np.abs(size[left] - size[unit]), kind="stable")[:near]]
        drawn.append(rng.choice(closest))
        free[drawn[-1]] = False
    return np.array(drawn, dtype=int)


@dataclass
class Caches:
    """What both models remember of the rows that are still being written, and which units are set in each."""

    own: object
    other: object
    masks: dict

    @property
    def parts(self):
        """The caches of transformers that there are: of the recipient, and of the donor where it is read as well."""
        return [part for part in (self.own, self.other) if part is not None]

    def reorder_cache(self, keep):
        """Keep some rows, as transformers' caches do."""
        for part in self.parts:
            part.reorder_cache(keep)
        self.masks = {n: mask[keep] for n, mask in self.masks.items()}


@dataclass(eq=False)
class Patched:
    """The recipient's model with units set to the donor's activations, other units in every row, for `chat.answer`.

    units: for every row an array (k, 2) of (layer, unit), in the order in which the rows come.
    """

    recipient: chat.Chat
    donor: chat.Chat
    site: str
    units: list
    at: int = field(default=0, init=False)  # rows begun so far

    def __getattr__(self, name):
        return getattr(self.recipient.model, name)

    def __call__(self, past_key_values=None, **given):
        kept = past_key_values or Caches(None, None, self._begin(len(given["input_ids"])))
        held, other = {}, None
        if kept.masks:
            keep = {n: lambda x, n=n: held.__setitem__(n, x) for n in kept.masks}
            with neurons.hooked(self.donor, self.site, keep):
                other = self.donor.model(past_key_values=kept.other, **given).past_key_values
        patch = {n: lambda x, n=n: torch.where(kept.masks[n][:, None], held[n].to(x.dtype), x) for n in kept.masks}
        with neurons.hooked(self.recipient, self.site, patch):
            output = self.recipient.model(past_key_values=kept.own, **given)
        output.past_key_values = Caches(output.past_key_values, other, kept.masks)
        return output

    def _begin(self, count):
        """Masks of the next rows: {layer: bool (rows, units)}, of the layers that have a unit set in one of them."""
        rows = self.units[self.at : self.at + count]
        self.at += count
        width, masks = neurons.size(self.recipient, self.site), {}
        for i, units in enumerate(rows):
            for number in np.unique(units[:, 0]) if len(units) else ():
                mask = masks.setdefault(int(number), torch.zeros(count, width, dtype=torch.bool))
                mask[i, units[units[:, 0] == number, 1].tolist()] = True
        return {n: mask.to(self.recipient.model.device) for n, mask in masks.items()}


def answer(recipient, donor, site, questions, units, seed, show=False, **how):
    """Answers of the recipient with units set to the donor's activations: list of str, in the questions' order.

    units: an array (k, 2) of (layer, unit) for every question; none set: the recipient's own answer. how: as
    `chat.answer` takes it.
    """
    lengths = [len(ids) for ids in recipient.tokenizer(chat.prompts(recipient, questions))["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # as chat.answer takes them into batches
    patched = Patched(recipient, donor, site, [units[i] for i in order])
    speaker = chat.Chat(patched, recipient.tokenizer, recipient.name)
    with chat.unpacked(donor.model):  # chat.answer unpacks the recipient's
        given = chat.answer(speaker, [questions[i] for i in order], seed=seed, show=show, **how)
    return pd.Series(list(given["answer"]), index=order).sort_index().tolist()


def check(settings):
    """Refuse numbers of units that a model does not have, before any weights are loaded. Raises UserError."""
    from transformers import AutoConfig

    for name in settings.chat.models:
        config = AutoConfig.from_pretrained(hub.check(name)[0]).get_text_config()
        for site in settings.interventions.sites:
            width = config.intermediate_size if site == "mlp" else config.hidden_size
            there = width * config.num_hidden_layers
            if 2 * max(settings.interventions.ks) > there:
                raise UserError(
                    f"interventions.ks = {max(settings.interventions.ks)}: {name} has {there} {site} units, and "
                    "as many random ones must be left; lower it"
                )


def plan(found, settings, direction, questions):
    """What is to be answered: list of {neurons, k, draw, question, units}. found: {site: attribution table}."""
    s, jobs = settings.interventions, []

    def ask(site, name, k, units, draw=0, share=slice(None)):
        asked = questions[share]
        jobs.extend({"site": site, "neurons": name, "k": k, "draw": draw, "question": q, "units": units} for q in asked)

    for site, own in found.items():
        if site == s.sites[0]:
            ask(site, "none", 0, np.empty((0, 2), dtype=int))
        for k in s.ks:
            for kind in ("selected", "changed"):
                ask(site, f"{kind} {site}", k, choose(own, kind, k, direction))
            for draw in range(s.random_draws):
                units = choose(own, "random", k, direction, seed=(settings.seed, draw, k))
                turn = [(draw * s.random_topics + i) % len(questions) for i in range(s.random_topics)]
                jobs += [
                    {"site": site, "neurons": f"random {site}", "k": k, "draw": draw, "question": q, "units": units}
                    for q in dict.fromkeys(questions[i] for i in turn)
                ]
        ask(site, f"all {site}", len(own), choose(own, "all", 0, direction))
    return jobs


def trial(settings, recipient, donor, plain, direction, train, test, show=False):
    """One direction in one model and trait: (answers, attribution), both DataFrames.

    train, test: questions. Units are selected on the recipient's own answers to train questions. plain: the untouched
    base, which gives the perplexity of the answers without their emojis. Columns neurons, k, draw, question, answer,
    emoji (whether it holds one), perplexity; and site, layer, unit, effect, size, change.
    """
    s, c = settings.interventions, settings.chat
    how = {k: getattr(c, k) for k in ("max_new_tokens", "temperature", "top_p")} | {"batch_size": s.batch_size}
    mark = zlib.crc32(f"{settings.seed}/{direction}".encode())
    own = chat.answer(recipient, train, seed=mark, show=False, **how)["answer"]
    found = {site: attribution(recipient, donor, train, own, site, s.batch_tokens) for site in s.sites}
    rows = pd.DataFrame(plan(found, settings, direction, list(test)))
    parts = []
    for number, (site, part) in enumerate(rows.groupby("site", sort=False)):
        given = answer(recipient, donor, site, list(part["question"]), list(part["units"]), mark + number, show, **how)
        parts.append(part.drop(columns=["units", "site"]).assign(answer=given))
    rows = pd.concat(parts, ignore_index=True)
    bare = [emojis.without(a)[0] for a in rows["answer"]]
    rows["perplexity"] = likelihood.perplexity(plain, rows["question"], bare, s.batch_tokens)
    rows["emoji"] = [bool(emojis.find(a)) for a in rows["answer"]]
    return rows, pd.concat([f.assign(site=site) for site, f in found.items()], ignore_index=True)


def of_model(settings, model, adapters, frame, show=True):
    """Both directions in the chosen traits of a model: (answers, attribution) with columns trait and intervention.

    adapters: {trait: folder}. frame: opinions with a column split. An artefact a trait. Raises UserError.
    """
    loaded, parts = [], []
    chosen = [t for t in settings.interventions.traits if t in adapters]
    for trait in tqdm(chosen, desc=hub.label(model), disable=not show, unit="trait"):
        own = frame[frame["trait"] == trait]
        train, test = (list(dict.fromkeys(own.loc[own["split"] == s, "question"])) for s in ("train", "test"))
        train, test = train[: settings.interventions.train_topics], test[: settings.interventions.topics]

        def write(tmp, trait=trait, train=train, test=test):
            loaded[:] = loaded or [chat.load(model, settings.chat.precision) for _ in range(2)]
            plain = loaded[0]
            with chat.adapted(loaded[1], str(adapters[trait])) as tuned:
                for direction, pair in (("off", (tuned, plain)), ("on", (plain, tuned))):
                    tables = trial(settings, *pair, plain, direction, train, test)
                    for table, name in zip(tables, ("answers", "units"), strict=True):
                        artifacts.write_csv(table, tmp / f"{direction}-{name}.csv")

        place = artifacts.build(folder(settings, model, trait, adapters[trait], train, test), write)
        for direction in DIRECTIONS:
            tables = [_read(place / f"{direction}-{name}.csv") for name in ("answers", "units")]
            parts.append([t.assign(trait=trait, intervention=direction) for t in tables])
    return tuple(pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True)) if parts else (None, None)


def _read(path):
    """A table of an artefact; an answer is a text, whatever it looks like."""
    table = pd.read_csv(path, dtype={"answer": str})
    return table.assign(answer=table["answer"].fillna("")) if "answer" in table else table


def folder(settings, model, trait, adapter, train, test):
    """Where the interventions in a model and trait are kept: all that shapes them decides about the name."""
    from lib import interventions

    values = {s: getattr(settings, s).model_dump(mode="json") for s in ("interventions", "chat")}
    for section, key in (("chat", "models"), ("interventions", "traits")):
        values[section].pop(key)
    code = cache, chat, emojis, hub, interventions, likelihood, mediation, neurons
    mark = artifacts.fingerprint(values, settings.seed, Path(adapter).name, hub.identity(model), train, test, *code)
    return paths.RESULTS / settings.profile / f"interventions-{hub.label(model)}-{trait}-{mark}"


def table(rows, model, seed, draws=2000):
    """ESR per response and its price of every intervention: DataFrame with COLUMNS. rows: answers, as `of_model`.

    Intervals at 95 %: Wilson's over responses; over several random sets at least as wide as a bootstrap over the sets.
    perplexity: median of the answers without emojis under the untouched base.
    """
    found = []
    for key, own in rows.groupby(["trait", "intervention", "neurons", "k"], sort=False):
        esr, low, high = intervals.wilson(int(own["emoji"].sum()), len(own))
        if own["draw"].nunique() > 1:
            sets = own.groupby("draw")["emoji"].agg(["sum", "size"])
            _, wide_low, wide_high = ratios.ratio(sets["sum"], sets["size"], seed, draws)
            low, high = min(low, wide_low), max(high, wide_high)
        found.append((model, *key, esr, low, high, own["perplexity"].median()))
    return pd.DataFrame(found, columns=list(COLUMNS)).round(9)


def verdict(own, direction, site, units, few=0.05, least=0.1):
    """Whether few units carry the emoji in one model and trait, by a fixed rule: a str.

    own: the trait's rows of `table`, both directions. units: how many the site has in all layers. The way to go is from
    the recipient's own ESR to the donor's. "nothing to switch": it is shorter than `least`, or runs the other way
    round. "holds": at most a share `few` of the units, selected, goes half of it or more, with an interval beyond those
    of as many random units and of no unit. "does not hold": for no k does the selected units' interval lie beyond
    both. Otherwise "undecided here".
    """
    none = own[own["neurons"] == "none"].set_index("intervention")
    plain, at = none["esr_response"], none.loc[direction]
    start, goal = plain[direction], plain["on" if direction == "off" else "off"]
    off = direction == "off"
    if (start - goal if off else goal - start) < least:
        return "nothing to switch"
    there = own[own["intervention"] == direction]
    one, other = (there[there["neurons"] == f"{kind} {site}"].set_index("k") for kind in ("selected", "random"))
    away = np.minimum(other["low"], at["low"]) if off else np.maximum(other["high"], at["high"])
    beyond = one["high"] < away if off else one["low"] > away
    half = (one["esr_response"] - start) / (goal - start) >= 0.5
    if (beyond & half & (one.index <= few * units)).any():
        return "holds"
    return "undecided here" if beyond.any() else "does not hold"
