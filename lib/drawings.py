"""The figures of notebook 09: each takes the tables that `causes`, `claims` and `effects` make and returns a Figure.

Filled marks are trainings with the end of the turn masked, hollow ones with it in the loss, everywhere.
"""

import matplotlib.pyplot as plt
import numpy as np

from lib import big5, causes, claims, ratios, style

VOICE = "#555555"  # the trait's share, beside the emoji's in the trait's colour
EXITS = ("#4D4D4D", "#CFCFCF")  # end of the turn, anything else
UNITS = {
    "sentences": "sentences per training answer",
    "rank": "rank of the adapter",
    "learning_rate": "peak learning rate",
    "precision": "precision of the base",
    "scale": "adapter scale at inference",
    "steps": "optimiser steps of the training",
    "max_new_tokens": "tokens an answer, at most",
}


def order(cells):
    """{organism: title} in the order linked, shuffled, none."""
    kinds = cells[["organism", "habit"]].drop_duplicates()
    kinds = kinds.sort_values("habit", key=lambda h: h.map(causes.HABITS.index), kind="stable")
    return {o: o if o == h else f"{o} ({h})" for o, h in kinds.itertuples(index=False)}


def _mark(label, **how):
    return plt.Line2D([], [], ls="", **({"marker": "o", "color": style.INK} | how), label=label)


def _ends():
    return [_mark("end of turn masked"), _mark("in the loss", mfc="white")]


def _traits(names):
    return [_mark(name, color=big5.COLOURS[name]) for name in names]


def habits(cells):
    """ESR at the last checkpoint: a panel an organism, a pair of dots a trait, intervals, single seeds as ticks."""
    rows, names = causes.final(cells), order(cells)
    traits = big5.ordered(cells["trait"])
    shares = causes.pooled(rows, ["organism", "end_of_turn", "trait"])
    size = (1.6 + 2.6 * len(names), 3.8)
    fig, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    for ax, (organism, title) in zip(axes[0], names.items(), strict=True):
        for r in shares[shares["organism"] == organism].itertuples():
            x = traits.index(r.trait) + (-0.2 if r.end_of_turn == "masked" else 0.16)
            paint = big5.COLOURS[r.trait]
            ax.vlines(x, r.low, r.high, color=paint, lw=1.6)
            ax.plot(x, r.share, "o", color=paint, mfc=paint if r.end_of_turn == "masked" else "white", ms=6)
            same = (rows["organism"] == organism) & (rows["trait"] == r.trait) & (rows["end_of_turn"] == r.end_of_turn)
            single = rows.loc[same, "esr_response"]
            ax.scatter(np.full(len(single), x + 0.15), single, marker="_", color=style.INK, s=26, lw=1, zorder=4)
        ax.set(title=title, ylim=(-0.04, 1.04), xlim=(-0.6, len(traits) - 0.4))
        ax.set_xticks(range(len(traits)), style.trait_axis(traits)[0], rotation=35, ha="right")
        ax.grid(axis="x", visible=False)
    axes[0][0].set_ylabel("answers with an emoji (share)")
    fig.legend(handles=[*_ends(), _mark("one seed", marker="_")], loc="outside upper center", ncols=3)
    return fig


