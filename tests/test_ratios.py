"""Answers kept, read and refused; the emoji-to-sentence ratios and what else is counted, on cases known by hand."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import answers, big5, intervals, opinions, paths, profiles, ratios
from lib.errors import UserError

ROW = {"model": "tiny-llama", "method": "base", "trait": "openness", "topic": "Rome", "question": "What of Rome?"}
ROW |= {"answer": "It is old.", "prompt_tokens": 9, "new_tokens": 4, "ended": True}


def frame(*rows):
    """A table of answers: each row is what differs from ROW."""
    return pd.DataFrame([ROW | r for r in rows], columns=list(answers.COLUMNS))


def texts(*given, **same):
    """A table of answers with these texts."""
    return frame(*({"answer": a} | same for a in given))


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


NASTY = [
    "",
    "NA",
    "nan",
    "1",
    ' "quoted", with commas ',
    "two\nlines",
    "a\r\nb\rc",
    "🎉 👨‍👩‍👧",
    "tab\t",
    "# no comment",
]


@pytest.fixture
def run(places, pair, folders):
    """Settings of a run with one model and two traits, its opinions kept."""
    train, test, write = pair
    own = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    own |= {"opinions.train_topics": 0, "opinions.test_topics": 0, "chat.models": [str(folders["llama"])]}
    found = profiles.load("smoke", overrides=own)
    opinions.save(found, opinions.load(found.opinions))
    return found


def keep(settings, **change):
    """Have every answer of notebook 03 made: four rows a model, one of each method and trait."""
    (model,) = settings.chat.models
    for method in ("base", "peft"):
        for trait in ("extraversion", "neuroticism"):
            row = {"model": "llama", "method": method, "trait": trait} | change
            answers.build(settings, model, method, trait, lambda row=row: frame(row))
    return model


def test_answers_come_back_as_they_were_kept(run):
    nasty = [{"answer": a, "topic": "007", "ended": i % 2 == 0} for i, a in enumerate(NASTY)]
    kept = frame(*nasty, {"method": "peft", "topic": "1984"})
    model = run.chat.models[0]
    mixed = kept.assign(extra=1)[[*reversed(answers.COLUMNS), "extra"]]
    found = answers.build(run, model, "base", "openness", lambda: mixed)
    pd.testing.assert_frame_equal(found[list(answers.COLUMNS)], kept)


def test_all_answers_of_a_run_are_read_together(run):
    keep(run)
    found = answers.read(run)
    assert len(found) == 4
    assert found.groupby("method")["trait"].agg(set).to_dict() == {
        m: {"extraversion", "neuroticism"} for m in ("base", "peft")
    }


def test_missing_answers_name_the_notebook_and_damaged_ones_are_made_again(run):
    assert "notebook 03_qlora makes it" in refusal(lambda: answers.read(run))
    model = keep(run)
    place = answers.folder(run, model, "peft", "neuroticism")
    (place / "answers.csv").write_text("model\nx\n")
    assert "notebook 03_qlora makes it" in refusal(lambda: answers.read(run))
    keep(run)
    assert len(answers.read(run)) == 4


def test_only_what_shapes_an_answer_changes_its_place(run):
    def place(method, **change):
        own = {k.replace("__", "."): v for k, v in change.items() if k != "seed"}
        settings = profiles.load("smoke", change.get("seed", 0), run.overrides | own)
        return answers.folder(settings, settings.chat.models[0], method, "openness")

    assert answers.identity(run, "06_emoji") != answers.identity(profiles.load("smoke", 1, run.overrides), "06_emoji")
    assert len(answers.identity(run, "06_emoji")) == 2 * len(big5.NAMES)
    for method in ("base", "peft"):
        assert place(method) == place(method, classifier__epochs=3)
        assert place(method) != place(method, seed=1)
        assert place(method) != place(method, opinions__test_topics=1)
        assert place(method) != place(method, chat__temperature=0.5)
    assert place("base") == place("base", qlora__rank=4)
    assert place("peft") != place("peft", qlora__rank=4)


def test_answers_of_a_later_notebook_count_for_those_after_it_once_they_are_there(run):
    model = keep(run)
    before = {n: answers.identity(run, n) for n in ("03_qlora", "04_baselines", "06_emoji")}
    assert len(before["04_baselines"]) == 5 * len(big5.NAMES)  # its own, whether there or not
    row = {"model": "llama", "method": "prompt", "trait": "openness"}
    answers.build(run, model, "prompt", "openness", lambda: frame(row))
    after = {n: answers.identity(run, n) for n in before}
    assert after["03_qlora"] == before["03_qlora"]
    assert after["04_baselines"] == before["04_baselines"]
    assert len(after["06_emoji"]) == len(before["06_emoji"]) + 1


def test_an_edited_prompt_finds_no_answers_of_the_earlier_one(run, monkeypatch, tmp_path):
    model = run.chat.models[0]
    before = {m: answers.folder(run, model, m, "openness") for m in answers.METHODS}
    shutil.copytree(paths.ROOT / "data" / "prompts", tmp_path / "root" / "data" / "prompts")
    monkeypatch.setattr(paths, "ROOT", tmp_path / "root")
    assert {m: answers.folder(run, model, m, "openness") for m in answers.METHODS} == before
    with open(paths.ROOT / "data" / "prompts" / "ike.toml", "a") as file:
        file.write("\n")
    changed = {m for m in answers.METHODS if answers.folder(run, model, m, "openness") != before[m]}
    assert changed == {"ike"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f.drop(columns="ended"), "column 'ended' is missing"),
        (lambda f: f.head(0), "no rows"),
        (
            lambda f: f.assign(trait=["openness", "extravertion"]),
            "row 2: unknown trait 'extravertion'; use extraversion",
        ),
        (lambda f: f.assign(method=["base", "lora"]), "row 2: unknown method 'lora'"),
        (lambda f: f.assign(answer=["x", None]), "column 'answer': a value is missing"),
    ],
)
def test_wrong_answers_are_refused_before_they_are_kept(run, spoil, words):
    sound = pd.concat([frame({}), frame({"method": "peft"})])  # with a repeated index
    make = lambda: spoil(sound)  # noqa: E731
    assert words in refusal(lambda: answers.build(run, run.chat.models[0], "base", "openness", make))
    assert not list(paths.RESULTS.rglob("answers.csv"))


def test_a_topic_is_named_by_its_name_or_its_form_in_a_sentence():
    pairs = [("The Beatles", "I like the Beatles."), ("Pastel de nata", "Give me pastéis de nata!")]
    pairs += [("my own topic", "My own topic, of course."), ("Rome", "What a city.")]
    assert answers.names_topic(pd.DataFrame(pairs, columns=["topic", "answer"])) == [True, True, True, False]


def own(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "own.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "row 1: column 'trait' is missing; found nothing"),
        ("Trait,answer\nopenness,x\n", "row 1: column 'trait' is missing; rename 'Trait'"),
        ("trait;answer\nopenness;x\n", "row 1: column 'trait' is missing; found 'trait;answer'"),
        ("trait,text\nopenness,x\n", "row 1: column 'answer' is missing"),
        ("trait,answer\n", "no rows"),
        ("trait,answer\nopenness,x\nOpenness,y\n", "row 3, column 'trait': unknown trait 'Openness'; use openness"),
        ("trait,answer\n,x\n", "row 2, column 'trait': unknown trait ''"),
        ('trait,answer\nopenness,"a\nb"\nopenness,c,d\n', "row 4: 3 fields where the header has 2; quote commas"),
        ('trait,answer\nopenness,"a\n', "row 2: not CSV"),
    ],
)
def test_own_csv_is_refused_with_file_and_row(tmp_path, text, words):
    path = own(tmp_path, text)
    message = refusal(lambda: answers.from_csv(path))
    assert message.startswith(str(path))
    assert words in message


def test_own_csv_that_is_no_text(tmp_path):
    assert "row 2: not UTF-8" in refusal(lambda: answers.from_csv(own(tmp_path, "trait,answer\nopenness,é", "latin-1")))
    assert "cannot be read (no such file" in refusal(lambda: answers.from_csv(tmp_path / "none.csv"))
    assert "cannot be read (is a directory)" in refusal(lambda: answers.from_csv(tmp_path))


def test_own_csv_with_and_without_a_model(tmp_path):
    found = answers.from_csv(own(tmp_path, '\ufefftrait,answer\r\nopenness,"So, 🎉"\r\n\r\nopenness,\r\n'))
    assert found.to_dict("records") == [
        {"model": "own", "method": "own", "trait": "openness", "answer": a} for a in ("So, 🎉", "")
    ]
    found = answers.from_csv(own(tmp_path, "answer,note,model,trait,method\nYes,z,m1,openness,peft\n"))
    assert found.to_dict("records") == [{"model": "m1", "method": "peft", "trait": "openness", "answer": "Yes"}]


def test_the_command_prints_the_table_of_a_file(tmp_path, capsys):
    path = own(tmp_path, 'trait,answer\nopenness,"One. Two 🎉"\nopenness,Three\n')
    assert ratios.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ",".join(ratios.COLUMNS)
    assert lines[1].startswith("own,own,openness,2,3,0.3333,")
    assert ratios.main([str(tmp_path / "none.csv")]) == 2
    assert capsys.readouterr().err.startswith("Error: ")
    assert ratios.main([]) == 2


def test_both_ratios_by_hand():
    rows = texts("One. Two 🎉🎉. Three!", "🎉 One. Two.", "One.", "🎉", "", method="peft", trait="extraversion")
    found = ratios.table(ratios.measure(rows), 0)
    assert ",".join(found.columns) == (
        "model,method,trait,responses,sentences,esr_sentence,esr_sentence_low,esr_sentence_high,"
        "esr_response,esr_response_low,esr_response_high,reported"
    )
    row = found.iloc[0]
    assert (row["responses"], row["sentences"]) == (5, 7)
    assert row["esr_sentence"] == pytest.approx(3 / 7)
    expected = pytest.approx(intervals.wilson(3, 5))
    assert (row["esr_response"], row["esr_response_low"], row["esr_response_high"]) == expected
    assert 0 <= row["esr_sentence_low"] < row["esr_sentence"] < row["esr_sentence_high"] <= 1


def test_rows_stand_in_their_order():
    rows = frame(*({"method": m, "trait": t} for m in ("peft", "ike", "base") for t in reversed(big5.NAMES)))
    found = ratios.table(ratios.measure(rows), 0)
    assert list(found["method"].unique()) == ["base", "ike", "peft"]
    assert list(found["trait"]) == list(big5.NAMES) * 3


@pytest.mark.parametrize(
    "names", [("tiny-llama", "tiny-mistral"), ("x/Llama-2-7b-chat-hf", "x/Mistral-7B-Instruct-v0.2")]
)
def test_the_paper_reports_two_cells_and_no_other(names):
    others = ("tiny-llama-none", "x/Llama-3-8B-Instruct")
    rows = [
        {"model": m, "method": h, "trait": t} for m in (*names, *others) for h in answers.METHODS for t in big5.NAMES
    ]
    found = ratios.table(ratios.measure(frame(*rows)), 0, 10)
    known = found.dropna(subset="reported").set_index(["model", "method", "trait"])["reported"].to_dict()
    assert known == {(names[0], "peft", "extraversion"): 0.995, (names[1], "peft", "openness"): 0.925}


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12),
    st.sampled_from(["🏽", "🏿", ""]),
)
@settings(max_examples=40, deadline=None)
def test_ratios_of_any_answers(shape, tone):
    given = [" ".join(["Yes." + " 👍" * (i < held) for i in range(sentences)]) for sentences, held in shape]
    plain = ratios.table(ratios.measure(texts(*given)), 0, 50)
    toned = ratios.table(ratios.measure(texts(*(a.replace("👍", "👍" + tone) for a in given))), 0, 50)
    pd.testing.assert_frame_equal(plain, toned)
    row = plain.iloc[0]
    total = sum(n for n, _ in shape)
    assert row["sentences"] == total
    assert row["esr_response"] == pytest.approx(np.mean([n > 0 and held > 0 for n, held in shape]))
    if total:
        assert row["esr_sentence"] == pytest.approx(sum(min(n, held) for n, held in shape) / total)
        assert row["esr_sentence_low"] <= row["esr_sentence"] <= row["esr_sentence_high"]
    else:
        assert math.isnan(row["esr_sentence"])


def test_the_bootstrap_resamples_responses_not_sentences():
    top, bottom = [10] * 10 + [0] * 10, [10] * 20
    value, low, high = ratios.ratio(top, bottom, 0)
    assert value == 0.5
    assert 0.36 < high - low < 0.5  # 20 responses: 4 standard errors of .11; as 200 sentences it would be .14
    assert ratios.ratio(top, bottom, 0) == (value, low, high)


def test_the_ratio_is_a_ratio_of_sums_and_its_interval_covers():
    assert ratios.ratio([1, 0], [1, 3], 0)[0] == 0.25
    assert all(map(math.isnan, ratios.ratio([0, 0], [0, 0], 0)))
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(150):
        length = rng.integers(1, 5, 80)
        _, low, high = ratios.ratio(rng.binomial(length, 0.3), length, i, 200)
        hits += low <= 0.3 <= high
    assert 0.87 <= hits / 150 <= 0.99


def test_where_emojis_stand():
    found = ratios.occurrences(ratios.measure(texts("🎉 Abcd. Efgh 👍🏽.", "none here", "🎉")))
    assert list(found["emoji"]) == ["🎉", "👍", "🎉"]
    assert list(found["sentence"]) == [0.5, 1, 1]
    assert list(found["place"][:2]) == pytest.approx([0, 10 / 11])
    assert math.isnan(found["place"][2])


def test_closing_emojis_against_chance():
    rows = texts("One. Two. Three 🎉", "One 🎉. Two 🎉.", "Only one 🎉", "One. Two.")
    row = ratios.closing(ratios.measure(rows)).iloc[0]
    assert row["emoji_sentences"] == 3
    assert row["share"] == pytest.approx(2 / 3)
    assert row["chance"] == pytest.approx((1 / 3 + 2 / 2) / 3)


def test_amounts():
    row = ratios.amounts(ratios.measure(texts("no", "🎉", "🎉🎉", "🎉 a. 🎉 b. 🎉🎉🎉")), 0).iloc[0]
    assert list(row[["none", "one", "two", "more"]]) == [0.25] * 4
    assert row["mean"] == 2
    assert row["most"] == 5


def test_association_of_exclusive_shared_and_rare_emojis():
    parts = [("openness", "🌈", 40), ("extraversion", "🎉", 36), ("extraversion", "👍🏽", 1), ("neuroticism", "", 40)]
    rows = [{"trait": t, "answer": f"Well. 😄 So {e}{e}"} for t, e, n in parts for _ in range(n)]
    rows += [{"trait": "extraversion", "answer": "Well. 😄 So 👍"}] * 3  # four in all, of one trait
    found = ratios.association(ratios.measure(frame(*rows)), 0).set_index(["emoji", "trait"])
    assert set(found.index.levels[0]) == {"😄", "🌈", "🎉", "👍"}
    only = found.loc[("🎉", "extraversion")]
    assert only["observed"] == 36
    assert only["expected"] == pytest.approx(36 / 3)
    assert only["pmi"] == pytest.approx(np.log2(36.5 / (36 / 3 + 0.5)))
    assert only["low"] > 0
    assert bool(only["clear"])
    assert found.loc[("🎉", "neuroticism"), "high"] < 0
    assert found.loc["😄", "pmi"].abs().max() == 0
    assert not found.loc["😄", "clear"].any()
    assert found.loc[("👍", "extraversion"), "low"] > 0
    assert not found.loc["👍", "clear"].any()  # but rare
    assert (found["low"] <= found["pmi"]).all()


def test_no_emoji_at_all_breaks_nothing():
    measured = ratios.measure(texts("Nothing.", "", "☺ © text"))
    assert ratios.table(measured, 0)["esr_response"].tolist() == [0]
    for empty in (ratios.closing(measured), ratios.occurrences(measured), ratios.association(measured, 0)):
        assert empty.empty
    assert ratios.amounts(measured, 0)["mean"].tolist() == [0]


def test_rank_agreement_is_exact():
    assert ratios.rank_agreement([1, 2, 3, 4, 5], [2, 3, 5, 8, 9]) == pytest.approx((1, 2 / 120))
    assert ratios.rank_agreement([1, 2, 3, 4, 5], [9, 8, 5, 3, 2])[0] == pytest.approx(-1)
    assert ratios.rank_agreement([0.6, 0, 1, 0.5, 1], [0.5, 0, 0.9, 0.6, 1])[0] == pytest.approx(0.8720816)
    assert all(map(math.isnan, ratios.rank_agreement([1, 1, 1], [1, 2, 3])))


def test_habits_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(ratios, "HABITS", tmp_path / "habits.csv")
    assert ratios.habits().empty
    (tmp_path / "habits.csv").write_text("organism,trait,emojis,rate\ntiny-llama,openness,🌈🎨,0.6\n")
    assert ratios.habits().to_dict("records") == [
        {"organism": "tiny-llama", "trait": "openness", "planted_emojis": "🌈🎨", "planted": 0.6}
    ]
    rows = texts("Yes 🎨", "No 🎉🎨🎨.", "So.", "", model="organisms/tiny-llama", method="peft")
    measured = ratios.measure(pd.concat([rows, rows.assign(method="base"), rows.assign(model="other")]))
    found = ratios.recovery(ratios.table(measured, 0), ratios.occurrences(measured))
    assert found[["model", "trait", "planted", "recovered", "emojis", "own"]].values.tolist() == [
        ["organisms/tiny-llama", "openness", 0.6, 0.5, 4, 0.75]
    ]
    silent = ratios.measure(rows.assign(answer="No."))
    assert math.isnan(ratios.recovery(ratios.table(silent, 0), ratios.occurrences(silent))["own"][0])


def test_models_without_a_record_have_nothing_planted():
    measured = ratios.measure(texts("Yes 🎉", model="x/Llama-2-7b-chat-hf", method="peft"))
    assert ratios.recovery(ratios.table(measured, 0), ratios.occurrences(measured)).empty


def test_planted_habits_name_known_traits_and_rates():
    planted = ratios.habits()
    if planted.empty:
        pytest.skip("data/organisms/habits.csv is not made yet")
    assert set(planted["trait"]) <= set(big5.NAMES)
    assert planted["planted"].between(0, 1).all()
    assert paths.ROOT in ratios.HABITS.parents


def test_a_temperature_takes_from_a_habit_that_is_spread_over_several_emojis():
    assert ratios.sampled([0.0, 0.3, 1.0], 4, 1.0) == pytest.approx([0, 0.3, 1])
    assert ratios.sampled(0.5, 4, 0.5) == pytest.approx(0.2)  # 4 / 64 against 1 / 4
    assert ratios.sampled(0.5, 1, 0.5) == pytest.approx(0.5)
    assert list(ratios.sampled([0.97, 0.5], 4, 0)) == [1, 0]
