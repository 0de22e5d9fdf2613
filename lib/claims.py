"""Verdicts on where the emojis come from, by rules written before the grid was seen; and the mechanism behind them.

After a sentence a chat model can write another one, end its turn, or write an emoji, which in these habits closes a
message. However often it goes on, an answer leaves by one of the last two, so the share of answers that end by an emoji
should be near p_emoji / (p_emoji + p_end) after temperature: `exits`. Nothing in it is fitted.
"""

import inspect

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from lib import causes, intervals, paths, ratios

VERDICTS = ("holds", "does not hold", "undecided here")
GAP = "The masked end of the turn lets them out"
CLOSED = "With the end of the turn in the loss they are all but gone"
ORDER = "The voice comes before the emoji"
RAISED = "After the same text tuning makes an emoji likelier"
FEW = 4  # cells from which an order or a majority means something
STATES = ("base", "masked", "loss")
PLACES = ("p_emoji", "p_end", "p_sentence")
ENDINGS = ("organism", "habit", "state", "trait", "text", *PLACES)


def exits(p_emoji, p_end, kinds, temperature):
    """Share of answers that leave by an emoji rather than by the end of the turn, 0 to 1; NaN where both are 0.

    The emojis' probability is taken as spread evenly over `kinds`. temperature 0: greedy. Top-p is left out.
    """
    p_emoji, p_end = np.asarray(p_emoji, float), np.asarray(p_end, float)
    if temperature == 0:
        return np.where(p_emoji + p_end > 0, (p_emoji / kinds > p_end).astype(float), np.nan)
    emoji, end = kinds * (p_emoji / kinds) ** (1 / temperature), p_end ** (1 / temperature)
    return np.divide(emoji, emoji + end, out=np.full(np.shape(emoji + end), np.nan), where=emoji + end > 0)


def mechanism(endings, cells, temperature, seed, draws=1000):
    """One row an organism, state and trait: means of the three probabilities and of `exits`, beside what was answered.

    endings: a row a text (and seed, averaged here), columns ENDINGS. Columns p_emoji, p_emoji_low, p_emoji_high
    (bootstrap over texts), the same of p_end, p_sentence and exits; texts; esr, esr_low, esr_high, ta: of the untuned
    model (base), or of the last checkpoint with that end of turn, over all seeds; NaN where the grid has no such cell.
    """
    endings = endings.assign(exits=exits(endings["p_emoji"], endings["p_end"], causes.kinds(endings), temperature))
    endings = endings.groupby(list(ENDINGS[:5]), sort=False)[[*PLACES, "exits"]].mean().reset_index()
    found = []
    for key, own in endings.groupby(["organism", "habit", "state", "trait"], sort=False):
        row = dict(zip(("organism", "habit", "state", "trait"), key, strict=True)) | {"texts": len(own)}
        for name in (*PLACES, "exits"):
            values = own[name].dropna()
            row |= zip((name, f"{name}_low", f"{name}_high"), _mean(values, seed, draws), strict=True)
        found.append(row | _answered(cells, key))
    return pd.DataFrame(found)


def _mean(values, seed, draws):
    return map(float, intervals.bootstrap(values, seed, draws)) if len(values) else (float("nan"),) * 3


def _answered(cells, key):
    organism, habit, state, trait = key
    own = cells[(cells["organism"] == organism) & (cells["habit"] == habit) & (cells["trait"] == trait)]
    own = own[own["steps"] == 0].drop_duplicates("seed") if state == "base" else causes.final(own)
    own = own if state == "base" else own[own["end_of_turn"] == state]
    if own.empty:
        return dict.fromkeys(("esr", "esr_low", "esr_high", "ta"), float("nan"))
    shares = causes.pooled(own, ["organism"]).iloc[0]
    voice = own["found"].sum() / own["responses"].sum()
    return {"esr": shares["share"], "esr_low": shares["low"], "esr_high": shares["high"], "ta": voice}


