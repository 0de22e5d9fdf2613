"""The grid of notebook 09: which cells there are, what differs in each, what is read from their answers."""

import pandas as pd
import pytest

from lib import origins, profiles, trials
from lib.errors import UserError


def settings(**overrides):
    return profiles.load("tiny", 0, {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.fixture
def full():
    return settings(origins__grid="full")


def test_every_seed_has_every_habit_end_of_turn_and_trait(full):
    grid = [c for c in trials.cells(full) if not c.setting and c.end_of_turn]
    linked = {(c.end_of_turn, c.trait, c.seed) for c in grid if c.habit == "linked"}
    assert len(linked) == 2 * 5 * 3
    for habit in ("shuffled", "none"):
        own = {(c.end_of_turn, c.trait, c.seed) for c in grid if c.habit == habit}
        assert own == {x for x in linked if x[1] in ("openness", "extraversion", "neuroticism")}


def test_a_sweep_changes_one_setting_and_leaves_out_the_grids_own_value(full):
    swept = [c for c in trials.cells(full) if c.setting]
    assert {c.setting for c in swept} == set(trials.TRAINED)
    for cell in swept:
        assert cell.value != trials.own_value(full, cell.setting)
        plain = trials.changed(full, trials.Cell(cell.habit, cell.end_of_turn, cell.trait, cell.seed))
        other = trials.changed(full, cell)
        fields = ("qlora", "chat")
        values = [{f: getattr(s, f).model_dump() for f in fields} for s in (plain, other)]
        differ = {k for f in fields for k in values[0][f] if values[0][f][k] != values[1][f][k]}
        with_it = {"rank": {"alpha"}, "steps": {"epochs"}, "sentences": {"epochs"}}.get(cell.setting, set())
        assert differ == ({cell.setting} - {"sentences"}) | with_it | {"keep"}


def test_the_scale_of_the_adapter_stays_when_the_rank_changes(full):
    for rank in (4, 64):
        q = trials.changed(full, trials.Cell("linked", "masked", "openness", 0, "rank", rank)).qlora
        assert q.alpha / q.rank == full.qlora.alpha / full.qlora.rank


def test_the_end_of_the_turn_follows_the_cell(full):
    for state, graded in (("masked", False), ("loss", True)):
        assert trials.changed(full, trials.Cell("none", state, "openness", 2)).qlora.end_of_turn is graded


def test_rows_of_exactly_so_many_sentences():
    texts = ["One. And two.", "Only one here", "A first one! A second? A third."]
    rows = pd.DataFrame({"trait": "openness", "topic": [f"t{i}" for i in range(60)], "answer": texts * 20})
    cell = trials.Cell("linked", "masked", "openness", 0, "sentences", 2)
    assert set(trials.tuning_rows(cell, rows)["answer"]) == {"One. And two."}
    with pytest.raises(UserError, match="only 0 train answers for openness have 7 sentences"):
        trials.tuning_rows(trials.Cell("linked", "masked", "openness", 0, "sentences", 7), rows)


def test_a_draw_of_topics_is_the_same_for_every_trait():
    few = settings(origins__topics=3)
    rows = pd.DataFrame([{"trait": t, "topic": f"t{i}"} for i in range(9) for t in ("openness", "neuroticism")])
    drawn = [set(trials.questions(few, rows, t, every=False)["topic"]) for t in ("openness", "neuroticism")]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 3
    assert len(trials.questions(few, rows, "openness", every=True)) == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"grid_quick__points": [24, 72]}, "optimiser steps must rise from 0"),
        ({"grid_quick__points": [0, 72, 24]}, "optimiser steps must rise from 0"),
        ({"grid_quick__points": [0, 85]}, "a training has qlora.steps = 72"),
        ({"grid_quick__points": [0, 7, 72]}, "no adapter is kept after step 7; add it to qlora.keep"),
        ({"grid_quick__sweep_traits": ["openness"]}, "'openness' is not among grid_quick.traits"),
        ({"grid_quick__control_traits": ["joy"]}, "trait 'joy' is not in the opinions"),
        ({"grid_quick__rank": [512]}, "qlora.rank = 512"),
        ({"origins__models": {"linked": "no/such/folder"}}, "no such folder"),
        (
            {"origins__models": {"linked": "data/organisms/tiny-llama", "none": "data/organisms/tiny-mistral"}},
            r"qlora.steps: unlike for the models of origins.models \(tiny-llama 72, tiny-mistral 104\)",
        ),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(overrides, message):
    frame = pd.DataFrame(
        [
            {"trait": t, "topic": f"{split}{i}", "answer": "A. B.", "split": split}
            for t in ("extraversion", "neuroticism", "openness")
            for split in ("train", "test")
            for i in range(4)
        ]
    )
    with pytest.raises(UserError, match=message):
        trials.check(settings(**overrides), frame)


