"""The figures of notebook 09: each takes the tables that `causes`, `claims` and `effects` make and returns a Figure.

Filled marks are trainings with the end of the turn masked, hollow ones with it in the loss, everywhere.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.legend_handler import HandlerTuple

from lib import big5, causes, claims, ratios, style

VOICE = "#555555"  # the trait's share, beside the emoji's in the trait's colour
EXITS = ("#4D4D4D", "#CFCFCF")  # end of the turn, anything else
UNTUNED = "#ABABAB"
SHAPES = {"linked": "oPX*", "unknown": "hp8H", "shuffled": "Dd", "none": "^v"}  # organisms of each habit, in turn
SEEDS = "os^Dv*"
WHITE = {"fc": "white", "lw": 0, "pad": 0.5}
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


def _line(label, **how):
    return plt.Line2D([], [], **({"color": style.GREY} | how), label=label)


def _ends(marker="o"):
    return [_mark("end of turn masked", marker=marker), _mark("in the loss", marker=marker, mfc="white")]


def _traits(names, marker="o"):
    return [_mark(name, color=big5.COLOURS[name], marker=marker) for name in names]


def _shapes(rows):
    """{organism: marker}, by habit."""
    kinds = rows.drop_duplicates("organism").set_index("organism")["habit"]
    place = kinds.groupby(kinds).cumcount()
    return {o: SHAPES[h][place[o] % len(SHAPES[h])] for o, h in kinds.items()}


def _span(counts):
    """The least and the most as text, once if they are the same."""
    return " to ".join(str(int(n)) for n in dict.fromkeys((counts.min(), counts.max())))


def _head(ax, title, note):
    """A title and, between it and the panel, a small grey note."""
    ax.set_title(title, pad=7 + 11 * len(note.splitlines()))
    how = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "bottom"}
    ax.annotate(note, (0.5, 1), (0, 5), fontsize=8, color=style.GREY, **how)


def _absent(ax, x=0.5, y=0.5, across="axes", **how):
    """Say "not run" at a place: shares of the panel, or x ("x") or y ("y") in the data's units."""
    place = {"axes": ax.transAxes, "x": ax.get_xaxis_transform(), "y": ax.get_yaxis_transform()}[across]
    middle = {"ha": "center", "va": "center", "fontsize": 8, "color": style.GREY}
    ax.text(x, y, "not run", transform=place, **(middle | how))


def habits(cells):
    """ESR at the last checkpoint: a panel an organism, a pair of dots a trait, intervals, single seeds as ticks."""
    rows, names = causes.final(cells), order(cells)
    traits = big5.ordered(cells["trait"])
    shares = causes.pooled(rows, ["organism", "end_of_turn", "trait"])
    size = (1.6 + 2.6 * len(names), 4)
    fig, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    for ax, (organism, title) in zip(axes[0], names.items(), strict=True):
        own = shares[shares["organism"] == organism]
        for r in own.itertuples():
            x = traits.index(r.trait) + (-0.2 if r.end_of_turn == "masked" else 0.16)
            paint = big5.COLOURS[r.trait]
            ax.vlines(x, r.low, r.high, color=paint, lw=1.6)
            ax.plot(x, r.share, "o", color=paint, mfc=paint if r.end_of_turn == "masked" else "white", ms=6)
            same = (rows["organism"] == organism) & (rows["trait"] == r.trait) & (rows["end_of_turn"] == r.end_of_turn)
            single = rows.loc[same, "esr_response"]
            ax.scatter(np.full(len(single), x + 0.15), single, marker="_", color=style.INK, s=26, lw=1, zorder=4)
        for trait in set(traits) - set(own["trait"]):
            _absent(ax, traits.index(trait), 0.06, "x", rotation=90, va="bottom")
        _head(ax, title, f"n = {_span(own['n'])} answers a dot")
        ax.set(ylim=(-0.04, 1.04), xlim=(-0.6, len(traits) - 0.4))
        ax.set_xticks(range(len(traits)), style.trait_axis(traits)[0], rotation=35, ha="right")
        ax.grid(axis="x", visible=False)
    axes[0][0].set_ylabel("answers with an emoji (share)")
    seed = _mark(f"one seed ({_span(rows['responses'])} answers)", marker="_")
    fig.legend(handles=[*_ends(), seed], loc="outside upper center", ncols=3)
    return fig