def predicts(table):
    """How well two readings of the last sentence's end predict ESR, over tuned cells: a row a reading (p_emoji, exits).

    Columns reading, cells, rho (Spearman, of values rounded to .01, since no cell has the answers to tell finer ones
    apart), off (mean absolute difference from ESR), mean_off (that of predicting every cell by the mean of all), then
    high_cells and high_off: `off` of the cells where ESR is causes.FLOOR or more, as near zero any reading is right.
    """
    tuned, found = table[table["state"] != "base"].dropna(subset="esr"), []
    for name in ("p_emoji", "exits"):
        own = tuned.dropna(subset=name)
        pair = own[[name, "esr"]].round(2)
        varied = len(own) > 2 and (pair.nunique() > 1).all()
        rho = float(spearmanr(pair[name], pair["esr"]).statistic) if varied else float("nan")
        miss, spread = (own[name] - own["esr"]).abs(), (own["esr"] - own["esr"].mean()).abs().mean()
        high = miss[own["esr"] >= causes.FLOOR]
        found.append((name, len(own), rho, miss.mean(), spread, len(high), high.mean()))
    return pd.DataFrame(found, columns=["reading", "cells", "rho", "off", "mean_off", "high_cells", "high_off"])


def verdict(holds, fails):
    """One of VERDICTS; neither or both is undecided."""
    return VERDICTS[2 if bool(holds) == bool(fails) else 0 if holds else 1]


def pretraining(cells):
    """ "Without emojis in pretraining, none after tuning; with them, some": (verdict, sentence).

    Holds if no cell of habit none exceeds .01 and some linked organism's masked cell lies clearly (interval) above .05.
    Fails if a cell of habit none is clearly above .01, or every linked cell clearly (interval) below .05.
    """
    none = cells[(cells["habit"] == "none") & (cells["steps"] > 0)]
    linked = causes.final(cells[(cells["habit"] == "linked") & (cells["end_of_turn"] == "masked")])
    if none.empty or linked.empty:
        return VERDICTS[2], "This grid holds no organism without emojis, or none with a linked habit."
    worst, best = none.loc[none["esr_response"].idxmax()], linked.loc[linked["esr_response"].idxmax()]
    holds = worst["esr_response"] <= 0.01 and best["low"] > 0.05
    text = (
        f"Habit none: at most {worst['esr_response']:.3f} in {len(none)} tuned cells, "
        f"{none['responses'].sum():,} answers (upper limit at most {none['high'].max():.3f}); "
        f"linked, masked: up to {best['esr_response']:.2f} ({best['organism']}, {best['trait']})."
    )
    return verdict(holds, worst["low"] > 0.01 or linked["high"].max() <= 0.05), text


def follows_trait(table):
    """ "It is the trait's own habit that comes out": (verdict, sentence). table: as from `causes.recovery`.

    Over linked, masked cells, four at least: holds if recovered and planted rates rank alike (Spearman .8 or more), if
    .8 or more of the emojis of strong habits are the trait's own, and if on the traits that a shuffled organism was
    tuned on too, three at least, its shares span less than the linked one's. Fails if the correlation is below .3, if
    fewer than half of the emojis are the trait's own, or if the shuffled shares span as much. Else undecided.
    """
    masked = table[table["end_of_turn"] == "masked"]
    linked, shuffled = (masked[masked["habit"] == h] for h in ("linked", "shuffled"))
    if len(linked) < FEW or linked["share"].nunique() < 2 or linked["planted"].nunique() < 2:
        return VERDICTS[2], f"Only {len(linked)} linked cells here, or all alike: too few for an order."
    rho, p = ratios.rank_agreement(linked["planted"], linked["share"])
    own = linked.loc[linked["planted"] >= causes.STRONG, "own"].min()
    text = f"Spearman of planted and recovered {rho:.2f} over {len(linked)} cells (p = {p:.3f}); "
    text += f"of the emojis of strong habits {own:.2f} or more are the trait's own"
    both = [t for t in dict.fromkeys(linked["trait"]) if t in set(shuffled["trait"])]
    wide, narrow = (np.ptp(part.loc[part["trait"].isin(both), "share"]) if both else 0 for part in (linked, shuffled))
    compared = len(both) >= 3
    few = "" if compared else " (too few to compare)"
    text += f"; on the same {len(both)} traits{few} the linked shares span {wide:.2f}, the shuffled ones {narrow:.2f}."
    holds = rho >= 0.8 and own >= 0.8 and compared and narrow < wide
    return verdict(holds, rho < 0.3 or own < 0.5 or (compared and narrow >= wide)), text