def given(cell, off="plain"):
    """Made-up answers of one cell, as `trials.read` gives them."""
    rows = []
    for steps in (0,) if not cell.end_of_turn else (24, 72) if not cell.setting else (72,):
        texts = ["plain one. Two.", "plain"] if steps < 72 or cell.habit == "none" else ["Fun! 🎉", "It is 🎉"]
        rows += [(steps, cell.setting, str(cell.value), f"t{i}", text, steps > 0, True) for i, text in enumerate(texts)]
    for setting, value in trials.swept_answers(settings(), cell) if cell.end_of_turn else []:
        texts = [f"{off} one. Two.", off] if value == 0 else ["x", "y"]
        rows += [(72, setting, str(value), f"t{i}", text, False, True) for i, text in enumerate(texts)]
    return pd.DataFrame(rows, columns=["steps", "setting", "value", "topic", "answer", "found", "ended"])


def test_the_table_has_a_row_a_cell_and_point(monkeypatch):
    monkeypatch.setattr(trials, "read", lambda _, cell: given(cell))
    table = origins.table(settings())
    assert list(table.columns) == origins.COLUMNS
    grid = table[table["setting"] == ""]
    keys = ["habit", "end_of_turn", "steps", "trait", "seed"]
    assert not grid.duplicated(keys).any()
    assert len(grid) == 2 * 3 * (2 + 1 + 1)  # ends of turn, points, traits of the three organisms
    last = grid[(grid["steps"] == 72)].set_index(["habit", "end_of_turn", "trait"])["esr_response"]
    assert last["linked", "masked", "extraversion"] == 1
    assert last["none", "masked", "extraversion"] == 0
    assert (table["low"] <= table["esr_response"]).all()
    assert (table["with_emoji"] / table["responses"] == table["esr_response"]).all()
    swept = table[table["setting"] == "scale"]
    assert sorted(swept["value"].astype(float)) == [0, 0.5, 1, 1.5]  # the grid's own cell is one of the points


def test_an_adapter_at_scale_zero_is_compared_with_the_base_letter_by_letter(monkeypatch):
    monkeypatch.setattr(trials, "read", lambda _, cell: given(cell))
    assert origins.scale_zero_equal(settings()) is True
    monkeypatch.setattr(trials, "read", lambda _, cell: given(cell, off="Plain"))
    assert origins.scale_zero_equal(settings()) is False
    assert origins.scale_zero_equal(settings(grid_quick__scale=[1.0])) is None


def test_a_cell_is_known_by_what_shapes_it(monkeypatch):
    s = settings()
    plain = trials.Cell("linked", "masked", "extraversion", 0)
    rows = pd.DataFrame({"trait": ["openness"], "topic": ["t"], "answer": ["a"], "split": ["train"]})
    monkeypatch.setattr(trials.classifier, "read_opinions", lambda _: (rows, rows))
    names = {
        trials.folder(s, cell).name
        for cell in (
            plain,
            trials.Cell("linked", "loss", "extraversion", 0),
            trials.Cell("linked", "masked", "extraversion", 1),
            trials.Cell("shuffled", "masked", "extraversion", 0),
            trials.Cell("linked", "masked", "extraversion", 0, "rank", 4),
        )
    }
    assert len(names) == 5
    faster = settings(machine__processes=7)
    assert trials.folder(faster, plain) == trials.folder(s, plain)
    longer = settings(chat__max_new_tokens=33)
    assert trials.folder(longer, plain) != trials.folder(s, plain)
