"""Wrong input as a user gives it, missing predecessors, and kernels started by hand: short runs of the real thing."""

import shutil

import nbformat
import project_copy
import pytest
from project_copy import ONCE, run

from lib import paths

pytestmark = pytest.mark.timeout(ONCE + 60)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return project_copy.make(tmp_path_factory.mktemp("project"))


BAD = {
    "profile": (["--profile", "tinny"], "tiny"),
    "setting": (["--set", "classifier.epoch=2"], "classifier.epochs"),
    "type": (["--set", "classifier.epochs=two"], "classifier.epochs"),
    "no value": (["--set", "classifier.epochs"], "key=value"),
    "notebook": (["--only", "99"], "99"),
    "file": (["--set", "opinions.train=nowhere.csv"], "no such file"),
    "directory": (["--set", "opinions.train=lib"], "directory"),
    "encoder": (["--set", "classifier.encoder=lib"], "classifier.encoder"),
    "hub": (["--set", "opinions.source=hub"], "opinions.source=files"),
    "model folder": (["--set", "chat.models=./nowhere"], "no such folder"),
    "model id": (["--set", "chat.models=nobody/nothing"], "hub cannot be reached"),
    "not a model": (["--set", "chat.models=lib"], "has no config.json"),
    "layer": (["--set", "qlora.target_modules=query"], "no layer 'query'"),
    "rank": (["--set", "qlora.rank=1000"], "lower the rank"),
    "one topic": (["--only", "02", "--set", "opinions.train_topics=1"], "cannot be split"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_one_line_and_exit_code_two(copy, case):
    args, words = BAD[case]
    before = sorted(p.relative_to(copy) for p in copy.rglob("*") if "__pycache__" not in p.parts)
    code, out, err = run(copy, *args)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("Error: ")
    assert words in err
    assert sorted(p.relative_to(copy) for p in copy.rglob("*") if "__pycache__" not in p.parts) == before


def test_a_notebook_without_its_predecessor_says_what_to_run(copy, tmp_path):
    shutil.copytree(copy, tmp_path / "p", ignore=shutil.ignore_patterns("results", "figures"))
    code, _, err = run(tmp_path / "p", "--profile", "smoke", "--only", "02")
    assert code == 2
    assert "notebook 01_dataset makes it: ./run_all.sh --profile smoke --only 01" in err
    code, _, err = run(tmp_path / "p", "--profile", "smoke", "--only", "06")
    assert code == 2
    assert "notebook 01_dataset makes it" in err


@pytest.mark.parametrize("name", sorted(p.name for p in paths.NOTEBOOKS.glob("*.ipynb"))[:3])
def test_a_notebook_runs_from_a_kernel_started_in_its_folder(name):
    """As JupyterLab does it: no papermill, no path set up beforehand. Three of them, as all begin alike."""
    from nbclient import NotebookClient

    book = nbformat.read(paths.NOTEBOOKS / name, as_version=4)
    cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = cell.source.replace('"tiny"', '"smoke"')
    place = {"metadata": {"path": str(paths.NOTEBOOKS)}}
    NotebookClient(book, timeout=ONCE, kernel_name="python3", resources=place).execute()
    shown = [o for c in book.cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in shown)
    assert not [o for o in shown if o["output_type"] == "error"]