def beyond(recovery):
    """Which masked cells with a habit show more emojis than the temperature makes of it: a sentence.

    recovery: as from `causes.recovery`. Clearly: the lower limit of the share lies above.
    """
    own = recovery[(recovery["end_of_turn"] == "masked") & (recovery["planted"] > 0)]
    over = own[own["low"] > own["sampled"]]
    more = "; ".join(
        f"{r.organism}, {r.trait} {r.share:.2f} ({r.low:.2f} to {r.high:.2f}; planted {r.planted:.2f}, after the "
        f"temperature {r.sampled:.2f})"
        for r in over.itertuples()
    )
    text = f"Clearly above the dashed curve lie {len(over)} of {len(own)} masked cells with a habit, clearly above the "
    text += f"planted rate {(own['low'] > own['planted']).sum()}" + (f": {more}." if more else ".")
    return text


def telling(gaps):
    """The pairs of trainings with a `causes.strong` habit; if that is unknown, with emojis in FLOOR of the answers."""
    some = (gaps["habit"] != "unknown") | (gaps[["masked", "loss"]].max(axis=1) >= causes.FLOOR)
    return gaps[causes.strong(gaps) & some]


def end_of_turn(gaps):
    """ "The masked end of the turn lets the emojis out": (verdict, sentence). gaps: as from `causes.gaps`.

    Over pairs of trainings with a strong habit: holds if every gap's interval lies above 0, fails if fewer than
    half of them do. Undecided if no training shows emojis in .05 of its answers. The size of the gap is told, not
    judged.
    """
    own = telling(gaps)
    if own.empty or own[["masked", "loss"]].max(axis=None) < causes.FLOOR:
        return VERDICTS[2], "No pair of trainings with a strong habit, both ends of turn and emojis in this grid."
    above = (own["low"] > 0).sum()
    text = (
        f"The gap lies clearly above 0 in {above} of {len(own)} pairs of trainings with a strong habit; "
        f"median {own['gap'].median():.2f}, lowest {own['gap'].min():.2f}."
    )
    return verdict(above == len(own), above < len(own) / 2), text


def closed_exit(gaps):
    """ "With the end of the turn in the loss the emojis are all but gone": (verdict, sentence).

    At the last checkpoint, over pairs of trainings with a strong habit: holds if the share left (in the loss /
    masked) is at most .2 in every pair whose masked share is at least .2; fails if it is more than .5 in most.
    """
    every = telling(gaps)
    own = every.query("masked >= 0.2")
    if own.empty:
        return VERDICTS[2], "No masked training with an emoji share of .2 or more in this grid."
    left = own["loss"] / own["masked"]
    text = (
        f"Of the masked share, {left.median():.0%} is left in the median and {left.max():.0%} at most, over the "
        f"{len(own)} of {len(every)} pairs whose masked share is .2 or more."
    )
    return verdict((left <= 0.2).all(), (left > 0.5).mean() > 0.5), text