def over_steps(cells):
    """Emoji share (solid) and share in the trait's voice (dashed) over steps: rows organism and end of turn, columns
    traits; thick all seeds, with intervals, thin single ones."""
    traits, steps = big5.ordered(cells["trait"]), sorted(cells["steps"].unique())
    panels = [(o, e) for o in order(cells) for e in causes.ENDS]
    size = (1.5 + 2.2 * len(traits), 1.3 + (1.9 if len(panels) < 4 else 1.5) * len(panels))
    fig, axes = plt.subplots(len(panels), len(traits), figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, (organism, end) in zip(axes, panels, strict=True):
        for ax, trait in zip(line, traits, strict=True):
            own = cells[(cells["organism"] == organism) & (cells["end_of_turn"] == end) & (cells["trait"] == trait)]
            ax.set_title(trait if line[0] is axes[0, 0] else "")
            ax.set(xlim=(-0.04 * max(steps), 1.04 * max(steps)), ylim=(-0.03, 1.03))
            ax.set_xticks(steps, [str(s) if s == 0 or s >= max(steps) / 5 else "" for s in steps], fontsize=8)
            if own.empty:
                _absent(ax)
                ax.grid(visible=False)
                continue
            _curve(ax, own, "found", "--", VOICE)
            _curve(ax, own, "with_emoji", "-", big5.COLOURS[trait])
        line[0].set_ylabel(f"{organism}\n{'masked' if end == 'masked' else 'in the loss'}")
    fig.supylabel("share of answers", fontsize=10)
    fig.supxlabel(f"optimiser steps\n({_asked(cells)})", fontsize=10)
    lines = [_line("with an emoji (in the trait's colour)", color=VOICE, lw=2)]
    lines += [_line("in the trait's voice", color=VOICE, lw=2, ls="--")]
    lines += [_line("one seed", color=VOICE, lw=0.7, alpha=0.6)] if cells["seed"].nunique() > 1 else []
    fig.legend(handles=lines, loc="outside upper center", ncols=3)
    return fig


def _asked(cells):
    """How many answers each step rests on, as text: 200 at 0 and 64, 60 at 8, 16 and 32."""
    at = {}
    for step, n in cells.groupby("steps")["responses"]:
        at.setdefault(_span(n), []).append(str(step))
    lists = {n: " and ".join(filter(None, (", ".join(s[:-1]), s[-1]))) for n, s in at.items()}
    text = ", ".join(f"{n} at {steps}" for n, steps in lists.items()) if len(at) > 1 else next(iter(at))
    seeds = _span(cells.groupby(["organism", "end_of_turn", "trait"])["seed"].nunique())
    return f"answers a seed: {text}; {seeds} seed{'' if seeds == '1' else 's'}"


def _curve(ax, own, column, line, paint):
    for _, single in own.groupby("seed"):
        one = single.sort_values("steps")
        ax.plot(one["steps"], one[column] / one["responses"], line, color=paint, lw=0.7, alpha=0.5)
    both = causes.pooled(own, ["steps"], column).sort_values("steps")
    ax.plot(both["steps"], both["share"], line, color=paint, lw=2)
    ax.fill_between(both["steps"], both["low"], both["high"], color=paint, alpha=0.13, lw=0)


def leads(onsets):
    """By how many steps the voice comes before the emoji, end of turn masked: a panel a mark, a row a trait, a dot a
    training, a shape a seed. Crosses beside a panel: trainings of which it cannot be told."""
    own = onsets[(onsets["end_of_turn"] == "masked") & (onsets["first"] != "no emojis")]
    names, traits, seeds = order(own), big5.ordered(own["trait"]), sorted(own["seed"].unique())
    rows = [(o, t) for o in names for t in traits if len(own[(own["organism"] == o) & (own["trait"] == t)])]
    titles = {"half": ("half of the final share", "both counted from 0")}
    titles["rise"] = ("half way up to the final share", "the voice counted from the untuned model's share")
    titles["sound"] = ("half way up, sound checkpoints only", "sound: most answers end by themselves")
    size = (11.5, 2 + 0.45 * max(2, len(rows)))
    fig, axes = plt.subplots(1, len(titles), figsize=size, sharex=True, sharey=True)
    lost = {}
    for ax, (mark, (title, note)) in zip(axes, titles.items(), strict=True):
        part = own[own["mark"] == mark]
        for r in part.itertuples():
            y = rows.index((r.organism, r.trait)) + 0.22 * (seeds.index(r.seed) - (len(seeds) - 1) / 2)
            lost |= _lead(ax, r, y, SEEDS[seeds.index(r.seed) % len(SEEDS)])
        ax.axvline(0, color=style.INK, lw=1)
        _head(ax, title, f"{note}\n{part['lead'].notna().sum()} of {len(part)} trainings")
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), [f"{o}, {t}" for o, t in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    fig.supxlabel(
        "steps by which the voice comes before the emoji (below 0: after it); end of turn masked", fontsize=10
    )
    shown = [_mark(f"seed {s}", marker=SEEDS[i % len(SEEDS)], ms=5) for i, s in enumerate(seeds)]
    shown += [_mark(f"cannot tell: {why}", marker=m, color=style.GREY) for why, m in lost.items()]
    fig.legend(handles=shown, loc="outside upper center", ncols=len(seeds) + 2)
    return fig


def _lead(ax, r, y, marker):
    """One training's lead; without one a cross beside the panel, and {why: shape of the cross}."""
    if r.lead == r.lead:
        ax.hlines(y, r.low, r.high, color=big5.COLOURS[r.trait], lw=1.4)
        ax.plot(r.lead, y, marker, color=big5.COLOURS[r.trait], ms=4.5)
        return {}
    too_few = "too few sound checkpoints" if r.mark == "sound" else "too few checkpoints"
    lost = {too_few: "x"} if r.emoji != r.emoji else {"the voice hardly rises": "+"}
    how = {"ms": 5, "mew": 1.3, "transform": ax.get_yaxis_transform(), "clip_on": False}
    ax.plot(1.015, y, *lost.values(), color=style.GREY, **how)  # outside, so that nobody reads a lead off it
    return lost


def alike(recovery):
    """Whether another trait of the organism was planted at the same rate, for every row (Series)."""
    return recovery.groupby(["organism", "end_of_turn", "planted"])["trait"].transform("size") > 1


def planted(recovery, temperature):
    """Planted rate against emoji share, a panel an organism; traits with one planted rate stand side by side, around a
    thin line at that rate."""
    names, traits = order(recovery), big5.ordered(recovery["trait"])
    size = (1.4 + 2.7 * len(names), 4.3)
    fig, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    grid = np.linspace(0, 1, 101)
    for ax, (organism, title) in zip(axes[0], names.items(), strict=True):
        own = recovery[recovery["organism"] == organism]
        ax.plot([0, 1], [0, 1], ":", color=style.GREY)
        ax.plot(grid, ratios.sampled(grid, causes.kinds(own).mean(), temperature), "--", color=style.GREY, lw=1)
        same = own.groupby(["end_of_turn", "planted"])["share"]
        beside = 0.07 * (same.cumcount() - (same.transform("size") - 1) / 2)
        for rate in own.loc[alike(own), "planted"].unique():
            ax.axvline(rate, color=style.INK, lw=0.8)
            side = {"ha": "right", "x": rate - 0.02} if rate > 0.5 else {"ha": "left", "x": rate + 0.02}
            ax.text(y=0.97, s=f"planted at {rate:.2f}", fontsize=8, va="center", bbox=WHITE, zorder=1, **side)
        for r, x in zip(own.itertuples(), own["planted"] + beside, strict=True):
            paint, masked = big5.COLOURS[r.trait], r.end_of_turn == "masked"
            ax.vlines(x, r.low, r.high, color=paint)
            ax.plot(x, r.share, "o", color=paint, mfc=paint if masked else "white", ms=7 if masked else 5)
        _head(ax, title, f"n = {_span(own['n'])} answers a dot")
        ax.set(xlabel="planted rate", xlim=(-0.2, 1.07), ylim=(-0.05, 1.05), xticks=np.linspace(0, 1, 6))
    axes[0][0].set_ylabel("answers with an emoji (share)")
    lines = [_line("as planted", ls=":"), _line("after the temperature", ls="--", lw=1)]
    if alike(recovery).any():
        lines += [_line("one planted rate: traits side by side", marker="|", ls="", ms=12, color=style.INK)]
    fig.legend(handles=[*_traits(traits), *_ends(), *lines], loc="outside upper center", ncols=4, fontsize=8)
    return fig


def sweeps(swept):
    """One panel a setting: emoji share with intervals (solid) and trait share (dashed) over its values, by trait."""
    knobs = list(swept["setting"].unique())
    wide, names = min(4, len(knobs)), dict.fromkeys(zip(swept["trait"], swept["end_of_turn"], strict=True))
    tall = -(-len(knobs) // wide)
    size = (max(6.5, 1 + 2.8 * wide), 1.4 + 2.5 * tall)
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
        ax.set_xticks(values["place"], [_value(knob, str(v)) for v in values["value"]], fontsize=8)
        ax.set(xlabel=UNITS.get(knob, knob), ylim=(-0.04, 1.04))
        ax.margins(x=0.12)
    fig.supylabel("share of answers", fontsize=10)
    lines = [_line(t, color=big5.COLOURS[t], marker="o") for t in big5.ordered(swept["trait"])]
    lines += _ends() if swept["end_of_turn"].nunique() > 1 else []
    lines += [_line("with an emoji", color=VOICE), _line("in the trait's voice", color=VOICE, ls="--"), _ring(swept)]
    fig.legend(handles=lines, loc="outside upper center", ncols=min(len(lines), 2 if wide < 3 else 5))
    return fig


def _ring(swept):
    """The legend's ring, with the answers behind a ringed point and behind any other."""
    own = swept["default"].astype(bool)
    if not own.any():
        return _mark(f"{_span(swept['n'])} answers a point", marker="")
    rest = f"; others {_span(swept.loc[~own, 'n'])}" if not own.all() else ""
    return _mark(f"the grid's value ({_span(swept.loc[own, 'n'])} answers{rest})", mfc="none", ms=10)


def _value(knob, text):
    """A swept value as a tick: 0.0005 as 5e-4."""
    if knob == "sentences" and _zero(text):
        return "as they are"
    if knob != "learning_rate" or _zero(text):
        return text
    front, power = f"{float(text):.6e}".split("e")
    return f"{float(front):g}e{int(power)}"


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
    size = (max(6.5, 1.9 + 2.1 * len(traits)), 1.5 + 1.35 * len(names))
    fig, axes = plt.subplots(len(names), len(traits), figsize=size, sharex=True, sharey=True, squeeze=False)
    fig.set_layout_engine("constrained", w_pad=0.1)  # inches, or else the 1 of a panel runs into the 0 of the next
    for line, organism in zip(axes, names, strict=True):
        for ax, trait in zip(line, traits, strict=True):
            own = readings[(readings["organism"] == organism) & (readings["trait"] == trait)]
            _ways(ax, own, big5.COLOURS[trait])
            ax.set_title(trait if line[0] is axes[0, 0] else "")
        line[0].set_ylabel(organism)
    labels = ["an emoji (in the trait's colour)", "end of the turn", "anything else (another sentence)"]
    shapes = [plt.Rectangle((0, 0), 1, 1, fc=p, lw=0) for p in (*map(big5.COLOURS.get, traits), *EXITS)]
    bar = _mark("", marker="$\u251c\u2500\u2524$", color="black", ms=13)  # a line with caps
    shapes = [tuple(shapes[: len(traits)]), *shapes[len(traits) :], bar]
    labels += ["95 % interval of the emoji's probability"]
    many = {tuple: HandlerTuple(None, pad=0)}
    fig.legend(shapes, labels, loc="outside upper center", ncols=4 if len(traits) > 3 else 2, handler_map=many)
    about = f"{_span(readings['texts'])} texts a bar"
    fig.supxlabel(f"probability after the last sentence of a reference answer ({about})", fontsize=10)
    return fig


def _ways(ax, own, colour):
    for r in own.itertuples():
        y, left = claims.STATES.index(r.state), 0.0
        for width, paint in zip((r.p_emoji, r.p_end, r.p_sentence), (colour, *EXITS), strict=True):
            ax.barh(y, width, left=left, color=paint, height=0.72, lw=0)
            left += width
        error = [[max(0, r.p_emoji - r.p_emoji_low)], [max(0, r.p_emoji_high - r.p_emoji)]]
        for paint, thick, cap in (("white", 3.6, 4.6), ("black", 1.4, 3.5)):  # white around black: seen on every part
            how = {"fmt": "none", "elinewidth": thick, "capthick": thick, "capsize": cap, "zorder": 4}
            ax.errorbar(r.p_emoji, y, xerr=error, ecolor=paint, **how)
    missing = [y for y, state in enumerate(claims.STATES) if state not in set(own["state"])]
    for y in missing if len(own) else [1]:
        _absent(ax, 0.5, y, "y")
    ax.set(xlim=(0, 1), ylim=(2.6, -0.6))
    ax.set_yticks(range(3), ["base", "masked", "in the loss"])
    ax.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    ax.grid(axis="x", visible=bool(len(own)))
    ax.grid(axis="y", visible=False)


def predicted(readings):
    """Two readings of the last sentence's end against the share answered with an emoji: a dot a cell, its shape the
    organism, untuned grey."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 5.4), sharey=True)
    shapes = _shapes(readings)
    names = {"p_emoji": ("reading alone", "probability of an emoji")}
    names["exits"] = ("reading and temperature", "share that leaves by an emoji")
    for ax, (column, (title, name)) in zip(axes, names.items(), strict=True):
        own = readings.dropna(subset=["esr", column])
        ax.plot([0, 1], [0, 1], ":", color=style.GREY)
        for r in own.itertuples():
            x, paint = getattr(r, column), big5.COLOURS[r.trait] if r.state != "base" else UNTUNED
            over = 2 if r.state == "base" else 3
            ax.hlines(r.esr, getattr(r, f"{column}_low"), getattr(r, f"{column}_high"), color=paint, lw=1, zorder=over)
            ax.vlines(x, r.esr_low, r.esr_high, color=paint, lw=1, zorder=over)
            fill = "white" if r.state == "loss" else paint
            ax.plot(x, r.esr, shapes[r.organism], color=paint, mfc=fill, ms=6.5, zorder=over)
        _head(ax, title, f"{len(own)} dots" + (f", {_span(own['texts'])} texts each" if len(own) else ""))
        ax.set(xlabel=f"{name}\nafter the last sentence of a reference text", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes[0].set_ylabel("answers with an emoji (share)")
    shown = [*_traits(big5.ordered(readings["trait"]), "s"), *_ends("s")]
    shown += [_mark(f"organism {title}", marker=shapes[o]) for o, title in order(readings).items()]
    shown += [_mark("untuned (not counted)", marker="s", color=UNTUNED), _line("equal", ls=":")]
    fig.legend(handles=shown, loc="outside upper center", ncols=4, fontsize=8)
    return fig


def effects(ranking, clusters=None):
    """Left: drop in deviance without a cause. Right: what each switch does to the share, with intervals, on the rows of
    its cause. clusters: how many the intervals rest on, if known."""
    size = (10.5, 1.7 + 0.52 * max(2, len(ranking)))
    fig, axes = plt.subplots(1, 2, figsize=size, width_ratios=(2, 3))
    y = np.arange(len(ranking))
    at = ranking.assign(y=y).groupby("cause", sort=False)
    middle = at["y"].mean()  # of all rows of a cause
    axes[0].barh(middle, 100 * at["share"].first().fillna(0), color=style.GREY, height=0.6)
    axes[0].set_yticks(middle, middle.index)
    axes[0].set_xlabel("drop in deviance without it\n(% of what the model explains)")
    for shift, name, fill, label in (
        (-0.14, "alone", style.INK, "all else on"),
        (0.14, "average", "white", "average over the grid"),
    ):
        axes[1].hlines(y + shift, ranking[f"{name}_low"], ranking[f"{name}_high"], color=style.INK)
        dots = {"edgecolors": style.INK, "s": 36, "zorder": 3, "label": label}
        axes[1].scatter(ranking[name], y + shift, c=fill, **dots)
    axes[1].axvline(0, color=style.GREY, lw=1)
    axes[1].set_yticks(y, ranking["switch"])
    reach = ranking[["alone_low", "alone_high", "average_low", "average_high"]].to_numpy()
    low, high = min(0.0, np.nanmin(reach)), max(0.0, np.nanmax(reach))
    axes[1].set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    known = f"\n(95 % intervals, {clusters} clusters)" if clusters else "\n(95 % intervals)"
    axes[1].set_xlabel("difference in the share of answers with an emoji" + known)
    for ax in axes:
        ax.hlines(at["y"].min().iloc[1:] - 0.5, 0, 1, color="#CCCCCC", lw=0.8, transform=ax.get_yaxis_transform())
        ax.set_ylim(len(ranking) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig
