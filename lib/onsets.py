"""What comes first as tuning goes on, the trait's voice or the emoji? Onsets over the checkpoints of the grid."""

import numpy as np
import pandas as pd

from lib import causes, intervals


def reached(steps, values, start=0.0):
    """Steps at which curves first come half way from `start` to their last value, straight lines between checkpoints.

    values: (..., checkpoints); start: a number, or (...). NaN where the last value is not causes.FLOOR above the start.
    """
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    start = np.broadcast_to(start, values.shape[:-1])
    target = (start + values[..., -1]) / 2
    i = (values >= target[..., None]).argmax(-1)
    before = np.maximum(i - 1, 0)
    here, there = (np.take_along_axis(values, j[..., None], -1)[..., 0] for j in (before, i))
    part = np.divide(target - here, there - here, out=np.zeros_like(target), where=there > here)
    at = np.where(i == 0, steps[0], steps[before] + part * (steps[i] - steps[before]))
    return np.where(values[..., -1] - start >= causes.FLOOR, at, np.nan)


def measure(cells, seed, draws=500):
    """What comes first in each training, the voice or the emoji? One row a training and mark.

    Columns causes.TRAINING, mark, emoji, voice, lead, low, high, first. emoji, voice: steps at which a share comes half
    way to its final value. Marks: "half", of the final value; "rise", from the untuned value, which is stricter, since
    a classifier finds a trait in some neutral answers, too; "sound", as "rise", without checkpoints at which fewer than
    half of the answers end by themselves: what a classifier finds in broken text is no voice.

    lead = emoji - voice (positive: the voice comes first), with its 95 % interval over answers (binomial draws at every
    checkpoint). first: "voice", "emoji", "cannot tell" or, without emojis at the end, "no emojis".
    """
    rng, found = np.random.default_rng(seed), []
    for key, own in cells.groupby(causes.TRAINING, sort=False):
        own = own.sort_values("steps")
        kept = {"half": own, "rise": own, "sound": own[(own["ended"] >= 0.5) | (own["steps"] == 0)]}
        for mark, points in kept.items():
            if len(points) < 3 or points["steps"].iloc[-1] != own["steps"].iloc[-1]:
                found.append((*key, mark, *[np.nan] * 5, "cannot tell" if _ends(own) else "no emojis"))
                continue
            found.append((*key, mark, *_first(points, mark, rng, draws)))
    return pd.DataFrame(found, columns=[*causes.TRAINING, "mark", "emoji", "voice", "lead", "low", "high", "first"])


def _ends(own):
    return own["with_emoji"].iloc[-1] >= causes.FLOOR * own["responses"].iloc[-1]


def _first(points, mark, rng, draws):
    """(emoji, voice, lead, low, high, first) of one training's checkpoints."""
    n, steps = points["responses"].to_numpy(), points["steps"]
    shares = [points[c].to_numpy() / n for c in ("with_emoji", "found")]
    drawn = [rng.binomial(n, share, size=(draws, len(n))) / n for share in shares]
    emoji, voice = (
        [reached(steps, esr), reached(steps, ta, 0.0 if mark == "half" else ta[..., 0])] for esr, ta in (shares, drawn)
    )
    (emoji, voice), (emojis, voices) = emoji, voice
    if np.isnan(emoji):
        return float(emoji), float(voice), np.nan, np.nan, np.nan, "no emojis"
    if np.isnan(voice):
        return float(emoji), np.nan, np.nan, np.nan, np.nan, "cannot tell"
    low, high = np.nanpercentile(emojis - voices, intervals.TAILS)
    return float(emoji), float(voice), float(emoji - voice), low, high, _order(low, high)


def _order(low, high):
    return "voice" if low > 0 else "emoji" if high < 0 else "cannot tell"


def leads(table):
    """The onsets summed up, over trainings that end with emojis: one row an organism, end of turn and mark.

    Columns organism, end_of_turn, mark, trainings, medians of emoji, voice and lead, lead_least, lead_most, and in how
    many trainings the voice or the emoji clearly comes first, or nobody can tell.
    """
    found = []
    with_emojis = table[table["first"] != "no emojis"]
    for key, own in with_emojis.groupby(["organism", "end_of_turn", "mark"], sort=False):
        middle = own[["emoji", "voice", "lead"]].median()
        count = [int((own["first"] == w).sum()) for w in ("voice", "emoji", "cannot tell")]
        found.append((*key, len(own), *middle, own["lead"].min(), own["lead"].max(), *count))
    names = ["organism", "end_of_turn", "mark", "trainings", "emoji", "voice", "lead", "lead_least", "lead_most"]
    return pd.DataFrame(found, columns=[*names, "voice first", "emoji first", "cannot tell"])


def peaks(cells):
    """Trainings whose emoji share was clearly higher before their last checkpoint than at it: a row each.

    Columns causes.TRAINING, peak (step), share and low at the peak, last (share) and high at the last checkpoint.
    """
    found = []
    for key, own in cells.groupby(causes.TRAINING, sort=False):
        last, best = own.loc[own["steps"].idxmax()], own.loc[own["esr_response"].idxmax()]
        if best["low"] > last["high"]:
            found.append((*key, best["steps"], *best[["esr_response", "low"]], *last[["esr_response", "high"]]))
    return pd.DataFrame(found, columns=[*causes.TRAINING, "peak", "share", "low", "last", "high"])


def by_voice(cells):
    """Emoji share of answers in the trait's voice and of the others, by organism, end of turn, trait and steps.

    Over trainings with a `causes.strong` habit, seeds together. Columns organism, end_of_turn, trait, steps, ended
    (share that end by themselves), then for both kinds of answers n, share, low, high (Wilson).
    """
    own = cells[causes.strong(cells)]
    found = []
    for key, rows in own.groupby(["organism", "end_of_turn", "trait", "steps"]):
        n, held, voiced, both = rows[["responses", "with_emoji", "found", "both"]].sum()
        ended = (rows["ended"] * rows["responses"]).sum() / n
        inside, outside = intervals.wilson(both, voiced), intervals.wilson(held - both, n - voiced)
        found.append((*key, ended, voiced, *inside, n - voiced, *outside))
    names = ["voiced", "voiced_share", "voiced_low", "voiced_high", "other", "other_share", "other_low", "other_high"]
    return pd.DataFrame(found, columns=["organism", "end_of_turn", "trait", "steps", "ended", *names])