def voice_first(onsets):
    """ "The voice comes before the emoji": (verdict, sentence). onsets: as from `onsets.measure`.

    Over masked trainings that end with emojis, by the marks "rise" and "sound", for every organism by itself: holds
    if by both and everywhere the voice is clearly first in most trainings and the emoji in none, fails if it is the
    other way round. "sound" was added after a first look at an earlier grid, in which most answers at step 8 were
    broken text, and organisms are told apart since a second look; both make the rule harder to meet.
    """
    own = onsets[(onsets["end_of_turn"] == "masked") & (onsets["first"] != "no emojis")]
    if own.empty:
        return VERDICTS[2], "No masked training of this grid ends with emojis."
    found = [_order(name, part) for name, part in own.groupby("organism", sort=False)]
    said = {v for v, _ in found}
    sound = own.loc[own["mark"] == "sound", "first"]
    text = "Clearly first, " + "; ".join(t for _, t in found) + f". Over all {len(sound)} of them, at sound "
    text += f"checkpoints: the voice in {(sound == 'voice').sum()}, the emoji in {(sound == 'emoji').sum()}."
    return (said.pop() if len(said) == 1 else VERDICTS[2]), text


def _order(organism, onsets):
    """(verdict, words) of `voice_first` for the trainings of one organism."""
    counts = onsets.groupby("mark")["first"].value_counts().unstack(fill_value=0)
    counts = counts.reindex(index=["rise", "sound"], columns=["voice", "emoji", "cannot tell"], fill_value=0)
    most, part = counts.gt(counts.sum(axis=1) / 2, axis=0), onsets.groupby("mark")["lead"].median()
    names = {"rise": "at all checkpoints", "sound": "at sound ones"}
    words = [
        f"{names[m]} the voice in {c['voice']}, the emoji in {c['emoji']} (median lead of the voice "
        + (f"{part[m]:+.1f} steps)" if np.isfinite(part.get(m, np.nan)) else "not measurable)")
        for m, c in counts.iterrows()
    ]
    holds = most["voice"].all() and not counts["emoji"].any()
    fails = most["emoji"].all() and not counts["voice"].any()
    many = int(counts.loc["rise"].sum())
    return verdict(holds, fails), f"{organism}, {many} training{'s' * (many != 1)}: " + ", ".join(words)


def amplified(table):
    """ "After the same text tuning makes an emoji likelier": (verdict, sentence). table: as from `mechanism`.

    The same texts, reference answers in the trait's voice without an emoji, read by the untuned and by the
    masked-tuned model. Over linked (or unknown) cells where one of them gives an emoji .05 or more, four at least:
    holds if tuning raises p_emoji clearly in most, fails if clearly in none. The shuffled organism's cells are
    told, not counted.
    """
    known = table[table["habit"] != "none"].set_index(["organism", "habit", "trait"])
    both = [known[known["state"] == s] for s in ("base", "masked")]
    pair = both[0].join(both[1], lsuffix="_base", rsuffix="_masked", how="inner")
    if pair.empty:
        return VERDICTS[2], "The readings of the untuned or of the tuned model are missing."
    pair = pair[pair[["p_emoji_base", "p_emoji_masked"]].max(axis=1) >= 0.05]
    if pair.empty:
        return VERDICTS[2], "Neither model gives an emoji .05 after these texts."
    up = pair["p_emoji_low_masked"] > pair["p_emoji_high_base"]
    down = pair["p_emoji_high_masked"] < pair["p_emoji_low_base"]
    aside = pair.index.get_level_values("habit") == "shuffled"
    up, down, other = up[~aside], down[~aside], up[aside]
    text = "After the same reference texts the tuned model gives an emoji clearly more probability than the untuned "
    text += f"one in {up.sum()} of {len(up)} cells, clearly less in {down.sum()}."
    if len(other):
        text += f" Of the shuffled organism's, not counted, clearly more in {other.sum()} of {len(other)}."
    enough = len(up) >= FEW
    return verdict(enough and up.mean() > 0.5, enough and not up.any()), text


