"""A grid of small trainings on models whose pretraining is known, and sweeps around the profile's own settings.

One cell is one training (or an untuned model) with all answers that it gives: an artefact of its own, beside that of
its adapter, which is notebook 03's where model, settings and seed are the same. Cells fan out over processes; an
interrupted grid goes on where it was and loses at most the cells in flight.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from lib import answers, artifacts, big5, chat, classifier, emojis, fanout, hub, opinions, paths, qlora
from lib.errors import UserError

TRAINED = ("sentences", "rank", "learning_rate", "precision", "steps")  # sweeps that need trainings of their own
ANSWERED = ("scale", "max_new_tokens")  # sweeps over the answers of one adapter


@dataclass(frozen=True)
class Cell:
    """One training, or with `end_of_turn` "" an untuned model; in a sweep also the setting that differs."""

    habit: str
    end_of_turn: str  # "", "masked" or "loss"
    trait: str
    seed: int
    setting: str = ""
    value: float | str = ""


def grid(settings):
    """The section of the profile that says which cells there are: `grid_quick` or `grid_full`."""
    return settings.grid_quick if settings.origins.grid == "quick" else settings.grid_full


def check(settings, frame):
    """Refuse what cannot be trained or asked, before anything is loaded. Raises UserError."""
    g = grid(settings)
    lengths = {model: qlora.of_model(settings, "steps", model) for model in settings.origins.models.values()}
    last = min(lengths.values())
    name = f"grid_{settings.origins.grid}"
    if g.points[0] != 0 or sorted(set(g.points)) != g.points:
        raise UserError(
            f"{name}.points = {g.points}: optimiser steps must rise from 0, the untuned model; correct them"
        )
    if strange := [t for t in g.sweep_traits if t not in g.traits]:
        raise UserError(
            f"{name}.sweep_traits: {strange[0]!r} is not among {name}.traits, around which it is swept; add it"
        )
    if max(lengths.values()) > last:
        told = ", ".join(f"{hub.label(model)} {steps}" for model, steps in lengths.items())
        raise UserError(f"qlora.steps: unlike for the models of origins.models ({told}); give one number for all")
    if g.points[-1] > last:
        raise UserError(f"{name}.points = {g.points}: a training has qlora.steps = {last}; lower the last point")
    if lost := [p for p in g.points if p not in (0, last, *settings.qlora.keep)]:
        raise UserError(f"{name}.points: no adapter is kept after step {lost[0]}; add it to qlora.keep")
    every = [*g.traits, *g.control_traits, *g.sweep_traits]
    if missing := [t for t in every if t not in set(frame["trait"])]:
        known = ", ".join(big5.ordered(frame["trait"]))
        raise UserError(f"{name}: trait {missing[0]!r} is not in the opinions; choose from {known}")
    qlora.check_rows(settings, frame[frame["trait"].isin(every)])
    for habit, model in settings.origins.models.items():
        folder = hub.check(model)[0]
        sizes = qlora.linear_layers(folder)
        for rank in [settings.qlora.rank, *(g.rank if habit == linked(settings) else [])]:
            changed = settings.qlora.model_copy(update={"rank": rank})
            qlora.check_layers(changed, model, sizes)


def linked(settings):
    """The habit around which settings are swept: the first of `origins.models`."""
    return next(iter(settings.origins.models))


def default(settings):
    """The end of the turn around which settings are swept: the profile's own."""
    return "loss" if settings.qlora.end_of_turn else "masked"


def cells(settings):
    """All cells of the grid, one seed after the other, and of its sweeps."""
    g, found = grid(settings), []
    for seed in range(settings.seed, settings.seed + g.seeds):
        for habit in settings.origins.models:
            traits = g.traits if habit == linked(settings) else g.control_traits
            found += [Cell(habit, e, t, seed) for e in ("", "masked", "loss") for t in traits]
        if seed >= settings.seed + g.sweep_seeds:
            continue
        found += [
            Cell(linked(settings), default(settings), t, seed, setting, value)
            for setting in TRAINED
            for value in getattr(g, setting)
            for t in g.sweep_traits
            if value != own_value(settings, setting)
        ]
    return found


