"""The readings of notebook 09 on made-up grids whose causes are known: each is found where it is, and only there."""

import made_up_grid
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from lib import causes, claims, drawings, effects
from lib import onsets as first_of
from lib.errors import UserError


@pytest.fixture(scope="module")
def table():
    return causes.check(made_up_grid.table())


@pytest.fixture(scope="module")
def cells(table):
    return causes.grid(table)


@pytest.fixture(scope="module")
def silent():
    """A grid without a single emoji, as a smoke run gives it."""
    return causes.grid(causes.check(made_up_grid.quick(organisms=("none",), steps=(0, 1, 2), n=12)))


def everything(cells, endings, seed=0):
    """All claims of a grid, by claim."""
    gaps, onsets = causes.gaps(cells), first_of.measure(cells, seed, draws=100)
    read = claims.mechanism(endings, cells, 0.7, seed, draws=100)
    return claims.every(cells, gaps, causes.recovery(cells, 0.7), onsets, read).set_index("claim")["verdict"]


def test_a_table_with_a_missing_column_or_impossible_counts_is_refused(table):
    with pytest.raises(UserError, match="column 'ta' is missing"):
        causes.check(table.drop(columns="ta"))
    with pytest.raises(UserError, match="more answers than were given"):
        causes.check(table.assign(with_emoji=table["responses"] + 1))
    assert (causes.check(table.assign(setting=np.nan))["setting"] == "").all()


def test_planted_rates_are_looked_up_by_organism_and_controls_by_habit():
    rows = pd.DataFrame(
        {"organism": ["tiny-llama", "x/shuffled", "other", "own"], "habit": ["linked", "shuffled", "none", "?"]}
    )
    rates = causes.planted(rows.assign(trait="extraversion"))
    assert list(rates[:3]) == [0.97, 0.564, 0.0]
    assert np.isnan(rates[3])
    assert list(causes.kinds(rows.assign(trait="extraversion"))) == [4, 20, 4, 4]


def test_seeds_that_scatter_widen_the_interval():
    even = pd.DataFrame({"cell": "a", "responses": 100, "with_emoji": [50, 50, 50], "seed": [0, 1, 2]})
    apart = even.assign(with_emoji=[20, 50, 80])
    one, other = (causes.pooled(rows, ["cell"]).iloc[0] for rows in (even, apart))
    assert one["share"] == other["share"] == 0.5
    assert other["high"] - other["low"] > 3 * (one["high"] - one["low"])
    assert causes.pooled(even.assign(with_emoji=0), ["cell"])["high"].iloc[0] < 0.02


def test_half_of_a_curve_is_found_between_checkpoints():
    steps = [0, 10, 20, 40]
    assert first_of.reached(steps, [0, 0, 0.8, 0.8]) == pytest.approx(15)
    assert first_of.reached(steps, [0.4, 0.4, 0.8, 0.8], 0.4) == pytest.approx(15)
    assert first_of.reached(steps, [0.4, 0.4, 0.8, 0.8]) == 0
    assert first_of.reached(steps, [0, 0.9, 0.5, 0.4]) == pytest.approx(10 * 0.2 / 0.9)  # it may overshoot
    assert np.isnan(first_of.reached(steps, [0, 0, 0, 0.01]))
    many = first_of.reached(steps, np.array([[0, 0, 0.8, 0.8], [0, 0.8, 0.8, 0.8]]))
    assert many == pytest.approx([15, 5])


@pytest.mark.parametrize(("late", "first"), [(10, "voice"), (-8, "emoji"), (0, "cannot tell")])
def test_what_comes_first_is_found(late, first):
    own = causes.grid(made_up_grid.table(organisms=("tiny-llama",), traits=("extraversion",), late=late, n=400))
    onsets = first_of.measure(own, 0).query("end_of_turn == 'masked'")
    assert set(onsets["mark"]) == {"half", "rise", "sound"}
    assert onsets.query("mark == 'rise'")["first"].mode()[0] == first
    table = first_of.leads(onsets).set_index("mark")
    assert table.loc["rise", "trainings"] == 3
    assert table.loc["rise", ["voice first", "emoji first", "cannot tell"]].sum() == 3