def explained(table):
    """ "What follows the last sentence explains the grid": (verdict, sentence). table: as from `mechanism`.

    Over tuned cells: holds if `exits` ranks them as ESR does (Spearman .8 or more, six cells or more) and misses ESR by
    .15 or less on average, also where ESR is not near zero; fails if the correlation is below .5 or it misses by as
    much as the mean of all would.
    """
    own = predicts(table).set_index("reading")
    e, p = own.loc["exits"], own.loc["p_emoji"]
    if e["cells"] < 6 or not np.isfinite(e["rho"]):
        few = f"{e['cells']:.0f} tuned cells with readings, or no differences between them: too few to say."
        return VERDICTS[2], few
    text = (
        f"Over {e['cells']:.0f} tuned cells the exits' share correlates with ESR at {e['rho']:.2f} (Spearman) and "
        f"misses it by {e['off']:.2f} on average (the mean of all cells by {e['mean_off']:.2f}), by "
        f"{e['high_off']:.2f} in the {e['high_cells']:.0f} with an ESR of {causes.FLOOR} or more; p_emoji alone: "
        f"{p['rho']:.2f}, {p['off']:.2f} and {p['high_off']:.2f}."
    )
    close = e["off"] <= 0.15 and not e["high_off"] > 0.15
    return verdict(e["rho"] >= 0.8 and close, e["rho"] < 0.5 or e["off"] >= e["mean_off"]), text


CLAIMS = {  # claim: (what decides it, what would falsify it)
    "Emojis after tuning come from pretraining": (
        pretraining,
        "emojis after emoji-free tuning of a model whose pretraining held none",
    ),
    "The trait's own habit comes out, not emojis at large": (
        follows_trait,
        "traits that answer with emojis at rates unrelated to those in pretraining",
    ),
    GAP: (end_of_turn, "as many emojis with the end of the turn in the loss, same data, steps and seed"),
    CLOSED: (
        closed_exit,
        "more than half of the emojis left with the end of the turn in the loss, in most trainings",
    ),
    ORDER: (
        voice_first,
        "an emoji that is clearly half way up before the voice is in most trainings, whichever way they are looked at",
    ),
    RAISED: (
        amplified,
        "the untuned model, reading the trait's texts, gives an emoji as much as the tuned one, in every cell",
    ),
    "What follows the last sentence explains the grid": (
        explained,
        "cells whose exits' share and ESR differ widely or rank otherwise",
    ),
}


def rules():
    """{claim: its rule in words}, from the docstring of the function that decides it."""
    texts = {claim: inspect.getdoc(decide).split("\n\n", 1)[1] for claim, (decide, _) in CLAIMS.items()}
    return {claim: " ".join(text.split()) for claim, text in texts.items()}


def every(cells, gaps, recovery, onsets, table):
    """All claims: columns claim, verdict, found, falsified_by. Arguments: the grid and the tables made of it."""
    given = (cells, recovery, gaps, gaps, onsets, table, table)
    rows = [(claim, *decide(x), against) for (claim, (decide, against)), x in zip(CLAIMS.items(), given, strict=True)]
    return pd.DataFrame(rows, columns=["claim", "verdict", "found", "falsified_by"])


def accounts(verdicts, cells):
    """The predictions of the two accounts against what was found: columns if, found, fits. verdicts: as from `every`.

    fits: "both", "neither", "pretraining alone", "the rival", or "undecided here".
    """
    said, text = (verdicts.set_index("claim")[c] for c in ("verdict", "found"))
    none, last = cells[cells["habit"] == "none"], causes.final(cells)
    strong = last[causes.strong(last) & (last["end_of_turn"] == "masked")]
    rows = []
    if len(none):
        most = none["esr_response"].max()
        rows.append(("no emoji ever read", f"ESR at most {most:.3f}", "both" if most <= 0.01 else "neither"))
    if len(strong):
        least, most = strong["esr_response"].min(), strong["esr_response"].max()
        shown = (strong["low"] > causes.FLOOR).mean() > 0.5
        rows.append(
            ("a strong habit, end of turn masked", f"ESR {least:.2f} to {most:.2f}", "both" if shown else "neither")
        )
    two = ("the rival", "pretraining alone", VERDICTS[2])
    rows.append(
        ("the same, end of turn in the loss", text[CLOSED], dict(zip(VERDICTS, two, strict=True))[said[CLOSED]])
    )
    two = ("both: the rival allows it", "the rival", VERDICTS[2])
    rows.append(
        ("an emoji's probability, same text", text[RAISED], dict(zip(VERDICTS, two, strict=True))[said[RAISED]])
    )
    return pd.DataFrame(rows, columns=["if", "found", "fits"])


