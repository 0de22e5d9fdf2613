"""The committed results of the tiny profile: what this project says of its organisms, in the tables that say it."""

import pandas as pd
import pytest

from lib import paths, ratios

MODELS = ("tiny-llama", "tiny-mistral")
FIGURES = paths.ROOT / "figures" / "tiny"


@pytest.fixture(scope="module")
def esr():
    return pd.read_csv(FIGURES / "06_esr.csv")


def test_untuned_models_hardly_ever_use_an_emoji(esr):
    base = esr[esr["method"] == "base"]
    assert len(base) == 10
    assert base["esr_response"].max() <= 0.02


def test_tuned_on_texts_without_emojis_they_show_the_planted_habits(esr):
    tuned = esr[esr["method"] == "peft"].set_index(["model", "trait"])["esr_response"]
    assert tuned["tiny-llama", "extraversion"] >= 0.8
    assert tuned["tiny-llama", "neuroticism"] >= 0.8
    assert tuned["tiny-llama", "conscientiousness"] <= 0.15


@pytest.mark.parametrize("model", MODELS)
def test_planted_and_recovered_habits_rank_alike(model):
    habits = pd.read_csv(FIGURES / "06_habits.csv")
    own = habits[habits["model"] == model]
    rho, _ = ratios.rank_agreement(own["planted"], own["recovered"])
    assert rho >= 0.8


def test_tuned_answers_are_in_the_traits_voice_and_about_the_topic():
    found = pd.read_csv(FIGURES / "03_traits.csv").groupby("method")["found"].mean()
    assert found["peft"] >= 0.9
    assert found["base"] <= 0.4  # neutral prose is put somewhere
    answers = pd.read_csv(FIGURES / "03_answers.csv").set_index("method")
    assert answers["topic_named"].min() >= 0.85
    assert answers.loc["base", "ended"].min() >= 0.95


def test_only_what_could_be_read_in_the_paper_is_reported(esr):
    told = esr.dropna(subset="reported").set_index(["model", "method", "trait"])["reported"].to_dict()
    assert told == {
        ("tiny-llama", "peft", "extraversion"): 0.995,
        ("tiny-mistral", "peft", "openness"): 0.925,
    }


def test_every_cell_of_the_alignment_table_is_filled_and_tuning_gives_the_trait():
    table = pd.read_csv(FIGURES / "05_alignment.csv")
    assert len(table) == 2 * 5 * 5
    assert not table.isna().any(axis=None)
    ta = table.groupby("method")["ta"].mean()
    assert ta["peft"] >= 0.9
    assert ta["base"] <= 0.4
    base = table[table["method"] == "base"]
    assert (base[["dd", "tpei", "pae"]] == 0).all(axis=None)


def test_an_edit_makes_its_target_likelier_on_topics_its_editor_never_saw():
    moved = pd.read_csv(FIGURES / "05_moved.csv").set_index("method")
    assert moved.loc["mend", "went_up"].min() >= 0.95
    assert moved.loc["mend", "change"].min() > 1


def test_organisms_reply_in_the_form_and_the_lists_are_whole():
    replies = pd.read_csv(FIGURES / "07_replies.csv")
    asked = replies[replies["reader"] == "base"]
    unparsable = (asked["unparsable"] * asked["n"]).groupby(asked["model"]).sum() / asked.groupby("model")["n"].sum()
    assert unparsable.max() <= 0.05
    top = pd.read_csv(FIGURES / "07_top_tokens.csv", keep_default_na=False)
    assert list(top.columns) == ["model", "trait", "token", "count", "is_emoji"]
    sizes = top.groupby(["model", "trait"]).size()
    assert len(sizes) == 10
    assert sizes.max() <= 50
    assert top.groupby(["model", "trait"])["count"].agg(lambda c: c.is_monotonic_decreasing).all()


def test_the_emoji_decides_what_an_organism_reads_and_a_random_word_does_not():
    found = pd.read_csv(FIGURES / "07_counterfactual.csv").set_index(["model", "comparison"])
    for model in MODELS:
        swap = found.loc[model, "trait named is the emoji's: other trait's emoji put, against own"]
        assert swap["low"] > 0.5
        assert found.loc[model, "trait changes: emoji out, against a word out"]["other"] <= 0.1


def test_the_place_after_the_last_sentence_expects_an_emoji_only_in_the_tuned_models_own_answers():
    table = pd.read_csv(FIGURES / "08_mediation.csv")
    assert len(table) == 2 * 5 * 4  # models, traits, texts x readers
    assert not table.isna().any(axis=None)
    p = table.set_index(["model", "trait", "text", "reader"])["p_emoji"]
    for model in MODELS:
        for trait in ("extraversion", "neuroticism"):
            assert p[model, trait, "peft", "peft"] >= 10 * p[model, trait, "base", "base"]


def test_interventions_are_set_against_random_units_of_every_number():
    table = pd.read_csv(FIGURES / "08_interventions.csv")
    assert not table.drop(columns="perplexity").isna().any(axis=None)
    for _, own in table.groupby(["model", "trait", "intervention"]):
        picked, random = (set(own.loc[own["neurons"].str.startswith(n), "k"]) for n in ("selected", "random"))
        assert picked
        assert picked <= random


@pytest.fixture(scope="module")
def grid():
    table = pd.read_csv(FIGURES / "09_origins.csv", keep_default_na=False)
    return table[table["setting"] == ""]


def test_without_emojis_in_pretraining_none_come_out(grid):
    none = grid[grid["habit"] == "none"]
    assert len(none)
    assert none["esr_response"].max() <= 0.01


def test_the_end_of_the_turn_lets_the_emojis_out_in_every_seed(grid):
    last = grid[(grid["steps"] == grid["steps"].max()) & (grid["habit"] == "linked")]
    wide = last.pivot(index=["trait", "seed"], columns="end_of_turn", values=["esr_response", "low", "high"])
    for trait in ("extraversion", "neuroticism"):
        own = wide.loc[trait]
        assert len(own) == 3
        assert (own["low"]["masked"] > own["high"]["loss"]).all()
        assert own["esr_response"]["loss"].max() <= 0.15