def test_what_a_classifier_finds_in_broken_text_is_no_voice():
    """A voice that seems there at step 8, in answers that never end: only the sound checkpoints tell."""
    own = causes.grid(made_up_grid.table(organisms=("tiny-llama",), traits=("extraversion",), late=0, n=400))
    early = own["steps"] == 8
    own = own.assign(found=own["found"].where(~early, 360), ended=own["ended"].where(~early, 0.1))
    first = (
        first_of.measure(own, 0).query("end_of_turn == 'masked'").groupby("mark")["first"].agg(lambda f: f.mode()[0])
    )
    assert first["rise"] == "voice"
    assert first["sound"] == "cannot tell"
    assert claims.voice_first(first_of.measure(own, 0))[0] == "undecided here"
    broken = own.assign(ended=0.1)
    assert set(first_of.measure(broken, 0).query("mark == 'sound' and end_of_turn == 'masked'")["first"]) == {
        "cannot tell"
    }


def test_nothing_comes_first_where_there_are_no_emojis(silent):
    onsets = first_of.measure(silent, 0)
    assert set(onsets["first"]) == {"no emojis"}
    assert onsets["lead"].isna().all()
    assert first_of.leads(onsets).empty


def test_a_share_that_falls_again_is_told(cells):
    assert first_of.peaks(cells[cells["habit"] == "none"]).empty
    own = cells.query("trait == 'extraversion' and habit == 'linked' and organism == 'tiny-llama' and seed == 0").copy()
    at = (own["steps"] == 64) & (own["end_of_turn"] == "masked")
    own.loc[at, ["esr_response", "low", "high"]] = 0.5, 0.43, 0.57
    fell = first_of.peaks(own)
    assert list(fell["peak"]) == [32]
    assert list(fell["end_of_turn"]) == ["masked"]


def test_emojis_are_counted_in_the_voice_and_outside(cells):
    at = "end_of_turn == 'masked' and steps == 64 and organism == 'tiny-llama'"
    table = first_of.by_voice(cells).query(at)
    assert set(table["trait"]) == {"openness", "extraversion", "agreeableness", "neuroticism"}  # the strong ones
    own = cells.query(f"{at} and trait == 'neuroticism'")
    table = table.set_index("trait").loc["neuroticism"]
    assert table["voiced"] == own["found"].sum()
    assert table["voiced"] * table["voiced_share"] == pytest.approx(own["both"].sum())
    assert table["other"] + table["voiced"] == own["responses"].sum()


def test_gaps_hold_where_made_and_only_there(cells):
    gaps = causes.gaps(cells)
    strong = gaps[(gaps["habit"] == "linked") & (gaps["planted"] >= 0.5)]
    assert (strong["low"] > 0).all()
    assert (gaps[gaps["habit"] == "none"]["gap"] == 0).all()
    alike = causes.gaps(causes.grid(made_up_grid.table(loss=1.0)))
    assert (alike["low"] > 0).mean() < 0.1


def test_sweeps_get_the_grids_own_point_once(table):
    swept = causes.sweeps(table, {"rank": "16", "precision": "nf4"})
    rank = swept[(swept["setting"] == "rank") & (swept["trait"] == "extraversion")]
    assert list(rank["value"]) == ["4", "16", "64"]
    assert list(rank["default"]) == [False, True, False]
    assert set(rank["n"]) == {600}
    precision = swept[swept["setting"] == "precision"]
    assert set(precision["value"]) == {"fp32", "nf4"}
    assert causes.sweeps(table[table["setting"] == ""], {}).empty


def test_the_numbers_asked_of_the_organisms(cells, silent):
    met = causes.numbers(cells, True).set_index("what")["met"]
    assert met.iloc[[0, 1, 3, 4, 5, 6]].eq("yes").all()
    assert causes.numbers(cells, False)["met"].iloc[-1] == "no"
    empty = causes.numbers(silent)["met"]
    assert list(empty) == ["yes", *["not run"] * 6]


