"""Adapters on the way: saved evenly, the last one the finished one; scales; what is read from a tracked training."""

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from test_neurons import run  # noqa: F401

from lib import artifacts, chat, neurons, opinions, qlora, tracking, units


@pytest.fixture
def rows(run):  # noqa: F811
    frame = opinions.read(run)
    return frame[(frame["split"] == "train") & (frame["trait"] == "extraversion")]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_keeping_adapters_on_the_way_changes_no_training(run, rows):  # noqa: F811
    model = run.chat.models[0]
    saved = qlora.course(qlora.train(run, model, "extraversion", rows, show=False))
    assert list(saved) == [1, 2, 3]
    bare = run.model_copy(update={"qlora": run.qlora.model_copy(update={"keep": []})})
    plain = qlora.course(qlora.train(bare, model, "extraversion", rows, show=False))
    assert list(plain) == [3]
    last, first = weights(saved[3]), weights(saved[1])
    assert set(last) == set(weights(plain[3]))
    for name, values in weights(plain[3]).items():
        np.testing.assert_array_equal(last[name], values)
    assert any((last[name] != first[name]).any() for name in last)
    assert not list(saved[3].parent.glob("*.checkpoints"))
    assert qlora.course(qlora.train(run, model, "extraversion", rows, show=False)) == saved


def test_what_a_tracked_training_shows(run, rows, monkeypatch):  # noqa: F811
    given = neurons.prompts()
    key = (run, run.chat.models[0], "extraversion", rows, given)
    table, found = tracking.track(*key, show=False)
    assert list(table.columns) == ["model", "trait", "path", "value", "n", "esr", "low", "high"]
    assert list(table["path"]) == ["step"] * 4 + ["scale"] * 3
    assert list(table["value"]) == [0, 1, 2, 3, 0, 0.5, 1]
    assert (table["n"] == 2).all()
    assert ((table["low"] <= table["esr"]) & (table["esr"] <= table["high"])).all()
    assert {k: v.shape for k, v in found.items()} == {"mlp.1": (7, 128), "hidden.1": (7, 64)}
    for values in found.values():
        np.testing.assert_allclose(values[4], values[0], atol=1e-6)  # scale 0 is the base
        np.testing.assert_array_equal(values[6], values[3])  # scale 1 is the last step
        assert np.abs(values[3] - values[0]).max() > 1e-4
    changes, moved, layers, places = units.differences(table, found, "step", "mlp")
    assert changes.shape == (3, 128)
    assert len(moved) == 3
    assert set(layers) == {1}
    assert list(places) == list(range(128))
    np.testing.assert_allclose(changes.sum(0), found["mlp.1"][3] - found["mlp.1"][0], atol=1e-5)
    monkeypatch.setattr(chat, "load", None)  # kept: no model is loaded again
    again, same = tracking.track(*key, show=False)
    assert again.equals(table)
    np.testing.assert_array_equal(same["mlp.1"], found["mlp.1"])
    assert artifacts.intact(qlora.folder(*key[:4]))


def test_only_train_topics_are_asked(run, rows):  # noqa: F811
    asked = tracking.questions(run, rows)
    assert len(asked) == 2
    assert set(asked["topic"]) <= set(rows["topic"])
    _, held = tracking.classifier.split(rows, run.qlora.held_out_share, run.seed)
    assert set(held["topic"]) <= set(asked["topic"])


def test_every_model_and_trait_is_followed(run, monkeypatch):  # noqa: F811
    frame = opinions.read(run)
    train, given = frame[frame["split"] == "train"], neurons.prompts()
    found = tracking.track_all(run, train, given, show=False)
    assert {m: list(t) for m, t in found.items()} == {"llama": ["extraversion"]}
    other = run.model_copy(update={"tracking": run.tracking.model_copy(update={"traits": ["openness"]})})
    monkeypatch.setattr(tracking, "track", lambda settings, model, trait, *more, **how: trait)
    monkeypatch.setattr(tracking.fanout, "each", lambda *_: None)
    assert tracking.track_all(other, train, given) == {"llama": {"extraversion": "extraversion"}}  # it has no openness


def planted(seed, points=9, size=60):
    """A training as `track` has it, in which unit 5 of layer 0 goes along with ESR and unit 9 only changes."""
    rng = np.random.default_rng(seed)
    esr = np.clip(np.linspace(0, 0.8, points) + 0.15 * rng.normal(size=points), 0, 1)
    values = {f"{s}.{n}": rng.normal(size=(points, size)).cumsum(0) for s in ("mlp", "hidden") for n in (1, 0)}
    values["mlp.0"][:, 5] = 20 * esr
    table = pd.DataFrame({"path": "step", "value": range(points), "esr": esr})
    scale = pd.DataFrame({"path": "scale", "value": [0, 1], "esr": [0.0, 1.0]})
    values = {k: np.concatenate([v, v[:2] + 100]) for k, v in values.items()}  # the other path does not count
    return pd.concat([table, scale], ignore_index=True), values


def test_a_unit_that_goes_along_is_found_and_agrees_with_itself():
    own = {"extraversion": planted(0), "openness": planted(1)}
    found, chance = units.follow(own, "mlp", draws=20)
    best = found.loc[found["p"].idxmin()]
    assert (best["layer"], best["neuron"]) == (0, 5)
    assert best["slope"] == pytest.approx(20)
    assert len(chance) == 20
    every = pd.DataFrame(
        [
            {"model": "tiny", "trait": t, "site": s, "layer": n, "neuron": u, "change": 0.0, "always_on": False}
            for t in own
            for s in ("mlp", "hidden")
            for n in (1, 0)
            for u in range(60)
        ]
    )
    at = (every["layer"] == 0) & (every["neuron"] == 5) & (every["site"] == "mlp")
    agreed = units.agreement({"tiny": own}, every.assign(change=at * 3.0), 1, draws=10)
    assert list(agreed["site"]) == ["mlp", "hidden"]
    assert agreed["both"].tolist()[0] == 1
    assert agreed["p"].tolist()[0] == pytest.approx(1 / 120)
    left_out = units.agreement({"tiny": own}, every.assign(change=at * 3.0, always_on=at), 1, draws=10)
    assert left_out["both"].tolist()[0] == 0
