"""When a finished notebook may be reused, and what is removed before a run."""

import os

import pytest

from lib import alignment, answers, artifacts, opinions, paths, profiles, steps

BOOK = {name: paths.NOTEBOOKS / f"{name}.ipynb" for name in steps.STEPS}


@pytest.fixture
def settings(places, monkeypatch):
    """Smoke settings, in a project whose models need not be looked at."""
    monkeypatch.setattr(answers, "identity", lambda *_: [])
    return profiles.load("smoke")


def test_every_file_that_a_notebook_depends_on_is_there():
    assert {p.stem for p in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")} == set(steps.STEPS)
    for step in steps.STEPS.values():
        for pattern in step.files:
            assert list(paths.ROOT.glob(pattern)), pattern


def test_a_notebook_that_shows_other_tables_follows_them(settings):
    folder = paths.FIGURES / settings.profile
    folder.mkdir(parents=True)
    seen = [steps.fingerprint(BOOK["05_alignment"], settings)]
    for name in ("04_sensitivity", "04_seeds"):
        for text in ("ta\n0.5\n", "ta\n0.75\n"):
            (folder / f"{name}.csv").write_text(text)
            assert alignment.kept(settings, name, "04_baselines")["ta"].size == 1
            seen.append(steps.fingerprint(BOOK["05_alignment"], settings))
    assert len(set(seen)) == 5


@pytest.mark.parametrize(
    ("name", "notebooks"),
    [
        ("topics.csv", ["01_dataset", "03_qlora", "04_baselines", "07_icl"]),
        ("voices/neutral.csv", ["07_icl"]),
    ],
)
def test_notebooks_follow_the_topics_and_voices_they_use(settings, name, notebooks, monkeypatch):
    def marks():
        return {n: steps.fingerprint(BOOK[n], settings) for n in BOOK}

    before, changed, real = marks(), paths.OPINIONS / name, artifacts.digest
    monkeypatch.setattr(artifacts, "digest", lambda path: "other" if path == changed else real(path))
    after = marks()
    assert [n for n in BOOK if before[n] != after[n]] == notebooks


def made(settings, name):
    """A small artefact of the profile."""
    place = paths.RESULTS / settings.profile / name
    return artifacts.build(place, lambda tmp: (tmp / "a.txt").write_text("a"))


def test_what_several_notebooks_make_is_removed_but_not_missed(settings, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", paths.RESULTS.parent)
    monkeypatch.setattr(steps, "fingerprint", lambda *_: "same")
    heard, scores, editor = (made(settings, name) for name in ("heard-1", "scores-1", "editor-1"))
    for name in ("04_baselines", "05_alignment"):
        steps.keep(BOOK[name], settings, "same", 1, 1)
    steps.sweep(settings, [BOOK["04_baselines"]], fresh=True)
    assert [p.exists() for p in (heard, scores, editor)] == [False, True, False]
    assert steps.finished(BOOK["05_alignment"], settings)
    assert not steps.finished(BOOK["04_baselines"], settings)
    again = made(settings, "heard-1")
    steps.sweep(settings, [BOOK["05_alignment"]], fresh=False)
    assert again.exists()


@pytest.mark.parametrize("name", ["03_qlora", "04_baselines", "05_alignment"])
def test_a_notebook_made_anew_hears_its_answers_anew(settings, name):
    assert "classifier.heard(" in BOOK[name].read_text("utf-8")
    heard = made(settings, "heard-1")
    steps.sweep(settings, [BOOK[name]], fresh=True)
    assert not heard.exists()


def test_a_sweep_leaves_what_a_living_process_is_making(settings):
    folder = paths.RESULTS / settings.profile
    (folder / f".opinions-1.{2**22 + 1}.abcdefgh").mkdir(parents=True)  # Linux counts processes up to 2^22

    def make(tmp):
        (tmp / "a.txt").write_text("a")
        steps.sweep(settings, [], fresh=True)
        assert [p.name.split(".")[-2] for p in folder.glob(".*.*/")] == [str(os.getpid())]

    assert artifacts.intact(artifacts.build(opinions.folder(settings), make))