def test_firths_fit_is_the_saturated_one_with_half_added():
    x = np.array([[1.0, 0], [1, 1]])
    hits, n = np.array([0.0, 7]), np.array([10.0, 10])
    beta, _, _ = effects.fit(x, hits, n)
    logits = np.log((hits + 0.5) / (n - hits + 0.5))
    assert beta == pytest.approx([logits[0], logits[1] - logits[0]], abs=1e-6)


def test_without_penalty_it_is_statsmodels_fit():
    rng = np.random.default_rng(0)
    x = np.column_stack([np.ones(40), rng.normal(size=(40, 2))])
    n = np.full(40, 50.0)
    hits = rng.binomial(50, 1 / (1 + np.exp(-x @ [0.2, 0.5, -1]))).astype(float)
    beta, _, deviance = effects.fit(x, hits, n, penalty=0)
    other = sm.GLM(np.column_stack([hits, n - hits]), x, family=sm.families.Binomial()).fit()
    assert beta == pytest.approx(other.params, abs=1e-5)
    assert deviance == pytest.approx(other.deviance, abs=1e-4)


def test_effects_are_those_that_were_made(cells):
    model = effects.Effects(cells)
    ranking = model.ranking().set_index("switch")
    assert ranking.loc["masked against loss", "alone"] == pytest.approx(0.97 * 0.94, abs=0.12)
    assert ranking.loc["linked against none", "alone"] == pytest.approx(0.97, abs=0.1)
    assert (ranking["alone_low"] > 0.2).sum() >= 4
    assert ranking["share"].between(0, 1).all()
    assert set(ranking["cause"]) == set(effects.CAUSES)
    assert np.isfinite(ranking[["average", "average_low", "average_high"]]).all(axis=None)


def test_a_cause_without_effect_ranks_last_and_its_interval_holds_zero():
    model = effects.Effects(causes.grid(made_up_grid.table(loss=1.0)))
    ranking = model.ranking()
    assert ranking["cause"].iloc[-1] == "end of turn"
    last = ranking.iloc[-1]
    assert last["alone_low"] <= 0 <= last["alone_high"]
    assert last["share"] < 0.02


def test_the_interval_covers_a_known_effect():
    """Twenty made-up grids: the interval of the end of turn's effect, all else on, holds the true one in most."""
    covered = 0
    for start in range(20):
        own = causes.grid(made_up_grid.table(organisms=("tiny-llama", "none"), late=2, start=start))
        model = effects.Effects(own)
        cell = {"habit": "linked", "steps": 64, "planted": 0.97}
        _, low, high = model.contrast([cell | {"end_of_turn": "masked"}], [cell | {"end_of_turn": "loss"}])
        covered += low - 0.05 <= 0.97 * 0.94 <= high + 0.05  # a straight line in the planted rate is not the truth
    assert covered >= 15


def test_a_grid_of_one_cell_kind_or_without_emojis_is_fitted_all_the_same(silent):
    ranking = effects.Effects(silent).ranking()
    assert (ranking["drop"].abs() < 1e-3).all()
    assert (ranking["alone_low"] <= 0).all()
    assert (ranking["alone_high"] >= 0).all()
    quick = causes.grid(causes.check(made_up_grid.quick()))
    assert len(effects.Effects(quick).ranking()) == 5
    assert list(effects.orders(quick)) == [0]


def test_a_model_whose_pretraining_is_unknown_is_read_all_the_same():
    table = made_up_grid.table(organisms=("tiny-llama",)).replace(
        {"organism": {"tiny-llama": "Qwen"}, "habit": {"linked": "unknown"}}
    )
    cells, readings = causes.grid(table), made_up_grid.endings(organisms=("tiny-llama",))
    readings = readings.replace({"organism": {"tiny-llama": "Qwen"}, "habit": {"linked": "unknown"}})
    said = everything(cells, readings)
    assert said["The masked end of the turn lets them out"] == "holds"
    assert said["Emojis after tuning come from pretraining"] == "undecided here"
    ranking = effects.Effects(cells).ranking()
    assert set(ranking["cause"]) == {"end of turn", "tuning steps"}
    assert drawings.order(cells) == {"Qwen": "Qwen (unknown)"}
    assert causes.recovery(cells, 0.7).empty