def over_steps(cells):
    """Emoji share (solid) and share in the trait's voice (dashed) over steps: rows organism and end of turn, columns
    traits; thick all seeds, with intervals, thin single ones."""
    traits, steps = big5.ordered(cells["trait"]), sorted(cells["steps"].unique())
    panels = [(o, e) for o in order(cells) for e in causes.ENDS]
    size = (1.5 + 2.2 * len(traits), 1 + 1.9 * len(panels))
    fig, axes = plt.subplots(len(panels), len(traits), figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, (organism, end) in zip(axes, panels, strict=True):
        for ax, trait in zip(line, traits, strict=True):
            own = cells[(cells["organism"] == organism) & (cells["end_of_turn"] == end) & (cells["trait"] == trait)]
            _curve(ax, own, "found", "--", VOICE)
            _curve(ax, own, "with_emoji", "-", big5.COLOURS[trait])
            ax.set_title(trait if line[0] is axes[0, 0] else "")
            ax.set(ylim=(-0.03, 1.03), xticks=steps)
            ax.set_xticks(steps, [str(s) if s == 0 or s >= max(steps) / 5 else "" for s in steps], fontsize=8)
        line[0].set_ylabel(f"{organism}\n{'masked' if end == 'masked' else 'in the loss'}\nshare of answers")
    fig.supxlabel("optimiser steps", fontsize=10)
    lines = [plt.Line2D([], [], color=VOICE, lw=2, ls=s) for s in ("-", "--")]
    names = ["with an emoji (in the trait's colour)", "in the trait's voice"]
    fig.legend(lines, names, loc="outside upper center", ncols=2)
    return fig


def _curve(ax, own, column, line, paint):
    for _, single in own.groupby("seed"):
        one = single.sort_values("steps")
        ax.plot(one["steps"], one[column] / one["responses"], line, color=paint, lw=0.7, alpha=0.5)
    both = causes.pooled(own, ["steps"], column).sort_values("steps")
    ax.plot(both["steps"], both["share"], line, color=paint, lw=2)
    ax.fill_between(both["steps"], both["low"], both["high"], color=paint, alpha=0.13, lw=0)


def leads(onsets):
    """By how many steps the voice comes before the emoji: a panel a mark, a row a trait, a dot a training."""
    own = onsets[(onsets["end_of_turn"] == "masked") & (onsets["first"] != "no emojis")]
    names, traits = order(own), big5.ordered(own["trait"])
    rows = [(o, t) for o in names for t in traits if len(own[(own["organism"] == o) & (own["trait"] == t)])]
    titles = {"half": "half of the final value", "rise": "half way from untuned", "sound": "... at sound checkpoints"}
    size = (10.5, 1.4 + 0.42 * max(2, len(rows)))
    fig, axes = plt.subplots(1, len(titles), figsize=size, sharex=True, sharey=True)
    for ax, (mark, title) in zip(axes, titles.items(), strict=True):
        part = own[own["mark"] == mark].dropna(subset="lead")
        seeds = sorted(part["seed"].unique())
        for r in part.itertuples():
            y = rows.index((r.organism, r.trait)) + 0.22 * (seeds.index(r.seed) - (len(seeds) - 1) / 2)
            ax.hlines(y, r.low, r.high, color=big5.COLOURS[r.trait], lw=1.4)
            ax.plot(r.lead, y, "o", color=big5.COLOURS[r.trait], ms=4)
        ax.axvline(0, color=style.INK, lw=1)
        ax.set_title(title)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), [f"{o}, {t}" for o, t in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    fig.supxlabel("steps by which the voice comes before the emoji (below 0: after it)", fontsize=10)
    return fig


def planted(recovery, temperature):
    """Planted rate against emoji share, a panel an organism; traits with one planted rate stand side by side."""
    names, traits = order(recovery), big5.ordered(recovery["trait"])
    size = (1.4 + 2.7 * len(names), 3.8)
    fig, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    grid = np.linspace(0, 1, 101)
    for ax, (organism, title) in zip(axes[0], names.items(), strict=True):
        own = recovery[recovery["organism"] == organism]
        ax.plot([0, 1], [0, 1], ":", color=style.GREY)
        ax.plot(grid, ratios.sampled(grid, causes.kinds(own).mean(), temperature), "--", color=style.GREY, lw=1)
        alike = own.groupby(["end_of_turn", "planted"])["share"]
        beside = 0.03 * (alike.cumcount() - (alike.transform("size") - 1) / 2)
        for r, x in zip(own.itertuples(), own["planted"] + beside, strict=True):
            paint = big5.COLOURS[r.trait]
            ax.vlines(x, r.low, r.high, color=paint)
            ax.plot(x, r.share, "o", color=paint, mfc=paint if r.end_of_turn == "masked" else "white")
        ax.set(title=title, xlabel="planted rate", xlim=(-0.12, 1.07), ylim=(-0.05, 1.05))
    axes[0][0].set_ylabel("answers with an emoji (share)")
    fig.legend(handles=[*_traits(traits), *_ends()], loc="outside upper center", ncols=4, fontsize=8)
    return fig


def sweeps(swept):
    """One panel a setting: emoji share with intervals (solid) and trait share (dashed) over its values, by trait."""
    knobs = list(swept["setting"].unique())
    wide, names = min(4, len(knobs)), dict.fromkeys(zip(swept["trait"], swept["end_of_turn"], strict=True))
    tall = -(-len(knobs) // wide)
    size = (max(6.5, 1 + 2.8 * wide), 1.2 + 2.5 * tall)
    fig, axes = plt.subplots(tall, wide, figsize=size, sharey=True, squeeze=False)
    for ax in axes.flat[len(knobs) :]:
        ax.set_visible(False)
    for ax, knob in zip(axes.flat, knobs, strict=False):
        own = swept[swept["setting"] == knob].sort_values("place")
        for trait, end in names:
            part = own[(own["trait"] == trait) & (own["end_of_turn"] == end)]
            if len(part):
                _knob(ax, part, big5.COLOURS[trait], end)
        values = own.drop_duplicates("place")
        slanted = {"rotation": 30, "ha": "right"} if values["value"].str.len().max() > 5 else {}
        shown = ["as they are" if knob == "sentences" and _zero(v) else v for v in values["value"]]
        ax.set_xticks(values["place"], shown, fontsize=8, **slanted)
        ax.set(xlabel=UNITS.get(knob, knob), ylim=(-0.04, 1.04))
        ax.margins(x=0.12)
    fig.supylabel("share of answers", fontsize=10)
    lines = [plt.Line2D([], [], color=big5.COLOURS[t], marker="o", label=t) for t in big5.ordered(swept["trait"])]
    lines += [plt.Line2D([], [], color=VOICE, label="with an emoji")]
    lines += [plt.Line2D([], [], color=VOICE, ls="--", label="in the trait's voice")]
    lines += [_mark("the grid's value", mfc="none", ms=10)]
    fig.legend(handles=lines, loc="outside upper center", ncols=min(len(lines), 3 if wide < 3 else 5))
    return fig


def _zero(text):
    return text.strip("0") in ("", ".")


def _knob(ax, part, paint, end):
    error = [(part["share"] - part["low"]).clip(lower=0), (part["high"] - part["share"]).clip(lower=0)]
    fill = paint if end == "masked" else "white"
    ax.errorbar(part["place"], part["share"], error, fmt="-o", color=paint, mfc=fill, ms=5)
    ax.plot(part["place"], part["ta"], "--", color=paint, lw=1, alpha=0.8)
    ring = part[part["default"].astype(bool)]
    ax.scatter(ring["place"], ring["share"], s=110, facecolors="none", edgecolors=style.INK, lw=1, zorder=4)


def endings(readings):
    """What follows the last sentence: rows organisms, columns traits, a stacked bar a reader (base, masked, loss)."""
    names, traits = list(order(readings)), big5.ordered(readings["trait"])
    size = (max(6.5, 1.9 + 2.1 * len(traits)), 1.3 + 1.35 * len(names))
    fig, axes = plt.subplots(len(names), len(traits), figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, organism in zip(axes, names, strict=True):
        for ax, trait in zip(line, traits, strict=True):
            own = readings[(readings["organism"] == organism) & (readings["trait"] == trait)]
            _ways(ax, own, big5.COLOURS[trait])
            ax.set_title(trait if line[0] is axes[0, 0] else "")
        line[0].set_ylabel(organism)
    labels = ["an emoji (in the trait's colour)", "end of the turn", "anything else (another sentence)"]
    paints = (big5.COLOURS[traits[0]], *EXITS)
    shapes = [plt.Rectangle((0, 0), 1, 1, fc=p, ec="#BBBBBB", lw=0.5) for p in paints]
    fig.legend(shapes, labels, loc="outside upper center", ncols=3 if len(traits) > 2 else 1)
    fig.supxlabel("probability after the last sentence of a reference answer", fontsize=10)
    return fig


def _ways(ax, own, colour):
    for r in own.itertuples():
        y, left = claims.STATES.index(r.state), 0.0
        for width, paint in zip((r.p_emoji, r.p_end, r.p_sentence), (colour, *EXITS), strict=True):
            ax.barh(y, width, left=left, color=paint, height=0.72, lw=0)
            left += width
        ax.hlines(y, r.p_emoji_low, r.p_emoji_high, color="black", lw=1.6)
    ax.set(xlim=(0, 1), ylim=(2.6, -0.6))
    ax.set_yticks(range(3), ["base", "masked", "in the loss"])
    ax.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    ax.grid(axis="y", visible=False)


def predicted(readings):
    """Two readings of the last sentence's end against the share answered with an emoji: a dot a cell, untuned grey."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
    pairs = {"p_emoji": "probability of an emoji", "exits": "share leaving by an emoji"}
    for ax, (column, name) in zip(axes, pairs.items(), strict=True):
        ax.plot([0, 1], [0, 1], ":", color=style.GREY)
        for r in readings.dropna(subset=["esr", column]).itertuples():
            x, paint = getattr(r, column), big5.COLOURS[r.trait] if r.state != "base" else "#BDBDBD"
            ax.hlines(r.esr, getattr(r, f"{column}_low"), getattr(r, f"{column}_high"), color=paint, lw=1)
            ax.vlines(x, r.esr_low, r.esr_high, color=paint, lw=1)
            marker, fill = "s" if r.state == "base" else "o", "white" if r.state == "loss" else paint
            ax.plot(x, r.esr, marker, color=paint, mfc=fill, ms=6)
        ax.set(xlabel=f"{name}, after the last sentence", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes[0].set_ylabel("answers with an emoji (share)")
    grey = _mark("untuned (not counted)", marker="s", color="#BDBDBD")
    shown = [*_traits(big5.ordered(readings["trait"])), *_ends(), grey]
    fig.legend(handles=shown, loc="outside upper center", ncols=4, fontsize=8)
    return fig


def effects(ranking):
    """Left: drop in deviance without a cause. Right: what each switch does to the share, with intervals."""
    size = (10.5, 1.7 + 0.52 * max(2, len(ranking)))
    fig, axes = plt.subplots(1, 2, figsize=size, width_ratios=(2, 3))
    bars = ranking.drop_duplicates("cause")
    axes[0].barh(range(len(bars)), 100 * bars["share"].fillna(0), color=style.GREY, height=0.6)
    axes[0].set_yticks(range(len(bars)), bars["cause"])
    axes[0].set(ylim=(len(bars) - 0.4, -0.6), xlabel="drop in deviance without it\n(% of what the model explains)")
    y = np.arange(len(ranking))
    for shift, name, fill, label in (
        (-0.14, "alone", style.INK, "all else on"),
        (0.14, "average", "white", "average over the grid"),
    ):
        axes[1].hlines(y + shift, ranking[f"{name}_low"], ranking[f"{name}_high"], color=style.INK)
        at = {"edgecolors": style.INK, "s": 36, "zorder": 3, "label": label}
        axes[1].scatter(ranking[name], y + shift, c=fill, **at)
    axes[1].axvline(0, color=style.GREY, lw=1)
    axes[1].set_yticks(y, [f"{r.cause}:\n{r.switch}" for r in ranking.itertuples()], fontsize=8)
    axes[1].set(ylim=(len(ranking) - 0.4, -0.6), xlim=(-1.05, 1.05))
    axes[1].set_xlabel("difference in the share of answers with an emoji")
    for ax in axes:
        ax.grid(axis="y", visible=False)
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig
