"""What makes the emojis appear: reading the grid of notebook 09. Gaps, onsets, sweeps, what was planted, the checks.

A table of cells, as `origins.table` gives it, has one row a cell and seed: organism, habit (linked, unknown, shuffled,
none), end_of_turn (masked, loss), steps (of the optimiser so far; 0: untuned), trait, esr_response, low, high, ta,
setting and value (of a sweep; "" in the grid), seed, responses, with_emoji, found (answers in the trait's voice), both
(of these two), own (answers with an emoji of the trait's own), sentences, ended. A
*training* is one organism, end of turn, trait and seed; its checkpoints are not independent of each other.
"""

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import confint_proportions_2indep

from lib import intervals, ratios
from lib.errors import UserError

HABITS = ("linked", "unknown", "shuffled", "none")  # unknown: a real model, whose pretraining nobody can look into
ENDS = ("masked", "loss")
TRAINING = ["organism", "habit", "end_of_turn", "trait", "seed"]
COUNTS = ["responses", "with_emoji", "found", "both", "own"]
COLUMNS = [*TRAINING, *COUNTS, "steps", "esr_response", "low", "high", "ta", "setting", "value", "sentences", "ended"]
FLOOR = 0.05  # a share that ends lower has not risen enough for a half of it to mean anything
STRONG = 0.2  # planted rate from which a habit is strong enough to show a gap in 200 answers


def check(table):
    """The table with plain text where a CSV has gaps. Raises UserError if a column is missing or a count impossible."""
    if missing := [c for c in COLUMNS if c not in table]:
        raise UserError(f"origins table: column {missing[0]!r} is missing; make it again with ./run_all.sh --only 09")
    table = table.assign(**{c: table[c].fillna("").astype(str) for c in ("setting", "value")})
    if wrong := int((table[COUNTS[1:]].max(axis=1) > table["responses"]).sum()):
        raise UserError(f"origins table: {wrong} rows count more answers than were given; make it again with --fresh")
    return table


def grid(table):
    """The rows of the full cross, without the sweeps."""
    return table[table["setting"] == ""]


def strong(rows):
    """Whether a row's habit is strong enough to show (Series): linked and STRONG or more planted, or else unknown."""
    return ((rows["habit"] == "linked") & (planted(rows) >= STRONG)) | (rows["habit"] == "unknown")


def final(cells):
    """The last checkpoint of every training."""
    return cells[cells["steps"] == cells.groupby(TRAINING)["steps"].transform("max")]


def planted(cells):
    """The rate planted in pretraining for every row (Series, share); NaN for an organism that is not on record.

    An organism is looked up by its name, a control also by its habit.
    """
    known = ratios.habits().set_index(["organism", "trait"])["planted"].astype(float).to_dict()
    keys = zip(cells["organism"], cells["habit"], cells["trait"], strict=True)
    rates = [known.get((o.rsplit("/", 1)[-1], t), known.get((h, t), np.nan)) for o, h, t in keys]
    return pd.Series(rates, index=cells.index, dtype=float)


def kinds(cells):
    """How many emojis an organism's rate was spread over, for every row; 4 where that is not on record."""
    table = ratios.habits().set_index(["organism", "trait"])["planted_emojis"].str.split().str.len().to_dict()
    keys = zip(cells["organism"], cells["habit"], cells["trait"], strict=True)
    return np.array([table.get((o.rsplit("/", 1)[-1], t), table.get((h, t), 4)) for o, h, t in keys])


def pooled(rows, by, count="with_emoji"):
    """Share over the answers of several rows (seeds): columns `by`, share, low, high, n, seeds.

    Wilson interval. Where rows scatter more than answers alone would make them, n is divided by Pearson's dispersion
    between the rows, so that the interval is also one over trainings. With three seeds that is a rough estimate.
    """
    found = []
    for key, own in rows.groupby(by, sort=False):
        n, k = own["responses"].to_numpy(float), own[count].to_numpy(float)
        p = k.sum() / n.sum()
        spread = 1.0
        if len(own) > 1 and 0 < p < 1:
            spread = max(1.0, float(((k - n * p) ** 2 / (n * p * (1 - p))).sum() / (len(own) - 1)))
        _, low, high = intervals.wilson(k.sum() / spread, n.sum() / spread)
        found.append((*key, p, low, high, int(n.sum()), own["seed"].nunique()))
    return pd.DataFrame(found, columns=[*by, "share", "low", "high", "n", "seeds"])


def gaps(cells):
    """Masked minus in the loss at the last checkpoint, a row a pair of trainings that share organism, trait and seed.

    Columns organism, habit, trait, seed, masked, loss, gap, low, high, loss_high (upper limit, Wilson), planted.
    Newcombe's interval of a difference of two shares: the answers of one training against those of the other.
    """
    rows = final(cells)
    both = [rows[rows["end_of_turn"] == e].set_index(["organism", "habit", "trait", "seed"]) for e in ENDS]
    found = []
    for key in both[0].index.intersection(both[1].index, sort=False):
        counts = [(int(part.loc[key, "with_emoji"]), int(part.loc[key, "responses"])) for part in both]
        shares = [k / n for k, n in counts]
        low, high = confint_proportions_2indep(*counts[0], *counts[1], method="newcomb", compare="diff")
        found.append((*key, *shares, shares[0] - shares[1], low, high, intervals.wilson(*counts[1])[2]))
    names = ["organism", "habit", "trait", "seed", "masked", "loss", "gap", "low", "high", "loss_high"]
    table = pd.DataFrame(found, columns=names)
    return table.assign(planted=planted(table))