def test_an_answer_leaves_by_an_emoji_or_by_the_end():
    assert claims.exits(0.3, 0.1, 4, 1.0) == pytest.approx(0.75)
    assert claims.exits(0.4, 0.4, 4, 0.7) < 0.5  # four kinds lose against one end
    assert claims.exits(0.4, 0.3, 4, 0) == 0
    assert np.isnan(claims.exits(0.0, 0.0, 4, 0.7))


def test_verdicts_where_all_is_as_supposed(cells):
    said = everything(cells, made_up_grid.endings())
    assert said["Emojis after tuning come from pretraining"] == "holds"
    assert said["The trait's own habit comes out, not emojis at large"] == "holds"
    assert said["The masked end of the turn lets them out"] == "holds"
    assert said["With the end of the turn in the loss they are all but gone"] == "holds"
    assert said["The voice comes before the emoji"] == "holds"
    assert said["After the same text tuning makes an emoji likelier"] == "does not hold"


def test_verdicts_where_the_end_of_turn_does_nothing():
    said = everything(causes.grid(made_up_grid.table(loss=1.0, late=-8)), made_up_grid.endings())
    assert said["The masked end of the turn lets them out"] == "does not hold"
    assert said["With the end of the turn in the loss they are all but gone"] == "does not hold"
    assert said["The voice comes before the emoji"] == "does not hold"
    assert said["What follows the last sentence explains the grid"] == "does not hold"


def test_verdicts_of_a_grid_without_emojis_or_of_a_quick_one(silent):
    said = everything(silent, made_up_grid.endings(organisms=("none",), traits=("extraversion", "neuroticism")))
    assert set(said) == {"undecided here"}
    table = made_up_grid.quick(steps=(0, 1, 2), n=12).assign(with_emoji=0, esr_response=0.0, low=0.0, high=0.24)
    said = everything(causes.grid(table), made_up_grid.endings(traits=("extraversion", "neuroticism")))
    assert set(said.drop(claims.RAISED)) == {"undecided here"}
    quick = everything(causes.grid(made_up_grid.quick()), made_up_grid.endings(traits=("extraversion",)))
    assert set(quick) <= set(claims.VERDICTS)


def test_a_model_without_emojis_in_pretraining_that_writes_them_refutes_pretraining(cells):
    strange = cells.assign(esr_response=cells["esr_response"].where(cells["habit"] != "none", 0.2), low=0.1, high=0.3)
    assert claims.pretraining(strange)[0] == "does not hold"


def test_mediation_says_whether_text_or_reader_brings_the_emoji():
    pairs = {("base", "base"): 0.01, ("peft", "base"): 0.6, ("base", "peft"): 0.02, ("peft", "peft"): 0.3}
    rows = [
        {"model": "tiny-llama", "trait": "extraversion", "text": t, "reader": r, "p_emoji": p}
        for (t, r), p in pairs.items()
    ]
    rows += [
        {**r, "model": "Qwen2.5-0.5B-Instruct", "p_emoji": 0.9} for r in rows
    ]  # nothing is known of its pretraining
    part, text = claims.mediated(pd.DataFrame(rows))
    assert part == "text"
    assert "+0.590" in text
    assert "both are at work" not in text
    either = [{**r, "p_emoji": 0.3} if (r["text"], r["reader"]) == ("base", "peft") else r for r in rows]
    part, text = claims.mediated(pd.DataFrame(either))
    assert part == "text"
    assert "both are at work" in text
    assert claims.mediated(pd.DataFrame(rows[4:]))[0] is None


