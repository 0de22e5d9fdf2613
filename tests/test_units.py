"""Statistics over units: permutation, adjustment, overlap, regression; a planted unit is found first."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import permutation_test

from lib import units


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_sign_flips_by_hand():
    assert units.flips(3).tolist() == [[1, 1, 1], [1, 1, -1], [1, -1, 1], [1, -1, -1]]
    assert units.sign_flip(np.array([[1.0], [1.0], [1.0]])) == pytest.approx([0.25])  # two of eight
    assert units.sign_flip(np.array([[1.0], [-1.0]])) == pytest.approx([1])
    assert units.resolution(17) == 2 / 2**17
    assert units.sign_flip(np.ones((17, 1)))[0] == units.resolution(17)


def test_sign_flips_against_scipy():
    changes = noise(11, 6) + 0.4
    expected = [
        permutation_test((c,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue for c in changes.T
    ]
    assert units.sign_flip(changes) == pytest.approx(expected)


def test_more_pairs_than_can_all_be_tried():
    changes = noise(units.EXACT + 10, 40)
    changes[:, 7] += 2
    p = units.sign_flip(changes)
    assert p.argmin() == 7
    assert p[7] == pytest.approx(units.resolution(len(changes)))
    assert (p > 0).all()


def test_without_an_effect_p_values_are_even():
    p = units.sign_flip(noise(12, 3000))
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.015)
    assert p.mean() == pytest.approx(0.5, abs=0.03)
    assert (units.adjusted(p) < 0.05).sum() <= 1


def test_adjusted_by_hand():
    assert units.adjusted([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert len(units.adjusted([])) == 0


def test_a_planted_unit_is_found_first():
    before = {1: noise(17, 300), 0: noise(17, 300, seed=1)}
    after = {n: v + 0.1 * noise(17, 300, seed=2 + n) for n, v in before.items()}
    after[0][:, 42] += 3
    found = units.compare(before, after)
    first = found.loc[units.top(found["change"], 1)[0]]
    assert (first["layer"], first["neuron"]) == (0, 42)
    assert first["change"] == pytest.approx(3, abs=0.1)
    assert found["p_adjusted"].min() == first["p_adjusted"] < 0.01
    assert len(found) == 600
    assert (found["change"] - (found["after"] - found["before"])).abs().max() < 1e-6
    assert (found["p_adjusted"] < 0.05).sum() == 1


def test_always_on_dimensions_stand_out():
    values = {0: noise(2, 500), 1: noise(2, 500, seed=1)}
    values[1][:, 9] = -60
    values[0][0, 4] = 60  # before one prompt only
    found = units.always_on(values)
    assert found[1].argmax() == 9
    assert found[1][9] > 15
    assert found[0].max() < 6
    assert np.isfinite(units.always_on({0: np.ones((2, 4))})[0]).all()


def test_top_takes_the_largest_either_way():
    assert units.top([1.0, -5.0, 3.0, np.nan], 2).tolist() == [1, 2]
    assert units.top([np.nan, 2.0], 2).tolist() == [1]
    assert units.top([1.0], 3).tolist() == [0]


def test_overlaps():
    assert units.jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert np.isnan(units.jaccard([], []))
    both, expected, p = units.shared(range(10), range(5, 15), 100)
    assert (both, expected) == (5, 1)
    assert p == pytest.approx(0.0006, abs=2e-4)
    assert units.shared([], [1], 10) == (0, 0, 1)


def test_partners_overlap_more_than_others():
    overlaps = np.full((10, 10), 0.1)
    for i in range(0, 10, 2):
        overlaps[i, i + 1] = overlaps[i + 1, i] = 0.5
    mean, others, p = units.paired(overlaps)
    assert (mean, others) == (pytest.approx(0.5), pytest.approx(0.1))
    assert p == pytest.approx(1 / 945)  # of all ways to pair ten
    assert units.paired(np.full((10, 10), 0.1))[2] == 1
    assert units.paired(np.full((4, 4), 0.1))[0] == pytest.approx(0.1)


def seen_of(seed=0):
    """Readings of one model with two layers and two traits: unit 7 of layer 1 rises for both, unit 3 is always on."""
    base = {s: {n: noise(17, 40, seed=seed + n) for n in (1, 0)} for s in units.SITES}
    base["mlp"][0][:, 3] = 50
    tuned = {}
    for i, trait in enumerate(("openness", "extraversion")):
        tuned[trait] = {s: {n: v + 0.1 * noise(17, 40, seed=9 + i) for n, v in base[s].items()} for s in units.SITES}
        tuned[trait]["mlp"][1][:, 7] += 2
        tuned[trait]["mlp"][0][:, 3] += 9
    return {"tiny": {"base": base, **tuned}}


QUIET = np.isin(np.arange(17), (0, 16))


def test_tables_of_a_run_leave_out_what_is_always_on():
    seen = seen_of()
    stand = units.standing(seen, QUIET)
    assert list(stand.columns) == ["model", "site", "layer", "neuron", "z"]
    assert len(stand) == 2 * 2 * 40
    every = units.changes(seen, stand, 5.0)
    assert set(zip(every["layer"], every["neuron"], strict=True)) == {(n, u) for n in (0, 1) for u in range(40)}
    on = every[every["always_on"]]
    assert set(zip(on["trait"], on["site"], on["layer"], on["neuron"], strict=True)) == {
        (t, "mlp", 0, 3) for t in ("openness", "extraversion")
    }
    kept = units.largest(every, 5)
    assert list(kept.columns) == list(units.TABLE)
    assert dict(kept.groupby(["trait", "site"]).size().value_counts()) == {5: 4}
    first = kept[kept["site"] == "mlp"].groupby("trait").head(1)
    assert list(zip(first["layer"], first["neuron"], strict=True)) == [(1, 7)] * 2
    assert not ((kept["layer"] == 0) & (kept["neuron"] == 3) & (kept["site"] == "mlp")).any()


def test_selections_and_the_changes_behind_them():
    seen = seen_of()
    every = units.changes(seen, units.standing(seen, QUIET), 5.0)
    own = every[every["site"] == "mlp"]
    chosen = units.by_trait(own, 3)
    assert list(chosen) == ["openness", "extraversion"]
    at = own[own["trait"] == "openness"].reset_index(drop=True)
    assert all(picked[0] == at.index[(at["layer"] == 1) & (at["neuron"] == 7)][0] for picked in chosen.values())
    rows = units.largest(every, 1).query("site == 'mlp' and trait == 'openness'")
    grid = units.prompt_changes(seen["tiny"], rows, [f"p{i}" for i in range(17)])
    assert list(grid.columns) == ["1.7"]
    assert grid["1.7"].mean() == pytest.approx(rows["change"].item())
    shared = units.overlaps(chosen)
    assert list(shared.index) == list(shared.columns) == ["openness", "extraversion"]
    assert shared.loc["openness", "openness"] == 1
    rows = units.long(shared)
    assert list(rows.columns) == ["one", "other", "jaccard"]
    assert len(rows) == 4


def test_an_emoji_is_compared_with_the_bare_sentence():
    seen = seen_of()["tiny"]
    seen["base"]["mlp"][0][2, 11] = seen["base"]["mlp"][0][0, 11] + 30  # before the second prompt, an emoji, only
    seen["base"]["mlp"][1][2, 5] = 99  # left out
    kinds = ["neutral", *["emoji"] * 10, *["text"] * 5, "question"]
    given = pd.DataFrame({"kind": kinds, "emoji": ["", *"🌈🎨✅📝🎉😄🤗🙏😰😢", *[""] * 6]})
    left_out = np.isin(np.arange(80), [5])
    found = units.by_emoji(seen, given, "mlp", left_out, 2)
    assert list(found) == list("🌈🎨✅📝🎉😄🤗🙏😰😢")
    assert found["🎨"][0] == 40 + 11  # layer 1 comes first
    assert all(picked[0] != 40 + 11 for one, picked in found.items() if one != "🎨")
    assert not any(5 in picked for picked in found.values())


def test_slopes_against_statsmodels():
    changes, behaviour, runs = noise(16, 5), noise(16, seed=3), np.repeat(["a", "b"], [7, 9])
    found = units.slopes(changes, behaviour, runs)
    design = np.column_stack([behaviour, runs == "a", runs == "b"]).astype(float)
    for unit in range(5):
        fitted = sm.OLS(changes[:, unit], design).fit()
        assert found.loc[unit, "slope"] == pytest.approx(fitted.params[0])
        assert found.loc[unit, "t"] == pytest.approx(fitted.tvalues[0])
        assert found.loc[unit, "p"] == pytest.approx(fitted.pvalues[0])


def test_a_unit_that_follows_the_behaviour_is_found_first():
    changes, behaviour = noise(16, 400), noise(16, seed=3)
    changes[:, 17] += 5 * behaviour
    runs = np.repeat(["a", "b"], 8)
    found = units.slopes(changes, behaviour, runs)
    assert found["p"].idxmin() == 17
    assert found.loc[17, "p_adjusted"] < 0.01
    assert found.loc[17, "slope"] == pytest.approx(5, abs=1)
    chance = units.by_chance(noise(16, 400), behaviour, runs, draws=50)
    assert len(chance) == 50
    assert np.median(chance) <= 2


@pytest.mark.parametrize("behaviour", [[0.0] * 8, [0.1, 0.2]])
def test_nothing_is_claimed_from_nothing(behaviour):
    found = units.slopes(noise(len(behaviour), 3), behaviour, np.zeros(len(behaviour)))
    assert len(found) == 3
    assert found.isna().all(axis=None)
    assert units.by_chance(noise(len(behaviour), 3), behaviour, np.zeros(len(behaviour)), draws=10).sum() == 0
