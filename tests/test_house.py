"""The house keeps its order: imports point downwards, notebooks read as agreed, texts are true."""

import ast
import csv
import re
import subprocess

import nbformat
import pandas as pd
import pytest
import yaml

from lib import lexicon, opinions, paths

ROWS = [
    ["errors", "paths", "big5", "profiles"],
    ["artifacts", "intervals", "style", "gallery", "fanout", "hardware"],
    ["emojis", "opinions", "voices", "lexicon", "encoders", "hub", "answers", "endpoint"],
    ["tfidf", "finetune", "classifier", "cache", "chat", "organisms"],
    ["qlora", "ike", "mend"],
    ["likelihood", "trials"],
    ["units", "neurons"],
    ["wordclouds", "explain", "ratios", "judge", "alignment", "tracking", "mediation", "interventions", "origins"],
    ["icl", "intent", "attribution", "worth"],
    ["causes", "onsets", "effects", "claims", "drawings"],
    ["steps", "kernels", "run", "__main__"],
]
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))


def test_a_module_imports_only_from_its_own_row_or_above():
    rank = {name: i for i, row in enumerate(ROWS) for name in row}
    modules = {p.stem: p for p in (paths.ROOT / "lib").glob("*.py") if p.stem != "__init__"}
    assert set(modules) == set(rank)
    for name, path in modules.items():
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lib":
                parts = node.module.split(".")
                for used in [parts[1]] if len(parts) > 1 else [a.name for a in node.names]:
                    assert rank[used] <= rank[name], f"{name} imports {used}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_reads_as_agreed(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [c for c in cells if c.cell_type == "code"]
    lines = [len([x for x in c.source.splitlines() if x.strip()]) for c in code]
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    assert 35 <= len(cells) <= 60
    assert max(lines) <= 40
    assert sorted(lines)[len(lines) // 2] <= 9
    assert words >= 3 * sum(lines)
    assert not any(c.outputs or c.execution_count for c in code)
    parameters = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    assert [re.findall(r"^(\w+) =", c.source, re.M) for c in parameters] == [["profile", "seed", "overrides"]]
    assert 5 <= cells[-1].source.count("<details>") <= 8


def test_lock_and_reasons():
    wanted = [x for x in (paths.ROOT / "requirements.in").read_text().splitlines() if x and not x.startswith("#")]
    lock = (paths.ROOT / "requirements.txt").read_text()
    for line in wanted:
        name = re.match(r"[\w-]+", line).group()
        assert re.search(rf"^{name}==", lock, re.M | re.I), name
        assert "#" in line, f"{name}: say why"
    assert "--index-url" not in lock
    assert "file://" not in lock
    conda = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    assert "-r requirements.txt" in conda["dependencies"][-1]["pip"]


def test_nothing_committed_knows_a_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = paths.ROOT / name
        if path.suffix in (".png", ".pdf", ".safetensors") or not path.exists():
            continue
        text = path.read_text("utf-8")
        assert str(paths.ROOT.parent) + "/" not in text or str(paths.ROOT.parent) == "/", name
        assert not re.search(r"/(home|root|Users)/\w", text), name


def test_the_datasheet_states_what_is_measured():
    train = opinions.read_csv(paths.OPINIONS / "train.csv")
    own = lexicon.measures(train.loc[train["trait"].isin(("extraversion", "agreeableness", "neuroticism")), "answer"])
    text = (paths.OPINIONS / "DATASHEET.md").read_text()
    stated = {c[1].strip(): c[2].strip() for c in (x.split("|") for x in text.splitlines()) if len(c) == 5}
    for measure, value in own.items():
        assert stated[measure] == f"{value:.3f}".rstrip("0").rstrip("."), measure


def test_reported_numbers_say_how_sure_they_are():
    table = pd.read_csv(paths.PAPER / "reported.csv")
    assert set(table["certainty"]) <= {"seen word for word", "second-hand", "inferred"}
    assert table.notna().all(axis=None)


def test_data_files_are_rectangular():
    for path in [*paths.VOICES.glob("*.csv"), paths.OPINIONS / "topics.csv"]:
        with open(path, encoding="utf-8", newline="") as file:
            assert len({len(row) for row in csv.reader(file)}) == 1, path