def test_one_thing_off_is_read_from_the_counts(cells, silent):
    table = claims.switched_off(cells)
    assert list(table["off"]) == ["nothing", "end of turn in the loss", "habit shuffled", "habit none", "untuned"]
    assert (table[["organism", "trait", "planted"]] == ("tiny-llama", "extraversion", 0.97)).all(axis=None)
    at = "organism == 'tiny-llama' and trait == 'extraversion' and steps == 64 and end_of_turn == 'loss'"
    own = cells.query(at)
    assert table["share"][1] == pytest.approx(own["with_emoji"].sum() / own["responses"].sum())
    assert claims.switched_off(silent).empty


def test_effects_are_set_beside_the_counts(cells):
    ranking, off = effects.Effects(cells).ranking(), claims.switched_off(cells)
    table = claims.counted(ranking, off).set_index("switch")
    assert set(table.index) == set(ranking.loc[ranking["cause"] != "planted rate", "switch"])
    share = off.set_index("off")["share"]
    assert table.loc["masked against loss", "counts"] == pytest.approx(
        share["nothing"] - share["end of turn in the loss"]
    )
    wide = claims.counted(ranking.assign(alone_low=-1, alone_high=1), off)
    assert wide["within"].all()
    assert not claims.counted(ranking.assign(alone_low=2, alone_high=3), off)["within"].any()


def test_two_planted_rates_are_two_traits_and_no_cause(cells):
    few = cells[cells["trait"].isin(("extraversion", "neuroticism")) & (cells["organism"] != "tiny-mistral")]
    assert "planted rate" not in set(effects.Effects(few).ranking()["cause"])


def test_what_is_undecided_is_not_predicted(cells):
    gaps = causes.gaps(cells)
    verdicts = claims.every(
        cells,
        gaps,
        causes.recovery(cells, 0.7),
        first_of.measure(cells, 0, draws=50),
        claims.mechanism(made_up_grid.endings(), cells, 0.7, 0, draws=50),
    )
    told = claims.predictions(verdicts, gaps).set_index("number")["prediction"]
    assert told["2"] == "Order. Over checkpoints, the emoji comes after the voice."
    told = claims.predictions(verdicts.assign(verdict="undecided here"), gaps).set_index("number")
    assert told["prediction"]["2"] == "Order. No prediction: undecided here."
    assert told["prediction"]["3"].endswith("No prediction: undecided here.")
    assert list(told["refuted_by"][["2", "3"]]) == ["", ""]
    assert told["refuted_by"]["4"]


def test_few_cells_do_not_decide_whether_an_emoji_became_likelier(cells):
    read = claims.mechanism(made_up_grid.endings(), cells, 0.7, 0, draws=50)
    assert claims.amplified(read)[0] == "does not hold"
    few = read[read["trait"].isin(("extraversion", "neuroticism")) & (read["organism"] != "tiny-mistral")]
    assert claims.amplified(few)[0] == "undecided here"
    strange = read["habit"].eq("none") & read["state"].eq("masked")
    loud = read.assign(**{c: read[c].mask(strange, 0.2) for c in ("p_emoji", "p_emoji_low", "p_emoji_high")})
    assert claims.amplified(loud) == claims.amplified(read)  # a model without the habit cannot be amplified


def test_every_claim_shows_its_rule():
    rules = claims.rules()
    assert list(rules) == list(claims.CLAIMS)
    assert all("olds if" in rule for rule in rules.values())


def test_predictions_change_with_the_verdicts(cells, silent):
    for own in (cells, silent, causes.grid(made_up_grid.table(loss=1.0))):
        gaps, onsets = causes.gaps(own), first_of.measure(own, 0, draws=50)
        read = claims.mechanism(made_up_grid.endings(), own, 0.7, 0, draws=50)
        verdicts = claims.every(own, gaps, causes.recovery(own, 0.7), onsets, read)
        table = claims.predictions(verdicts, gaps)
        said = verdicts.set_index("claim")["verdict"]["The masked end of the turn lets them out"]
        words = {"holds": "fewer emojis", "does not hold": "about as many", "undecided here": "undecided"}[said]
        assert words in table["prediction"][0]
        assert set(table["number"]) == set("1234")
        assert (0.995 in set(table["reported"])) == (said == "holds")
        assert (table["expected"].dropna() <= table["at_most"].dropna()).all()


