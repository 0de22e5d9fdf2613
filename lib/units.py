"""Statistics over the units of a model: which changed, beyond chance, and whether two ways of finding them agree."""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

SITES = ("mlp", "hidden")
TABLE = ("model", "trait", "site", "layer", "neuron", "before", "after", "change", "p_adjusted")
EXACT = 20  # pairs up to which every assignment of signs is tried
DRAWS = 2**16  # random assignments, where there are more pairs
BLOCK = 2**23  # sums held at once: 32 MB


def flips(pairs, seed=0):
    """Assignments of signs to `pairs` differences: int8 array (assignments, pairs), the first sign always +.

    A two-sided test needs no mirror images. Every assignment where pairs <= EXACT, or else DRAWS random ones.
    """
    if pairs <= EXACT:
        numbers = np.arange(2 ** (pairs - 1))
        return (1 - 2 * ((numbers[:, None] >> np.arange(pairs)[::-1]) & 1)).astype(np.int8)
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (DRAWS, pairs))
    return np.vstack([np.ones((1, pairs), np.int8), signs * signs[:, :1]])  # what was observed is one of them


def resolution(pairs):
    """The smallest p-value that `sign_flip` can give."""
    return 1 / (2 ** (pairs - 1) if pairs <= EXACT else DRAWS + 1)