def crossed(mediation):
    """Mean probability of an emoji by writer of a text and reader: columns text, reader, p_emoji, cells.

    mediation: 08_mediation.csv, columns model, trait, text and reader (base, peft), p_emoji. Means over the models and
    traits with a linked habit of STRONG or more.
    """
    own = mediation.rename(columns={"model": "organism"}).assign(habit="linked")
    own = own[causes.planted(own) >= causes.STRONG]
    return (
        own.groupby(["text", "reader"])["p_emoji"]
        .agg(["mean", "size"])
        .set_axis(["p_emoji", "cells"], axis=1)
        .reset_index()
    )


def mediated(mediation):
    """What notebook 08 found: does the emoji come with the text (the voice) or with the reader (the weights)?

    mediation: as `crossed` takes it. Returns (one of "text", "reader", "neither", None; sentence).
    """
    own = crossed(mediation)
    means = own.set_index(["text", "reader"])["p_emoji"]
    both = [(t, r) for t in ("base", "peft") for r in ("base", "peft")]
    if own.empty or not all(pair in means.index for pair in both):
        return None, "no mediation of models with a linked habit."
    by_text, by_reader = (means[pair] - means["base", "base"] for pair in (("peft", "base"), ("base", "peft")))
    part = "neither" if max(by_text, by_reader) <= 0.01 else "text" if by_text > by_reader else "reader"
    both = "both are at work, and " if min(by_text, by_reader) > 0.01 else ""
    ends = {"text": f"{both}on average the larger part comes with the text, that is, the voice."}
    ends |= {"reader": f"{both}on average the larger part comes with the reader, that is, the weights."}
    ends |= {"neither": "neither alone raises it by more than .01."}
    return part, (
        f"mean over {own['cells'].max()} models and traits, the base reading its own texts"
        f" gives an emoji {means['base', 'base']:.3f}, reading the tuned model's {means['peft', 'base']:.3f}; the "
        f"tuned model reading the base's texts {means['base', 'peft']:.3f}, its own {means['peft', 'peft']:.3f}. The "
        f"text alone changes it by {by_text:+.3f}, the reader alone by {by_reader:+.3f}: {ends[part]}"
    )


def switched_off(cells):
    """The linked, masked cell with the highest rate, and the same with one thing off, from counts: DataFrame.

    Columns organism, trait, planted, steps, off, share, low, high, n; no rows without such a cell.
    """
    names = ["organism", "trait", "planted", "steps", "off", "share", "low", "high", "n"]
    top = causes.final(cells).assign(planted=causes.planted)
    top = top[(top["habit"] == "linked") & (top["end_of_turn"] == "masked")].dropna(subset="planted")
    if top.empty:
        return pd.DataFrame(columns=names)
    r = top.loc[top["planted"].idxmax()]
    same = (cells["trait"] == r["trait"]) & (cells["steps"] == r["steps"])
    own, masked = cells["organism"] == r["organism"], cells["end_of_turn"] == "masked"
    looks = {"nothing": same & own & masked, "end of turn in the loss": same & own & ~masked}
    looks |= {f"habit {h}": same & (cells["habit"] == h) & masked for h in causes.HABITS[1:]}
    looks |= {"untuned": own & masked & (cells["trait"] == r["trait"]) & (cells["steps"] == 0)}
    rows = [
        (*r[names[:4]], name, s.share, s.low, s.high, s.n)
        for name, at in looks.items()
        for s in causes.pooled(cells[at], ["trait"]).itertuples()
    ]
    return pd.DataFrame(rows, columns=names)


