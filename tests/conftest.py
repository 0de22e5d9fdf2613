"""Shared fixtures. No test needs the network."""

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest

from lib import paths

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would their own
LONG = ("test_run.py", "test_input.py")  # files that run notebooks: first, so that the others run beside them


def pytest_collection_modifyitems(items):
    """The longest files first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


REAL = paths.ROOT.parent / "shared" / "real"


@pytest.fixture
def real():
    """Folder of published opinion texts that stand beside the project, where they do."""
    if not (REAL / "personalityedit_dev.csv").exists():
        pytest.skip("the published texts are not part of the project; put them in ../shared/real to run this")
    return REAL


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Figures and results under a temporary folder."""
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    return tmp_path


HEADER = "Target Personality,Edit Topic,Question,Answer"


@pytest.fixture
def csv_file(tmp_path):
    """Write rows (trait, topic, answer) to a CSV in the published columns and return its path."""

    def write(name, rows, header=HEADER, encoding="utf-8"):
        lines = [
            f'{t},{topic},"Thinking about {topic}, What are your thoughts on {topic}?","{a}"' for t, topic, a in rows
        ]
        path = tmp_path / name
        path.write_bytes("\n".join([header, *lines, ""]).encode(encoding))
        return path

    return write


@pytest.fixture
def pair(csv_file):
    """A small, sound train and test file of two traits: (train rows, test rows, writer)."""
    words = {"extraversion": "I love parties and friends in {}", "neuroticism": "I worry and feel anxious about {}"}
    rows = {
        split: [(t, topic, text.format(topic)) for topic in topics for t, text in words.items()]
        for split, topics in {"train": ["Rome", "Oslo", "Lima"], "test": ["Cairo", "Quito"]}.items()
    }
    return rows["train"], rows["test"], csv_file


@pytest.fixture
def root():
    return Path(paths.ROOT)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a small random Llama, Mistral and Qwen, by kind."""
    import small_models

    return small_models.write_all(tmp_path_factory.mktemp("models"))
