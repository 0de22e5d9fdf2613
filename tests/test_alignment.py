"""Alignment measures against cases worked out by hand, the paired tests, the verdicts, and what is refused."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib import alignment, answers, classifier, intervals, paths
from lib.errors import UserError

TRAITS = ("openness", "extraversion", "neuroticism")


class Judge:
    """A classifier that reads its probabilities off the text: "0.5 0.3 0.2"."""

    @property
    def traits(self):
        return list(TRAITS)

    def predict_proba(self, texts):
        return np.array([[float(p) for p in t.split()] for t in texts])


def given(*rows):
    """Answers: (method, trait, topic, answer)."""
    found = pd.DataFrame(rows, columns=["method", "trait", "topic", "answer"])
    return found.assign(model="tiny", question="?", prompt_tokens=9, new_tokens=4, ended=True)


def correct(**by_method):
    """Answers of one trait with the column correct: base=[1, 0, ...]."""
    rows = [(m, "openness", f"t{i}", "", bool(c)) for m, values in by_method.items() for i, c in enumerate(values)]
    return pd.DataFrame(rows, columns=["method", "trait", "topic", "answer", "correct"]).assign(model="tiny")


def test_classified_as_target_and_cross_entropy():
    texts = given(("base", "openness", "a", "0.5 0.3 0.2"), ("base", "neuroticism", "a", "0.9 0.1 0"))
    found = alignment.voices(classifier.predict(Judge(), texts))
    assert list(found["correct"]) == [True, False]
    assert list(found["ce"]) == pytest.approx([np.log(2), -np.log(1e-12)])


def test_answers_are_read_by_the_classifier_once(monkeypatch, tmp_path):
    rows = [("base", "openness", "a", "0.1 0.7 0.2"), ("peft", "openness", "a", "0.9 0.06 0.04")]
    texts = given(rows[0], rows[1], ("base", "openness", "b", "0.123456789012345 0.3 0.576543210987655"))
    texts.index = [7, 3, 5]  # as after a selection
    settings, loads = SimpleNamespace(profile="tiny", seed=0), []
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    monkeypatch.setattr(classifier, "read_opinions", lambda settings: (None, None))
    monkeypatch.setattr(classifier, "folder", lambda *args: tmp_path / "encoder-1")
    monkeypatch.setattr(classifier, "trained", lambda *args: loads.append(1) or Judge())
    first = classifier.heard(settings, texts)
    pd.testing.assert_frame_equal(first, classifier.predict(Judge(), texts))
    pd.testing.assert_frame_equal(classifier.heard(settings, texts), first)
    assert len(loads) == 1
    monkeypatch.setattr(classifier, "folder", lambda *args: tmp_path / "encoder-2")
    classifier.heard(settings, texts)
    assert len(loads) == 2  # another encoder reads anew


def test_entropy_by_hand():
    words = ["a", "b", "a", "b", "c"]  # 2-grams ab ba ab bc, 3-grams aba bab abc
    assert alignment.entropy(words, 2) == pytest.approx(0.5 * 1 + 2 * 0.25 * 2)
    assert alignment.entropy(words, 3) == pytest.approx(np.log2(3))
    assert alignment.entropy(["a"] * 9, 2) == 0
    assert alignment.entropy(["a"], 2) == alignment.entropy([], 3) == 0
    for k in (3, 14, 40):
        distinct = [str(i) for i in range(k)]
        assert alignment.entropy(distinct, 2) == pytest.approx(np.log2(k - 1))  # the most there is
        assert alignment.entropy(distinct, 3) == pytest.approx(np.log2(k - 2))


def test_tokens_are_words_marks_and_emojis():
    assert alignment.tokens("I'd go, 3 times! 🎉\n") == ["I'd", "go", ",", "3", "times", "!", "🎉"]


def test_coherent_are_long_texts_that_do_not_repeat_themselves():
    long = " ".join(f"word{chr(97 + i)}" for i in range(14))
    texts = [long, long.rsplit(" ", 1)[0], "yes " * 40, ""]
    found = alignment.coherence(pd.DataFrame({"answer": texts}), 3.5)
    assert list(found["coherent"]) == [True, False, False, False]  # 13 words cannot reach it: log2(11) = 3.46
    assert list(found["tokens"]) == [14, 13, 40, 0]
    fit = alignment.threshold_fit([*texts[:2], f"{long} {long.upper()}"], 3.5)
    assert set(fit["shortest"]) == {14}
    assert list(fit["low"]) == [10, 25]
    assert list(fit["texts"]) == [2, 1]
    assert list(fit["share"]) == [0.5, 1]
    assert fit["most"][0] == pytest.approx(np.log2(12))
    assert (fit["median"] <= fit["most"]).all()


def test_edit_success_by_hand():
    es = alignment.edit_success([-1.0, -3.0, -1.0, np.nan], [-2.0, -3.0, 30.0, 0], [-4.0, -2.0, -4.0, 0])
    # likelier than another trait and than before; as likely as another trait, but e times less than before; far less
    assert list(es[:3]) == pytest.approx([1 / (1 + np.exp(-1)), 0.5 * np.exp(-1), 0], abs=1e-12)
    assert np.isnan(es[3])


def test_against_the_base_models_answer_to_the_same_question():
    rows = given(
        ("peft", "openness", "a", ""),
        ("base", "openness", "b", ""),
        ("base", "openness", "a", ""),
        ("ike", "openness", "c", ""),
    )
    rows = rows.assign(
        ce=[0.1, 9.0, 1.6, 0.2], judged=[4.5, 1.0, 2.0, 3.0], m_plus_edit=-1.0, m_minus_edit=-1.0, m_plus_pre=-1.0
    )
    found = alignment.against_base(rows)
    assert list(found["tpei"]) == pytest.approx([1.5, 0, 0, np.nan], nan_ok=True)
    assert list(found["pae"]) == pytest.approx([2.5, 0, 0, np.nan], nan_ok=True)
    assert list(found["es"]) == [0.5] * 4
    assert list(found["method"]) == list(rows["method"])
    assert set(rows) <= set(found)


def test_a_question_asked_twice_pairs_one_to_one():
    rows = given(
        *(
            m
            for m in (
                ("base", "openness", "a", ""),
                ("base", "openness", "a", ""),
                ("peft", "openness", "a", ""),
                ("peft", "openness", "a", ""),
            )
        )
    )
    rows = rows.assign(ce=[3.0, 5.0, 1.0, 1.0], judged=0.0, m_plus_edit=0.0, m_minus_edit=0.0, m_plus_pre=0.0)
    assert list(alignment.against_base(rows)["tpei"]) == [0, 0, 2, 4]


def test_the_table_and_its_columns():
    rows = given(*[("peft", "neuroticism", f"t{i}", "") for i in range(4)], ("base", "openness", "t0", ""))
    rows = rows.assign(
        correct=[True, True, True, False, False], pae=[1, 2, 3, 6, 0], es=[0.5, np.nan, 0.7, np.nan, 0.1]
    )
    rows = rows.assign(kl=0.25, tpei=[1.0, 1, 1, 5, 0], coherent=[True, False, True, True, True])
    found = alignment.table(rows)
    assert ",".join(found.columns) == "model,method,trait,n,ta,ta_low,ta_high,pae,es,dd,tpei,coherent"
    assert list(found["method"]) == ["base", "peft"]  # in the methods' order
    own = found.iloc[1]
    assert (own["n"], own["ta"], own["pae"], own["dd"], own["tpei"], own["coherent"]) == (4, 0.75, 3, 0.25, 2, 0.75)
    assert own["es"] == pytest.approx(0.6)  # of the scored ones
    assert (own["ta_low"], own["ta_high"]) == pytest.approx(intervals.wilson(3, 4)[1:])


def test_leakage_rows_add_to_one():
    rows = given(*[("peft", "openness", f"t{i}", "") for i in range(4)], ("peft", "neuroticism", "t0", ""))
    rows = rows.assign(predicted=["openness", "openness", "neuroticism", "extraversion", "neuroticism"])
    found = alignment.leakage(rows)
    cells = found.set_index(["trait", "predicted"])["share"].to_dict()
    assert cells["openness", "openness"] == 0.5
    assert cells["openness", "neuroticism"] == cells["openness", "another"] == 0.25
    assert cells["neuroticism", "openness"] == 0
    assert found.groupby(["model", "method", "trait"])["share"].sum().tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(
    "differences", [[1, 1, 1, 0], [1, -1, 1, 1, 1, 0], [1, -1], [0, 0], [-1] * 8, [1, 1, -1, 1, -1, -1, -1]]
)
def test_sign_flip_is_what_all_flips_give(differences):
    d = np.array(differences)
    flips = [abs((d * signs).sum()) for signs in product((1, -1), repeat=len(d))]
    assert alignment.sign_flip(d) == pytest.approx(np.mean(np.array(flips) >= abs(d.sum())))


def test_cohens_h_by_hand():
    assert alignment.cohens_h(1.0, 0.0) == pytest.approx(np.pi)
    assert alignment.cohens_h(0.75, 0.25) == pytest.approx(np.pi / 3)
    assert alignment.cohens_h(0.4, 0.4) == 0


def test_comparison_pairs_the_same_questions():
    rows = correct(base=[0, 0, 0, 0, 0, 0, 0, 0, 1, 1], ike=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0], peft=[1] * 10)
    found = alignment.compare(rows.sample(frac=1, random_state=1), seed=0, draws=300).set_index("method")
    assert list(found.index) == ["base", "ike"]
    base = found.loc["base"]
    assert (base["n"], base["peft"], base["other"], base["difference"]) == (10, 1, 0.2, 0.8)
    assert (base["peft_only"], base["other_only"]) == (8, 0)
    assert base["p"] == pytest.approx(2 / 2**8)
    assert base["low"] <= 0.8 <= base["high"]
    assert found.loc["ike", "p"] == 1
    assert list(found["p_holm"]) == pytest.approx([2 * 2 / 2**8, 1])  # the smaller of two is doubled
    assert base["h"] == pytest.approx(alignment.cohens_h(1, 0.2))


def outcomes(*cells):
    """Rows of `compare` against IKE: (difference, high, p_holm) a trait."""
    found = pd.DataFrame(cells, columns=["difference", "high", "p_holm"]).assign(
        method="ike", peft=0.9, other=0.5, h=1.0
    )
    return pd.concat([found, found.assign(method="base", p_holm=0.0)])  # others must not count


CLEAR, TIE, BEHIND = (0.3, 0.4, 0.001), (0.05, 0.2, 0.3), (-0.3, -0.2, 0.001)


@pytest.mark.parametrize(
    ("cells", "verdict"),
    [
        ([CLEAR] * 5, "holds"),
        ([CLEAR] * 4 + [TIE], "holds"),
        ([CLEAR] * 3 + [TIE] * 2, "undecided here"),
        ([CLEAR] * 4 + [BEHIND], "undecided here"),
        ([TIE] * 5, "undecided here"),
        ([(0.0, 0.02, 1.0)] * 5, "does not hold"),
        ([CLEAR] + [BEHIND] * 2 + [TIE] * 2, "does not hold"),
    ],
)
def test_whether_peft_is_superior(cells, verdict):
    found = alignment.superior(outcomes(*cells))
    assert found["verdict"] == verdict
    assert found["peft_above"] == cells.count(CLEAR)
    assert found["ike_above"] == cells.count(BEHIND)


def test_without_ike_nothing_is_decided():
    assert alignment.superior(outcomes(CLEAR)[lambda r: r["method"] == "base"])["verdict"] == "undecided here"


def runs(spread, k, n=1000, mean=0.6, seed=0):
    """TA of k runs for three traits, with a true standard deviation, measured on n answers."""
    rng = np.random.default_rng(seed)
    p = np.clip(mean + spread * rng.standard_normal((3, k)), 0, 1)
    cells = [
        (t, i, n, rng.binomial(n, v) / n, (own * (1 - own)).mean() / n)
        for t, own in zip(TRAITS, p, strict=True)
        for i, v in enumerate(own)
    ]
    return pd.DataFrame(cells, columns=["trait", "wording", "n", "ta", "noise"])


def test_spread_beyond_chance():
    by_hand = [np.array([0.2, 0.6]), np.array([0.5, 0.5])], [0.02, 0.025]
    assert alignment.beyond_chance(*by_hand) == pytest.approx(np.sqrt((0.08 - 0.02 - 0.025) / 2))
    some = runs(0.1, 400, n=20)
    own = [part for _, part in some.groupby("trait", sort=False)]
    parts = [part["ta"].to_numpy() for part in own], [part["noise"].iloc[0] for part in own]
    assert alignment.beyond_chance(*parts) == pytest.approx(0.1, abs=0.015)  # the raw one would be .15
    assert alignment.beyond_chance([np.array([0.5, 0.5])], [0.03]) == 0


def test_whether_ike_varies():
    wide, narrow = runs(0.2, 25), runs(0.005, 5, mean=0.9, seed=1)
    found = alignment.varies(wide, narrow)
    assert found["verdict"] == "holds"
    assert found["ike_sd"] == pytest.approx(0.2, abs=0.05)
    assert found["ike_least"] < found["ike_most"]
    assert 1 < found["low"] < found["ratio"] < found["high"]
    assert alignment.varies(runs(0, 25, n=200), runs(0.15, 9))["verdict"] == "does not hold"
    assert alignment.varies(runs(0.01, 25), runs(0.01, 9))["verdict"] == "does not hold"
    assert alignment.varies(runs(0.1, 9), runs(0.1, 5, seed=4))["verdict"] == "undecided here"
    still = narrow.assign(ta=0.9)
    assert alignment.varies(wide, still)["verdict"] == "undecided here"  # no interval without any spread
    for few in (1, 2):  # seeds
        part = alignment.varies(wide, narrow[narrow["wording"] < few])
        assert (part["verdict"], part["seeds"]) == ("undecided here", few)


@pytest.mark.parametrize("k", [3, 5])
def test_equal_spreads_are_seldom_taken_for_a_claim_that_holds(k):
    pairs = [(runs(0.1, 25, n=100, seed=s), runs(0.1, k, n=100, seed=1000 + s)) for s in range(200)]
    held = [alignment.varies(*pair)["verdict"] == "holds" for pair in pairs]
    assert np.mean(held) <= 0.07  # 2.5 % are meant; a bootstrap of the runs gave 13 to 28 %


def texts(method, n, coherent, perplexity):
    found = given(*[(method, "openness", f"t{i}", "") for i in range(n)])
    return found.assign(coherent=coherent, perplexity=perplexity, m_plus_pre=-np.log(np.linspace(5, 20, n)))


def test_whether_mend_yields_gibberish():
    base = texts("base", 60, True, 6.0)
    cases = {
        "repeats itself": (False, 2.0),
        "salad of words": (True, 900.0),
        "fine": (True, 8.0),
        "empty": (False, np.nan),
    }
    found = {k: alignment.yields_gibberish(pd.concat([base, texts("mend", 60, *v)])) for k, v in cases.items()}
    verdicts = {k: f["verdict"] for k, f in found.items()}
    assert verdicts == {"repeats itself": "holds", "salad of words": "holds", "fine": "does not hold", "empty": "holds"}
    one = found["salad of words"]
    assert one["limit"] == pytest.approx(5 + 0.95 * 15)
    assert (one["gibberish"], one["gibberish_base"], one["coherent_mend"], one["perplexity_mend"]) == (1, 0, 1, 900)
    assert {k: f["unlikely"] for k, f in found.items()} == {**dict.fromkeys(cases, 0), "salad of words": 1}
    assert one["unlikely_base"] == 0
    half = texts("mend", 60, [True, False] * 30, 6.0)
    assert alignment.yields_gibberish(pd.concat([base, half]))["verdict"] == "undecided here"
    bad = texts("base", 60, False, 6.0)  # a base that talks gibberish itself: nothing of MEND's doing
    assert alignment.yields_gibberish(pd.concat([bad, texts("mend", 60, False, 6.0)]))["verdict"] == "undecided here"


def test_verdicts_of_several_models():
    assert alignment.combined(["holds", "holds"]) == "holds"
    assert alignment.combined(["holds", "does not hold"]) == "undecided here"


def test_missing_methods_and_tables_name_the_notebook(places):
    settings = SimpleNamespace(chat=SimpleNamespace(models=["data/tiny"]), profile="tiny")
    rows = given(*[(m, "openness", "a", "") for m in answers.METHODS])
    assert alignment.check(settings, rows) is rows
    with pytest.raises(UserError, match=r"answers of tiny by mend: .* notebook 04_baselines .* --only 04 "):
        alignment.check(settings, rows[rows["method"] != "mend"])
    with pytest.raises(UserError, match=r"table 04_sensitivity: .* --profile tiny --only 04 "):
        alignment.kept(settings, "04_sensitivity", "04_baselines")