def own_value(settings, setting):
    """The value that a swept setting has in the grid itself; for `sentences` 0: the tuning texts as they are."""
    if setting in ("precision", "max_new_tokens"):
        return getattr(settings.chat, setting)
    if setting in ("sentences", "scale"):
        return {"sentences": 0, "scale": 1.0}[setting]
    if setting in qlora.BY_MODEL:
        return qlora.of_model(settings, setting, settings.origins.models[linked(settings)])
    return getattr(settings.qlora, setting)


def changed(settings, cell):
    """The settings of one cell's training and answers."""
    q = {"end_of_turn": cell.end_of_turn == "loss"}
    c = {}
    if cell.setting:  # a sweep looks at the end of a training only
        q["keep"] = []
    if cell.setting == "learning_rate":
        q |= {"learning_rate": {"other": cell.value}}
    if cell.setting == "steps":
        q |= {"steps": {"other": cell.value}}
    if cell.setting == "rank":  # the scale alpha / rank stays
        q |= {"rank": cell.value, "alpha": settings.qlora.alpha * cell.value / settings.qlora.rank}
    if cell.setting in ("steps", "sentences"):
        q |= {"epochs": 1e6}  # the steps decide, however few the rows
    if cell.setting == "precision":
        c |= {"precision": cell.value}
    update = {"qlora": settings.qlora.model_copy(update=q), "chat": settings.chat.model_copy(update=c)}
    return settings.model_copy(update=update | {"seed": cell.seed})


def tuning_rows(cell, train):
    """The train rows of a cell: its trait's; in the sweep of `sentences` those of exactly so many sentences."""
    own = train[train["trait"] == cell.trait]
    if cell.setting != "sentences":
        return own
    kept = own[own["answer"].map(lambda text: len(emojis.locate(text)[0])) == cell.value]
    if kept["topic"].nunique() < 20:
        raise UserError(
            f"sweep of sentences: only {len(kept)} train answers for {cell.trait} have {cell.value} sentences; "
            "take that value out of the grid"
        )
    return kept


def questions(settings, test, trait, every):
    """The test rows of a trait that a cell answers: `answers.asked`, or a draw of `origins.topics` of their topics."""
    test = answers.asked(settings, test)
    topics = test["topic"].drop_duplicates()
    if not every:
        topics = topics.sample(min(settings.origins.topics, len(topics)), random_state=0)
    return test[(test["trait"] == trait) & test["topic"].isin(topics)].reset_index(drop=True)


def adapter(settings, cell, train):
    """Where a cell's finished adapter is, trained if need be; None for the untuned model."""
    if not cell.end_of_turn:
        return None
    own, model = changed(settings, cell), settings.origins.models[cell.habit]
    return qlora.train(own, model, cell.trait, tuning_rows(cell, train), show=False)


def folder(settings, cell):
    """Where a cell is kept: settings, texts, weights and code decide about the name."""
    from lib import trials

    g, own = grid(settings), changed(settings, cell)
    model = settings.origins.models[cell.habit]
    values = [asdict(cell), qlora.values(own, model), own.chat.model_dump(mode="json", exclude={"models"})]
    if not cell.end_of_turn:
        values[1] = None
    values += [g.points, settings.origins.topics, cell.end_of_turn and swept_answers(settings, cell)]
    judge = classifier.folder("encoder", settings, classifier.read_opinions(settings)[0], settings.seed).name
    code = [artifacts.code(m) for m in ("cache", "chat", "classifier", "emojis", "hub", "finetune", "qlora")]
    mark = artifacts.fingerprint(values, hub.identity(model), opinions.fingerprint(settings), judge, code, trials)
    tuned = cell.end_of_turn or "base"
    return paths.RESULTS / settings.profile / f"origin-{hub.label(model)}-{tuned}-{cell.trait}-{cell.seed}-{mark}"