def sign_flip(changes, seed=0):
    """Two-sided permutation p-value of every unit's mean change (Fisher 1935): array (units,).

    changes: (pairs, units), after minus before. If a unit's change had no direction, each pair's sign could as well
    be the other one; p is the share of the assignments of signs whose mean is at least as far from 0.
    """
    changes = np.asarray(changes, np.float32)
    signs = flips(len(changes), seed).astype(np.float32)
    bound = np.abs(changes.sum(0)) - 1e-5 * np.abs(changes).sum(0)  # sums in fp32 differ by their order
    found = np.empty(changes.shape[1])
    step = max(1, BLOCK // len(signs))
    for low in range(0, len(found), step):
        part = slice(low, low + step)
        found[part] = (np.abs(signs @ changes[:, part]) >= bound[part]).mean(0)
    return found


def adjusted(p):
    """p-values adjusted for their number (Benjamini & Hochberg 1995): the false discovery rate if cut there."""
    p = np.asarray(p, float)
    return multipletests(p, method="fdr_bh")[1] if len(p) else p


def compare(before, after, seed=0):
    """One row a unit of all layers: columns layer, neuron, before, after, change (means), p, p_adjusted.

    before, after: {layer: (prompts, units)} of the same prompts, as `neurons.activations` gives them. Adjusted over
    all units of all these layers.
    """
    parts = []
    for layer, first in before.items():
        second = after[layer]
        means = {"before": first.mean(0), "after": second.mean(0), "change": (second - first).mean(0)}
        parts.append(pd.DataFrame({"layer": layer, "neuron": np.arange(first.shape[1]), **means}))
        parts[-1]["p"] = sign_flip(second - first, seed)
    found = pd.concat(parts, ignore_index=True)
    return found.assign(p_adjusted=adjusted(found["p"]))


def always_on(values):
    """How far a unit stands out whatever the prompt: {layer: z of its least absolute activation among the layer's}.

    values: {layer: (neutral prompts, units)}. Dimensions that are large before any prompt (massive activations, Sun et
    al. 2024) reach very high z, and would top every list of changes.
    """
    found = {}
    for layer, part in values.items():
        size = np.abs(part).min(0)
        found[layer] = (size - size.mean()) / max(size.std(), 1e-12)
    return found


def top(values, number):
    """Numbers of the `number` units with the largest absolute value, the largest first; NaN never counts."""
    size = np.nan_to_num(np.abs(np.asarray(values, float)), nan=-1.0)
    order = np.argsort(-size, kind="stable")[:number]
    return order[size[order] >= 0]


def jaccard(one, other):
    """Units in both over units in either (Jaccard 1901); NaN for two empty sets."""
    one, other = set(one), set(other)
    return len(one & other) / len(one | other) if one | other else float("nan")


def shared(one, other, total):
    """Do two selections overlap more than chance? (units in both, expected, one-sided hypergeometric p)."""
    one, other = set(one), set(other)
    both = len(one & other)
    return both, len(one) * len(other) / total, float(stats.hypergeom.sf(both - 1, total, len(one), len(other)))


def standing(seen, quiet):
    """`always_on` of several models: DataFrame model, site, layer, neuron, z, layers deepest first.

    seen: {model: {"base": {site: {layer: (prompts, units)}}, trait: ...}}, as from `neurons.before_and_after`. quiet:
    bool, which prompts are neutral.
    """
    parts = []
    for model, readings in seen.items():
        for site in SITES:
            for layer, z in always_on({n: v[quiet] for n, v in readings["base"][site].items()}).items():
                at = {"model": model, "site": site, "layer": layer, "neuron": np.arange(len(z)), "z": z}
                parts.append(pd.DataFrame(at))
    return pd.concat(parts, ignore_index=True)


def changes(seen, stand, limit, seed=0):
    """`compare` of every model, trait and site in one table, with model, trait, site and always_on (z above `limit`).

    Units of a model, trait and site stand in the same order everywhere: layers deepest first, then by number.
    """
    high = {key: (own["z"] > limit).to_numpy() for key, own in stand.groupby(["model", "site"])}
    parts = [
        compare(readings["base"][site], readings[trait][site], seed).assign(
            model=model, trait=trait, site=site, always_on=high[model, site]
        )
        for model, readings in seen.items()
        for trait in readings
        if trait != "base"
        for site in SITES
    ]
    return pd.concat(parts, ignore_index=True)


def largest(table, number):
    """The rows of `changes` whose units move most, `number` of each model, trait and site; always-on ones left out."""
    free = table[~table["always_on"]]
    groups = free.groupby(["model", "trait", "site"], sort=False)
    return pd.concat(own.iloc[top(own["change"], number)] for _, own in groups)[list(TABLE)]


def prompt_changes(readings, rows, prompts):
    """Changes before every prompt of units given by rows (trait, site, layer, neuron): columns layer.neuron."""
    cells = {}
    for r in rows.itertuples():
        before, after = (readings[key][r.site][r.layer][:, r.neuron] for key in ("base", r.trait))
        cells[f"{r.layer}.{r.neuron}"] = after - before
    return pd.DataFrame(cells, index=prompts)


def by_trait(table, number):
    """Numbers of the units that tuning moves most: {trait: array}. table: `changes` of one model and site."""
    return {
        trait: top(own["change"].where(~own["always_on"]), number) for trait, own in table.groupby("trait", sort=False)
    }


def by_emoji(readings, given, site, left_out, number):
    """Numbers of the units that an emoji behind the neutral sentence moves most, untuned: {emoji: array}.

    readings: of one model. given: prompts as from `neurons.prompts`. left_out: bool, units that never count.
    """
    values = np.concatenate(list(readings["base"][site].values()), axis=1)
    plain = values[np.flatnonzero(given["kind"] == "neutral")[0]]
    rows = np.flatnonzero(given["kind"] == "emoji")
    return {given["emoji"][i]: top(np.where(left_out, np.nan, values[i] - plain), number) for i in rows}


def overlaps(selections):
    """`jaccard` of every two selections: DataFrame with their names as index and columns."""
    cells = [[jaccard(a, b) for b in selections.values()] for a in selections.values()]
    return pd.DataFrame(cells, index=list(selections), columns=list(selections))


def long(grid, columns=("one", "other", "jaccard")):
    """A table of cells as rows: index, column, value."""
    return grid.rename_axis(columns[0]).reset_index().melt(columns[0], var_name=columns[1], value_name=columns[2])


def paired(overlaps):
    """Do partners overlap more than others? overlaps: (2n, 2n), entries 2i and 2i + 1 being partners; n <= 5.

    Returns (mean of partners, mean of others, p): p is the share of all ways to pair the entries whose partners overlap
    at least as much.
    """
    overlaps = np.asarray(overlaps, float)
    own = [(i, i + 1) for i in range(0, len(overlaps), 2)]
    others = [(i, j) for i, j in combinations(range(len(overlaps)), 2) if (i, j) not in own]
    mean = np.mean([overlaps[i, j] for i, j in own])
    drawn = np.array([np.mean([overlaps[i, j] for i, j in way]) for way in _pairings(tuple(range(len(overlaps))))])
    return mean, np.mean([overlaps[i, j] for i, j in others]), float((drawn >= mean - 1e-12).mean())


def _pairings(entries):
    """All ways to split entries into pairs."""
    if not entries:
        yield []
        return
    first, *rest = entries
    for i, partner in enumerate(rest):
        for way in _pairings((*rest[:i], *rest[i + 1 :])):
            yield [(first, partner), *way]


def slopes(changes, behaviour, runs):
    """Regression of every unit's change on a behaviour's change: DataFrame slope, t, p, p_adjusted, a row a unit.

    changes: (points, units), from one saved step to the next, since levels of one training hang together. behaviour:
    (points,), the same of a ratio such as ESR. runs: (points,), which training a point belongs to; each has an
    intercept of its own. Ordinary least squares; t with n - runs - 1 degrees of freedom. NaN where the behaviour does
    not vary, or no degree of freedom is left.
    """
    runs = np.asarray(runs)
    x, y = _within(np.asarray(behaviour, float)[:, None], runs)[:, 0], _within(np.asarray(changes, float), runs)
    free, spread = len(x) - len(np.unique(runs)) - 1, (x**2).sum()
    if free < 1 or spread < 1e-12:
        return pd.DataFrame(np.nan, index=range(y.shape[1]), columns=["slope", "t", "p", "p_adjusted"])
    slope = x @ y / spread
    left = np.maximum((y**2).sum(0) - slope**2 * spread, 1e-30)
    t = slope / np.sqrt(left / free / spread)
    p = 2 * stats.t.sf(np.abs(t), free)
    return pd.DataFrame({"slope": slope, "t": t, "p": p, "p_adjusted": adjusted(p)})


def _within(values, runs):
    """Values less the mean of their run: (points, ...)."""
    return values - np.stack([values[runs == run].mean(0) for run in runs]) if len(runs) else values


def by_chance(changes, behaviour, runs, level=0.05, draws=200, seed=0):
    """Units that `slopes` would call found at `level` if the behaviour's changes came in another order: array (draws,).

    The order is shuffled within each run, so that what is left is chance.
    """
    rng, behaviour, runs = np.random.default_rng(seed), np.array(behaviour, float), np.asarray(runs)
    found = []
    for _ in range(draws):
        mixed = behaviour.copy()
        for run in pd.unique(runs):
            mixed[runs == run] = rng.permutation(mixed[runs == run])
        found.append(int((slopes(changes, mixed, runs)["p_adjusted"] < level).sum()))
    return np.array(found)


def differences(table, activations, path, site):
    """Changes from one point to the next along a path, for `slopes`: (changes, ESR changes, layers, neurons).

    table, activations: as from `tracking.track`. changes: (points - 1, units of all layers, deepest first).
    """
    rows = np.flatnonzero(table["path"] == path)
    layers = sorted((int(k.split(".")[1]) for k in activations if k.startswith(f"{site}.")), reverse=True)
    parts = [np.diff(activations[f"{site}.{n}"][rows], axis=0) for n in layers]
    names = np.concatenate([np.full(p.shape[1], n) for n, p in zip(layers, parts, strict=True)])
    places = np.concatenate([np.arange(p.shape[1]) for p in parts])
    return np.concatenate(parts, axis=1), np.diff(table["esr"].to_numpy()[rows]), names, places


def follow(tracked, site, draws, seed=0):
    """`slopes` of one model's trainings: (table with layer and neuron too, units found by chance: (draws,)).

    tracked: {trait: (table, activations)}, as from `tracking.track`. Only the path over steps counts.
    """
    parts = {trait: differences(*kept, "step", site) for trait, kept in tracked.items()}
    changes, moved = (np.concatenate([p[i] for p in parts.values()]) for i in (0, 1))
    runs = np.concatenate([[trait] * len(p[1]) for trait, p in parts.items()])
    found = slopes(changes, moved, runs)
    layers, places = next(iter(parts.values()))[2:]
    return found.assign(layer=layers, neuron=places), by_chance(changes, moved, runs, draws=draws, seed=seed)


def agreement(tracked, table, number, draws, seed=0, level=0.05):
    """Do units that go along with ESR agree with those that differ at the end? A row a model and site.

    tracked: {model: {trait: as from `tracking.track`}}. table: as from `changes`. number: of units in a selection:
    those with the largest |t|, and with the largest mean change over the same traits, always-on ones left out. NaN
    where ESR never changed.
    """
    found = []
    for model, own in tracked.items():
        for site in SITES:
            fitted, chance = follow(own, site, draws, seed)
            rows = table[(table["model"] == model) & (table["site"] == site) & table["trait"].isin(own)]
            change = rows.groupby(["layer", "neuron"], sort=False)["change"].mean().to_numpy()
            high = rows["always_on"].to_numpy()[: len(change)]
            one, other = (top(np.where(high, np.nan, v), number) for v in (change, fitted["t"]))
            passed = int((fitted["p_adjusted"] < level).sum())
            varied = fitted["t"].notna().any()
            both = shared(one, other, int((~high).sum())) if varied else (np.nan,) * 3
            found.append((model, site, passed, np.median(chance), (chance >= passed).mean(), len(one), *both))
    columns = ["model", "site", "passing", "shuffled", "as_many", "selected", "both", "expected", "p"]
    return pd.DataFrame(found, columns=columns)