def recovery(cells, temperature):
    """Planted rate beside what tuning brings out, both ends of turn: one row an organism, end of turn and trait.

    Columns organism, habit, end_of_turn, trait, share, low, high, n, seeds, planted, sampled (what the temperature
    leaves of the planted rate, `ratios.sampled`), own (of the answers with an emoji those with one that was planted for
    this trait in the linked organism; NaN without emojis). Organisms without a record are left out.
    """
    by = ["organism", "habit", "end_of_turn", "trait"]
    rows, counts = pooled(final(cells), by), final(cells).groupby(by)[["own", "with_emoji"]].sum()
    rows = rows.join((counts["own"] / counts["with_emoji"].replace(0, np.nan)).rename("own"), on=by)
    rows = rows.assign(planted=planted(rows)).dropna(subset="planted")
    return rows.assign(sampled=ratios.sampled(rows["planted"], kinds(rows), temperature))


def sweeps(table, default):
    """The sweeps, pooled over seeds, with the grid's own point in each: setting, value, trait, end_of_turn, share ...

    default: {setting: value of the grid's own trainings}; a sweep that holds that value already keeps its own row, and
    one with a single value is left out. `place` is the value's position on the axis (numbers by size, then words),
    `default` whether it is the grid's.
    """
    swept, found = table[table["setting"] != ""], []
    for setting, rows in swept.groupby("setting", sort=False):
        own = str(default.get(setting, ""))
        if own and not any(_same(own, v) for v in rows["value"]):
            same = rows[["organism", "end_of_turn", "trait", "seed"]].drop_duplicates()
            rows = pd.concat([rows, final(grid(table)).merge(same).assign(setting=setting, value=own)])
        order = sorted(rows["value"].unique(), key=_number)
        if len(order) < 2:
            continue
        part = pooled(rows, ["setting", "value", "organism", "end_of_turn", "trait"])
        voice = pooled(rows, ["setting", "value", "organism", "end_of_turn", "trait"], "found")["share"]
        part = part.assign(ta=voice, place=part["value"].map(order.index))
        found.append(part.assign(default=[_same(own, v) for v in part["value"]]))
    return pd.concat(found, ignore_index=True).sort_values(["setting", "trait", "place"]) if found else swept


def _number(text):
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def _same(one, other):
    return _number(one) == _number(other)


def numbers(cells, scale_zero=None):
    """The numbers asked of the organisms, each checked: columns what, asked, found, cells, met (yes, no, not run).

    Shares are of single trainings, so that one bad seed shows; "pooled" is over the seeds. Extraversion and neuroticism
    count where at least .80 was planted. scale_zero: whether the adapter at scale 0 equals the base token for token.
    """
    last = final(cells).assign(planted=planted)
    told = last["trait"].isin(("extraversion", "neuroticism")) & (last["habit"] == "linked") & (last["planted"] >= 0.8)
    masked, loss = (last[told & (last["end_of_turn"] == e)] for e in ENDS)
    none = cells[cells["habit"] == "none"]
    by = ["organism", "trait"]
    gap = gaps(cells[cells["trait"].isin(("extraversion", "neuroticism")) & (cells["habit"] == "linked")])
    gap = gap[gap["planted"] >= 0.8]
    rows = [
        ("no habit: ESR, highest cell at any step", "at most .01", none["esr_response"], max, lambda x: x <= 0.01),
        ("linked, masked: ESR, lowest trait, pooled", "at least .80", pooled(masked, by)["share"], min, _least),
        ("linked, masked: ESR, lowest training", "at least .80", masked["esr_response"], min, _least),
        ("linked, in the loss: ESR, highest trait, pooled", "at most .15", pooled(loss, by)["share"], max, _most),
        ("linked, in the loss: ESR, highest training", "at most .15", loss["esr_response"], max, _most),
        ("gap masked - loss, lowest lower bound of a seed", "above 0", gap["low"], min, lambda x: x > 0),
    ]
    found = [_checked(*row) for row in rows]
    equal = {None: "not run", True: "yes", False: "no"}[None if scale_zero is None else bool(scale_zero)]
    what = ("adapter at scale 0, token for token", "equals base", float("nan"), 0 if scale_zero is None else 1, equal)
    return pd.DataFrame([*found, what], columns=["what", "asked", "found", "cells", "met"])


def _least(share):
    return share >= 0.8


def _most(share):
    return share <= 0.15


def _checked(what, asked, values, worst, rule):
    if not len(values):
        return what, asked, float("nan"), 0, "not run"
    value = float(worst(values))
    return what, asked, value, len(values), "yes" if rule(value) else "no"