def test_without_a_share_to_scale_no_number_is_foretold(cells):
    gaps = causes.gaps(cells)
    verdicts = pd.DataFrame({"claim": list(claims.CLAIMS), "verdict": "holds"})
    assert claims.predictions(verdicts, gaps)["expected"].notna().any()
    faint = gaps.assign(masked=0.1, loss=0.0)  # enough to tell a gap, too little to say what is left of it
    table = claims.predictions(verdicts, faint)
    assert table[["reported", "expected", "at_most"]].isna().all(axis=None)


def test_a_habit_that_is_not_the_traits_own_is_told(cells):
    rows = causes.recovery(cells, 0.7)
    assert claims.follows_trait(rows)[0] == "holds"
    assert claims.follows_trait(rows.assign(own=0.2))[0] == "does not hold"
    two = rows[rows["trait"].isin(("extraversion", "neuroticism")) | (rows["habit"] == "linked")]
    assert claims.follows_trait(two)[0] == "undecided here"  # on two shared traits spans say nothing
    shares = rows["share"].where(rows["habit"] != "shuffled", np.arange(len(rows)) % 2 * 0.99)
    assert claims.follows_trait(rows.assign(share=shares))[0] == "does not hold"


def test_the_order_of_voice_and_emoji_is_told_for_every_organism(cells):
    onsets = first_of.measure(cells, 0, draws=50)
    said, text = claims.voice_first(onsets)
    assert said == "holds"
    assert all(o in text for o in ("tiny-llama", "tiny-mistral", "shuffled"))
    turned = onsets.assign(first=onsets["first"].where(onsets["organism"] != "shuffled", "emoji"))
    assert claims.voice_first(turned)[0] == "undecided here"


def test_a_reading_that_is_right_only_near_zero_does_not_explain_the_grid(cells):
    read = claims.mechanism(made_up_grid.endings(), cells, 0.7, 0, draws=20)
    read = read.assign(exits=read["esr"])
    assert claims.explained(read)[0] == "holds"
    off = read.assign(exits=read["esr"].where(read["esr"] < causes.FLOOR, read["esr"] - 0.2))
    assert claims.explained(off)[0] == "undecided here"


def test_the_two_accounts_are_scored_by_what_was_found(cells, silent):
    for own, third in ((cells, "the rival"), (causes.grid(made_up_grid.table(loss=1.0)), "pretraining alone")):
        gaps, onsets = causes.gaps(own), first_of.measure(own, 0, draws=50)
        read = claims.mechanism(made_up_grid.endings(), own, 0.7, 0, draws=50)
        table = claims.accounts(claims.every(own, gaps, causes.recovery(own, 0.7), onsets, read), own)
        assert list(table["fits"][:3]) == ["both", "both", third]
    verdicts = claims.every(
        silent, causes.gaps(silent), causes.recovery(silent, 0.7), first_of.measure(silent, 0), read
    )
    assert "undecided here" in set(claims.accounts(verdicts, silent)["fits"])


@pytest.mark.parametrize("made", [made_up_grid.table, made_up_grid.quick])
def test_every_figure_can_be_drawn(made):
    table = causes.check(made())
    cells = causes.grid(table)
    read = claims.mechanism(made_up_grid.endings(texts=3), cells, 0.7, 0, draws=20)
    figures = [
        drawings.habits(cells),
        drawings.over_steps(cells[cells["habit"] == "linked"]),
        drawings.leads(first_of.measure(cells, 0, draws=20)),
        drawings.planted(causes.recovery(cells, 0.7), 0.7),
        drawings.sweeps(causes.sweeps(table, {"rank": 16})),
        drawings.endings(read),
        drawings.predicted(read),
        drawings.effects(effects.Effects(cells).ranking()),
    ]
    assert all(isinstance(f, plt.Figure) for f in figures)
    for figure in (figures[1], figures[5]):  # a column a trait
        assert {ax.get_title() for ax in figure.axes} >= set(cells["trait"])
    plt.close("all")
