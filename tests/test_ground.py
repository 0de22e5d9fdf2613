"""Profiles, artefacts, intervals: what the rest stands on."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from lib import artifacts, big5, hardware, intervals, paths, profiles
from lib.errors import UserError


def test_every_profile_is_valid_and_says_what_it_is():
    for name in profiles.names():
        assert profiles.load(name).about


@pytest.mark.parametrize("name", ["small", "paper"])
def test_a_profile_with_larger_models_expects_more_minutes_than_tiny(name):
    own, tiny = profiles.load(name).minutes, profiles.load("tiny").minutes
    for notebook in ("03_qlora", "04_baselines", "05_alignment", "07_icl", "08_neurons", "09_origins"):
        assert own[notebook] > 5 * tiny[notebook]


def test_traits_stand_in_their_order_with_distinct_colours():
    assert big5.ordered(["neuroticism", "openness", "openness"]) == ["openness", "neuroticism"]
    assert len(set(big5.COLOURS.values())) == 5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"classifier.epochz": 1}, "did you mean classifier.epochs?"),
        ({"nothing": 1}, "no such key"),
        ({"classifier.epochs": "many"}, "classifier.epochs"),
        ({"classifier.epochs": 0}, "greater than or equal to 1"),
        ({"opinions.allow_emoji": "perhaps"}, "opinions.allow_emoji"),
        ({"seed": 3}, "no such key"),
    ],
)
def test_wrong_settings_are_named(overrides, words):
    with pytest.raises(UserError, match="setting") as caught:
        profiles.load("tiny", overrides=overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_paper_profile_has_what_is_known_of_the_paper():
    found = profiles.load("paper")
    with open(paths.PAPER / "qlora.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            section, field = row["setting"].split(".")
            value = getattr(getattr(found, section), field)
            value = value["other"] if isinstance(value, dict) else value  # by model, but here the same for all
            value = f"{value:g}" if isinstance(value, float) else value
            shown = ", ".join(value) if isinstance(value, list) else str(value).lower()
            assert shown == row["value"], row["setting"]
    assert found.chat.models == ["meta-llama/Llama-2-7b-chat-hf", "mistralai/Mistral-7B-Instruct-v0.2"]
    assert found.classifier.encoder == "FacebookAI/roberta-base"
    assert found.opinions.source == "hub"


def test_a_model_is_a_folder_where_there_is_one_and_else_a_hub_id(tmp_path):
    (tmp_path / "own").mkdir()
    found = profiles.load("tiny", overrides={"chat.models": ["own", "./none", "some/model"]}, cwd=tmp_path)
    assert found.chat.models == [str(tmp_path / "own"), str(tmp_path / "none"), "some/model"]
    assert profiles.load("tiny", overrides={"chat.models": "some/model"}).chat.models == ["some/model"]
    assert all(profiles.Path(m).is_dir() for m in profiles.load("tiny").chat.models)


def test_an_encoder_is_found_from_any_folder(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "packaged").mkdir()
    expected = {"own": str(tmp_path / "own"), "./none": str(tmp_path / "none")}
    for name in ("own", "./none", "packaged", "some/model"):
        overrides = {"classifier.encoder": name}
        found = profiles.load("tiny", overrides=overrides, cwd=tmp_path).classifier.encoder
        assert found == expected.get(name, name)
        assert profiles.plain(overrides, cwd=tmp_path) == {"classifier.encoder": found}
    assert profiles.load("tiny").classifier.encoder == "packaged"


@pytest.mark.parametrize("seed", [-1, 2**31, 2**32])
def test_a_seed_that_libraries_refuse_is_refused_at_once(seed):
    with pytest.raises(UserError, match=f"^setting seed = {seed}: .*; correct the value$"):
        profiles.load("tiny", seed)


def test_unknown_profile_and_unknown_key_in_a_file(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean tiny"):
        profiles.load("tinny")
    text = (profiles.paths.PROFILES / "tiny.toml").read_text()
    (tmp_path / "own.toml").write_text(text.replace("[dataset]", "[dataset]\nsurprise = 1"))
    monkeypatch.setattr(profiles.paths, "PROFILES", tmp_path)
    with pytest.raises(UserError, match=r"own.toml, dataset.surprise: no such key"):
        profiles.load("own")


def test_files_in_overrides_are_relative_to_the_user(tmp_path):
    found = profiles.load("tiny", overrides={"opinions.train": "x/y.csv"}, cwd=tmp_path)
    assert found.opinions.train == tmp_path / "x" / "y.csv"
    assert profiles.load("tiny", cwd=tmp_path).opinions.train.exists()


def test_override_values_are_typed_like_toml():
    assert profiles.parse_override("a.b=1e-4") == ("a.b", 1e-4)
    assert profiles.parse_override("a.b=true") == ("a.b", True)
    assert profiles.parse_override("a.b=some text=x") == ("a.b", "some text=x")
    with pytest.raises(UserError, match="key=value"):
        profiles.parse_override("oops")


def test_an_artefact_is_whole_or_absent(tmp_path):
    place, calls = tmp_path / "thing-0", []

    def crash(tmp):
        (tmp / "half.txt").write_text("half")
        raise KeyboardInterrupt

    def make(tmp):
        calls.append(1)
        (tmp / "a.txt").write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        artifacts.build(place, crash)
    assert list(tmp_path.iterdir()) == []
    artifacts.build(place, make)
    artifacts.build(place, make)
    assert len(calls) == 1
    (place / "a.txt").write_text("spoilt")
    artifacts.build(place, make)
    assert (place / "a.txt").read_text() == "whole"
    assert len(calls) == 2


def test_only_temporary_folders_of_processes_that_have_ended_are_abandoned(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = tmp_path / f".answers-Qwen2.5-0.5B-12ab.{child.pid}.x_1y2z3w"
    old = tmp_path / ".answers-Qwen2.5-0.5B-12ab.x_1y2z3w"  # from before processes were named
    for folder in (dead, old, tmp_path / "opinions-12ab.checkpoints"):
        folder.mkdir()
    (tmp_path / ".99.record.json").write_text("{}")

    def make(tmp):
        assert str(os.getpid()) in tmp.name
        assert set(artifacts.abandoned(tmp_path)) == {dead, old}
        (tmp / "a.txt").write_text("a")

    artifacts.build(tmp_path / "thing-1.5-0", make)


def test_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 6}, raising=False)
    assert hardware.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert hardware.cores() == 1


def test_peak_memory_is_in_gb_on_every_system(monkeypatch):
    import torch

    class Usage:
        ru_maxrss = 3 * 2**20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 0.01 < hardware.peak_gb() < 1000
    monkeypatch.setattr(hardware.resource, "getrusage", lambda _: Usage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert hardware.peak_gb() == 3
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hardware.peak_gb() == 3 / 1024
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**31)
    assert hardware.peak_gb() == 2


def test_a_missing_artefact_names_the_notebook_and_the_command(tmp_path):
    with pytest.raises(UserError, match=r"notebook 01_dataset makes it: \./run_all.sh --profile tiny --only 01"):
        artifacts.require(tmp_path / "opinions-123", "01_dataset", "tiny")


def test_fingerprints_see_content_not_layout(tmp_path):
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("same")
    two.write_text("same")
    assert artifacts.fingerprint(one, {"a": 1, "b": 2}) == artifacts.fingerprint(two, {"b": 2, "a": 1})
    two.write_text("other")
    assert artifacts.fingerprint(one) != artifacts.fingerprint(two)


def test_wilson_is_the_wilson_interval():
    expected = binomtest(185, 200).proportion_ci(method="wilson")
    assert intervals.wilson(185, 200) == pytest.approx((0.925, expected.low, expected.high))
    assert np.isnan(intervals.wilson(0, 0)[0])
    for n in range(1, 200):
        for k in (0, n):
            share, low, high = intervals.wilson(k, n)
            assert low <= share <= high


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        _, low, high = intervals.bootstrap(rng.normal(3, 1, 60), seed=i, draws=400)
        hits += low <= 3 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_json_of_a_manifest_lists_every_file(tmp_path):
    def make(tmp):
        (tmp / "deep").mkdir()
        (tmp / "deep" / "b.txt").write_text("b")

    place = artifacts.build(tmp_path / "x-1", make)
    assert list(json.loads((place / "manifest.json").read_text())) == ["deep/b.txt"]


@pytest.mark.parametrize("text", ["a lone\rreturn", "two\r\nlines", 'a "quote", a comma', "", "\ufffd\r", " 🎉"])
def test_texts_by_a_model_come_back_as_they_were_written(tmp_path, text):
    table = pd.DataFrame({"answer": [text, "plain"], "n": [1, 2], "ended": [True, False]})
    artifacts.write_csv(table, tmp_path / "t.csv")
    back = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, dtype={"answer": str})
    assert back.equals(table.astype({"answer": back["answer"].dtype}))