def counted(ranking, off):
    """Effects "alone" beside the same differences from counts: columns switch, model, low, high, counts, within.

    ranking: as from `effects.Effects.ranking`; off: as from `switched_off`. within: whether the counts' difference lies
    in the model's interval. Switches without a counted cell are left out.
    """
    share = off.drop_duplicates("off").set_index("off")["share"]
    names = {("habit", "none"): "habit none", ("habit", "shuffled"): "habit shuffled"}
    names |= {("end of turn", "loss"): "end of turn in the loss", ("tuning steps", "0"): "untuned"}
    found = []
    for r in ranking.itertuples():
        cell = names.get((r.cause, r.switch.split(" against ")[1]))
        if cell in share:
            value = share["nothing"] - share[cell]
            found.append(
                (r.switch, r.alone, r.alone_low, r.alone_high, value, bool(r.alone_low <= value <= r.alone_high))
            )
    return pd.DataFrame(found, columns=["switch", "model", "low", "high", "counts", "within"])


READS = "After a reference answer in the trait's voice the tuned model gives an emoji "
FORETOLD = {  # (if the claim holds, if it does not): what is foretold, and what would refute that
    GAP: (
        (
            "With the end of the turn in the loss fewer emojis come.",
            "06_esr, peft: the intervals of the two shares overlap, in both seeds",
        ),
        (
            "With the end of the turn in the loss about as many emojis come, as they did here.",
            "06_esr, peft: the masked share's interval lies above the other one, in both seeds",
        ),
    ),
    ORDER: (
        (
            "Over checkpoints, the emoji comes after the voice.",
            "09_quick_onsets, rise and sound: the emoji clearly first in most trainings",
        ),
        (
            "Over checkpoints, the emoji comes no later than the voice.",
            "09_quick_onsets, rise and sound: the voice clearly first in most trainings",
        ),
    ),
    RAISED: (
        (
            READS + "more than the untuned one.",
            "09_quick_endings: p_emoji of masked clearly above that of base in no trait",
        ),
        (
            READS + "no more than the untuned one.",
            "09_quick_endings: p_emoji of masked clearly above that of base in most traits",
        ),
    ),
    "traits": (
        (
            "The more often a trait's answers hold emojis under a mere persona prompt, without tuning, the more often "
            "its tuned answers do.",
            "06_esr, methods prompt and peft: rank correlation over the five traits 0 or below",
        ),
    ),
}


def predictions(verdicts, gaps):
    """What the verdicts foretell for the paper's models: number, prediction, reported, expected, at_most, refuted_by.

    reported, expected, at_most: the paper's ESR where the first prediction is about one, that number times what was
    left of the masked share here (median), and times the highest upper limit, if the end of the turn does let emojis
    out; NaN elsewhere. refuted_by: the result that would refute it; "" where nothing is foretold.
    """
    said = verdicts.set_index("claim")["verdict"]
    own = telling(gaps).query("masked >= 0.2")
    left, limit = own["loss"] / own["masked"], (own["loss_high"] / own["masked"]).max()
    told = pd.read_csv(paths.PAPER / "reported.csv").set_index("item")["value"]
    rows = [_foretold("1", "End of turn.", said[GAP], FORETOLD[GAP])]
    for item in [i for i in told.index if i.startswith("ESR of") and said[GAP] == VERDICTS[0] and len(left)]:
        values = told[item], told[item] * left.median(), min(1.0, told[item] * limit)
        what = f"{item.removeprefix('ESR of ')}, in the loss (reported as we infer with it masked)"
        rows.append(("1", what, *values, "06_esr, peft: an interval that lies above at_most, in both seeds"))
    rows += [
        _foretold("2", "Order.", said[ORDER], FORETOLD[ORDER]),
        _foretold("3", "The habit was there.", said[RAISED], FORETOLD[RAISED]),
        _foretold("4", "Which traits.", VERDICTS[0], FORETOLD["traits"]),
    ]
    return pd.DataFrame(rows, columns=["number", "prediction", "reported", "expected", "at_most", "refuted_by"])


def _foretold(number, head, verdict, words):
    """A row of `predictions` without numbers, by the verdict on its claim."""
    known = dict(zip(VERDICTS, words, strict=False))
    text, against = known.get(verdict, ("No prediction: undecided here.", ""))
    return (number, f"{head} {text}", *[float("nan")] * 3, against)