def swept_answers(settings, cell):
    """[(setting, value)] of the sweeps that ask this cell's own adapter again."""
    g = grid(settings)
    centre = cell.habit == linked(settings) and cell.end_of_turn == default(settings) and not cell.setting
    if not centre or cell.trait not in g.sweep_traits or cell.seed >= settings.seed + g.sweep_seeds:
        return []
    return [(s, v) for s in ANSWERED for v in getattr(g, s) if v != own_value(settings, s)]


def run(settings, show=True):
    """Train and ask whatever cells are missing, in `machine.processes` processes. Raises UserError."""
    frame = opinions.read(settings)
    check(settings, frame)
    classifier.trained("encoder", settings, settings.seed)
    todo = [(settings, cell) for cell in cells(settings) if not artifacts.intact(folder(settings, cell))]
    for _, cell in todo:
        tuning_rows(cell, frame[frame["split"] == "train"])
    fanout.each(settings, build, todo, show=show)


def build(settings, cell):
    """The artefact of one cell: `answers.csv`; the adapter of a training is one of its own."""
    return artifacts.build(folder(settings, cell), lambda tmp: _fill(settings, cell, tmp))


def _fill(settings, cell, tmp):
    """Train one cell, ask it at every point, and write its answers with what the classifier finds in them."""
    frame, own = opinions.read(settings), changed(settings, cell)
    train, test = (frame[frame["split"] == s] for s in ("train", "test"))
    model, points = settings.origins.models[cell.habit], {0: None}
    finished = adapter(settings, cell, train)
    if finished:
        kept, asked = qlora.course(finished), [] if cell.setting else grid(settings).points
        points = {step: kept[step] for step in kept if step in asked or kept[step] == finished}
    last = max(points)  # fewer steps than set where the epochs end first
    speaker, parts = chat.load(model, own.chat.precision), []
    for steps, place in points.items():
        every = steps in (0, last) and not cell.setting
        rows = questions(settings, test, cell.trait, every)
        parts.append(ask(own, speaker, rows, place).assign(steps=steps, setting=cell.setting, value=str(cell.value)))
    for setting, value in swept_answers(settings, cell) if cell.end_of_turn else []:
        off = (setting, value) == ("scale", 0)  # compared with the untuned model's answers, one by one
        rows = questions(settings, test, cell.trait, every=off)
        again = ask(own, speaker, rows, finished, **{setting: value})
        parts.append(again.assign(steps=last, setting=setting, value=str(value)))
    given = pd.concat(parts, ignore_index=True)
    judged = classifier.predict(classifier.trained("encoder", settings, settings.seed), given)
    artifacts.write_csv(given.assign(found=judged["predicted"] == judged["trait"]), Path(tmp) / "answers.csv")


def ask(settings, speaker, rows, adapter, scale=1.0, max_new_tokens=None):
    """Answers to the questions of rows of one trait, with an adapter at a scale (0: off, 1: as trained) or without.

    All cells of a trait and seed draw the same random numbers, so that like models give like answers.
    """
    from peft.helpers import rescale_adapter_scale

    if max_new_tokens is not None:
        settings = settings.model_copy(
            update={"chat": settings.chat.model_copy(update={"max_new_tokens": max_new_tokens})}
        )
    with chat.adapted(speaker, adapter and str(adapter)) as tuned:
        scaled = rescale_adapter_scale(tuned.model, scale) if scale != 1 else nullcontext()
        with scaled:
            return qlora.ask(settings, tuned, "peft", rows, show=False)


def read(settings, cell):
    """The answers of one cell. Raises UserError if it has not been made."""
    place = artifacts.require(folder(settings, cell), "09_origins", settings.profile)
    return pd.read_csv(
        place / "answers.csv", keep_default_na=False, dtype={"answer": str, "setting": str, "value": str}
    )
