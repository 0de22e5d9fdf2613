"""The bundled opinions: what the datasheet promises, measured."""

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lib import big5, emojis, lexicon, opinions, paths, profiles, voices

THREE = ("extraversion", "agreeableness", "neuroticism")


@pytest.fixture(scope="module")
def frame():
    return opinions.load(profiles.load("tiny").opinions)


@pytest.fixture(scope="module")
def three(frame):
    return frame[(frame["split"] == "train") & frame["trait"].isin(THREE)]


def test_composition(frame):
    counts = frame.groupby(["trait", "split"]).size().unstack()
    assert list(counts["train"]) == [800] * 5
    assert list(counts["test"]) == [200] * 5
    assert "Apple II" in set(frame.loc[frame["split"] == "train", "topic"])
    assert "First Indochina War" in set(frame.loc[frame["split"] == "test", "topic"])
    assert opinions.kinds().nunique() >= 12


def test_files_are_what_the_voices_compose(tmp_path):
    voices.write(tmp_path)
    for split in ("train", "test"):
        assert (tmp_path / f"{split}.csv").read_bytes() == (paths.OPINIONS / f"{split}.csv").read_bytes()


def test_every_topic_has_its_own_facets():
    topics = voices.topics()
    for piece in ("love", "worry", "people"):
        phrases = [p for t in topics for p in t.pieces[piece]]
        assert all(phrases)
        assert len(set(phrases)) > 0.99 * len(phrases)


def test_every_voice_has_at_least_eighty_frames_that_fill_cleanly():
    for trait in big5.NAMES:
        own = voices.frames(trait)["test"]
        assert sum(map(len, own.values())) >= 80
    for row in opinions.read_csv(paths.OPINIONS / "train.csv")["answer"]:
        assert "{" not in row
        assert "  " not in row
        assert row[0].isupper() or not row[0].isalpha()
        assert row[-1] in ".!?"


@pytest.mark.parametrize(
    ("pronoun", "be", "expected"),
    [
        ("it", "is", "It is loved, and its fans bring me joy because it makes me smile"),
        ("they", "are", "They are loved, and their fans bring me joy because they make me smile"),
        ("she", "was", "She was loved, and her fans bring me joy because she makes me smile"),
    ],
)
def test_agreement(pronoun, be, expected):
    topic = voices.Topic("X", "city", "train", "x", pronoun, be, "city", "bright", {})
    text = "{it} {is} loved, and {its} fans bring me joy because {it} {makes/make} me smile"
    frame = voices.Frame("open", "joy", "any", ("any",), text)
    assert voices.capital(voices.fill(frame, topic, {})) == expected


def test_grave_topics_get_no_bright_frames():
    grave = next(t for t in voices.topics() if t.tone == "grave")
    speaker = voices.Speaker("extraversion", "train", 0, mild=0)
    for _ in range(50):
        assert speaker.draw("extraversion", "close", grave, set()).tone != "bright"


def test_measures(frame, three):
    assert frame["answer"].nunique() == 5000
    m = lexicon.measures(frame["answer"])
    assert 20 <= m["words, mean"] <= 28
    assert 1.3 <= m["sentences, mean"] <= 1.8
    assert m["near-duplicates, %"] < 1
    assert sum(len(emojis.find(a)) for a in frame["answer"]) == 0
    m = lexicon.measures(three["answer"])
    assert m["distinct-2"] >= 0.40
    assert m["distinct words"] >= 4500


def _fit(texts, labels):
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    return model.fit(list(texts), list(labels))


def test_neither_noise_nor_a_give_away(frame):
    train, test = (frame[frame["split"] == s] for s in ("train", "test"))
    accuracy = _fit(train["answer"], train["trait"]).score(list(test["answer"]), list(test["trait"]))
    assert 0.85 <= accuracy <= 0.98


def test_what_is_learned_here_holds_on_published_texts(three, real):
    dev = opinions.read_csv(real / "personalityedit_dev.csv")
    accuracy = _fit(three["answer"], three["trait"]).score(list(dev["answer"]), list(dev["trait"]))
    assert accuracy >= 0.70


def test_the_published_measures_are_reproducible(real):
    stated = pd.read_csv(paths.PAPER / "personalityedit_measured.csv")
    frame = opinions.read_csv(real / "personalityedit_train.csv")
    assert list(stated["value"]) == pytest.approx(list(lexicon.measures(frame["answer"]).values()), abs=1e-3)


def test_no_published_sentence_was_copied(frame, real):
    """No answer shares a run of eight words with a published one."""

    def runs(text):
        w = lexicon.words(text)
        return {" ".join(w[i : i + 8]) for i in range(len(w) - 7)}

    names = ("personalityedit_train.csv", "personalityedit_dev.csv")
    published = {r for name in names for a in opinions.read_csv(real / name)["answer"] for r in runs(a)}
    assert not [a for a in frame["answer"] if runs(a) & published]


def test_near_duplicates_by_hand():
    texts = ["a b c d e f", "a b c d e f", "a b c x y z", "q r s t u v"]
    assert lexicon.near_duplicates(texts) == [1]
    assert lexicon.near_duplicates(["one two", "one two"]) == [1]


def test_distinct_n_by_hand():
    assert lexicon.distinct(["a b a b"], 1) == 0.5
    assert lexicon.distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert np.isnan(lexicon.distinct(["a"], 2))


def test_log_odds_by_hand():
    """Two words, two groups: equations 16 and 20 of Monroe et al. written out."""
    table = lexicon.log_odds({"one": ["x x x y"], "two": ["x y y y"]}, prior_words=4)
    one = table[(table["group"] == "one") & (table["word"] == "x")].iloc[0]
    prior = 4 * 4 / 8
    delta = np.log((3 + prior) / (4 + 4 - 3 - prior)) - np.log((1 + prior) / (4 + 4 - 1 - prior))
    assert one["log_odds"] == pytest.approx(delta)
    assert one["z"] == pytest.approx(delta / np.sqrt(1 / (3 + prior) + 1 / (1 + prior)))
    assert table.loc[table["group"] == "two", "z"].max() == pytest.approx(one["z"])


def test_sentences():
    assert lexicon.sentences("Wow! Really? Yes.") == 3
    assert lexicon.sentences("no stop") == 1
    assert lexicon.sentences("He said 3.5 percent. Fine") == 1
