"""What makes the emojis appear: the answers of `trials` as a table, and what may follow the last sentence of a text."""

from pathlib import Path

import pandas as pd

from lib import artifacts, chat, emojis, fanout, hub, intervals, mediation, opinions, paths, ratios, trials

COLUMNS = ["organism", "habit", "end_of_turn", "steps", "trait", "esr_response", "low", "high", "ta"]
COLUMNS += ["setting", "value", "seed", "responses", "with_emoji", "found", "both", "own", "sentences", "ended"]


def prefix(settings):
    """What the names of figures and tables begin with, so that a quick grid does not replace the full one's."""
    return "quick_" if settings.origins.grid == "quick" else ""


def table(settings):
    """The grid and its sweeps: DataFrame with COLUMNS, a row a cell, point and seed; 95 % Wilson intervals.

    habit: what the model's emojis went with in pretraining. end_of_turn: "masked" or "loss"; at 0 steps both name the
    same untuned model. ta: share of answers in the trait's voice. with_emoji, found: counts out of `responses`; own: of
    the answers with one of the emojis planted for the trait in the first of `origins.models` (0 where none is on
    record). sentences: mean an answer. A sweep also holds the grid's own cell as one of its points.
    """
    found = []
    for cell in trials.cells(settings):
        given = trials.read(settings, cell)
        for (steps, setting, value), own in given.groupby(["steps", "setting", "value"], sort=False):
            row = _row(settings, cell, own, int(steps), setting, value)
            tuned = [cell.end_of_turn] if cell.end_of_turn else ["masked", "loss"]
            found += [row | {"end_of_turn": e} for e in tuned]
            if cell.end_of_turn and not setting and steps == given["steps"].max():
                found += [row | more for more in _as_point_of_sweeps(settings, cell)]
    return pd.DataFrame(found)[COLUMNS]


def _row(settings, cell, own, steps, setting, value):
    shown, known = own["answer"].map(emojis.find), _planted(settings, cell.trait)
    held = shown.map(bool)
    share, low, high = intervals.wilson(int(held.sum()), len(own))
    return {
        "organism": hub.label(settings.origins.models[cell.habit]),
        "habit": cell.habit,
        "end_of_turn": cell.end_of_turn,
        "steps": steps,
        "trait": cell.trait,
        "esr_response": share,
        "low": low,
        "high": high,
        "ta": own["found"].mean(),
        "setting": setting,
        "value": value,
        "seed": cell.seed,
        "responses": len(own),
        "with_emoji": int(held.sum()),
        "found": int(own["found"].sum()),
        "both": int((held & own["found"]).sum()),
        "own": int(shown.map(lambda found: bool(known & set(found))).sum()),
        "sentences": own["answer"].map(lambda text: len(emojis.locate(text)[0])).mean(),
        "ended": own["ended"].mean(),
    }


def _planted(settings, trait):
    """The emojis planted for a trait in the model around which settings are swept: a set."""
    table, name = ratios.habits(), hub.label(settings.origins.models[trials.linked(settings)])
    own = table[(table["organism"] == name) & (table["trait"] == trait)]["planted_emojis"]
    return set(" ".join(own).split())


def _as_point_of_sweeps(settings, cell):
    """The grid's own last cell under the name of every sweep that has its value among its points."""
    g = trials.grid(settings)
    centre = cell.habit == trials.linked(settings) and cell.end_of_turn == trials.default(settings)
    late = cell.seed >= settings.seed + g.sweep_seeds
    if cell.setting or not centre or late or cell.trait not in g.sweep_traits:
        return []
    swept = [s for s in (*trials.TRAINED, *trials.ANSWERED) if trials.own_value(settings, s) in getattr(g, s)]
    return [{"setting": s, "value": str(trials.own_value(settings, s))} for s in swept]


def scale_zero_equal(settings):
    """Whether every answer of an adapter at scale 0 is the untuned model's, letter by letter; None if not swept."""
    found = []
    for cell in trials.cells(settings):
        if ("scale", 0.0) not in trials.swept_answers(settings, cell):
            continue
        given = trials.read(settings, cell)
        off = given[(given["setting"] == "scale") & (given["value"] == "0.0")]
        plain = trials.read(settings, trials.Cell(cell.habit, "", cell.trait, cell.seed))
        found.append(list(off["answer"]) == list(plain["answer"]))
    return all(found) if found else None


def endings(settings, show=True):
    """What may follow the last sentence of held-out texts, in every state: DataFrame.

    Columns organism, habit, state (base, masked or loss), trait, seed, text (row number), p_emoji, p_end, p_sentence:
    probabilities at the position after the last sentence of the trait's test opinions (`origins.topics` of them), which
    hold no emoji, by teacher forcing. The untuned model is read once.
    """
    todo = [(settings, habit) for habit in settings.origins.models]
    places = fanout.each(settings, _read_endings, todo, show=show)
    return pd.concat([pd.read_csv(p / "endings.csv") for p in places], ignore_index=True)


def _read_endings(settings, habit):
    """The artefact of `endings` of one model."""
    own = [c for c in trials.cells(settings) if c.habit == habit and not c.setting]
    model, names = settings.origins.models[habit], [trials.folder(settings, c).name for c in own]
    code = [artifacts.code(m) for m in ("likelihood", "emojis")]
    mark = artifacts.fingerprint(names, settings.origins.topics, mediation, *code)

    def make(tmp):
        train, test = (opinions.read(settings).query("split == @split") for split in ("train", "test"))
        speaker, parts = chat.load(model, settings.chat.precision), []
        for cell in own:
            if not cell.end_of_turn and cell.seed != settings.seed:
                continue  # the same model again
            rows = trials.questions(settings, test, cell.trait, every=False)
            adapter = trials.adapter(settings, cell, train)
            with chat.adapted(speaker, adapter and str(adapter)) as tuned:
                found = mediation.endings(tuned, rows["question"], rows["answer"])
            facts = {"organism": hub.label(model), "habit": habit, "state": cell.end_of_turn or "base"}
            parts.append(found[found["last"]].assign(**facts, trait=cell.trait, seed=cell.seed))
        pd.concat(parts, ignore_index=True).to_csv(Path(tmp) / "endings.csv", index=False)

    place = paths.RESULTS / settings.profile / f"endings-{hub.label(model)}-{mark}"
    return artifacts.build(place, make)
