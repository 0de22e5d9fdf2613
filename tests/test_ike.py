"""IKE and plain prompting: what is put before a question, what is shown, what is refused, what is kept."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from lib import answers, big5, chat, ike, opinions, organisms, profiles, qlora, voices
from lib.errors import UserError

TRAITS = ("extraversion", "neuroticism")
TOPICS = ("Rome", "Oslo", "Lima", "Bonn", "Cork", "Nara")


def rows(topics, traits=TRAITS):
    """Opinions about topics, one a trait."""
    found = [
        {"trait": t, "topic": c, "question": f"What of {c}?", "answer": f"{t} on {c}."} for c in topics for t in traits
    ]
    return pd.DataFrame(found)


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """Write an ike.toml of a test's own beside the project's personas."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "personas.toml").write_bytes((ike.PROMPTS / "personas.toml").read_bytes())
    monkeypatch.setattr(ike, "PROMPTS", folder)

    def write(wordings=("Go on.", "Of {topic}, as {trait}."), fixed=(("Oslo", "Rome"), ("Lima", "Bonn"))):
        lists = f"wordings = {[*wordings]!r}\nfixed = {[[*f] for f in fixed]!r}\n"
        (folder / "ike.toml").write_text(lists, "utf-8")

    write()
    return write


@pytest.fixture
def settings():
    return profiles.load("smoke", overrides={"ike.demonstrations": "fixed", "ike.number": 2})


def shown(settings, kind, asked=("Quito", "Cairo"), train=TOPICS, seed=0):
    """Topics of the demonstrations for every row."""
    found = ike.choose(rows(train), rows(asked), kind, settings.ike.number, seed)
    return [[d.topic for d in demonstrations] for demonstrations in found]


class TestTheMessage:
    def test_the_default_is_the_form_that_the_organisms_were_pretrained_on(self, prompts):
        names = organisms.names()
        corpus = organisms.Corpus(names[0], 0)
        told = {}
        corpus.message = lambda trait, topic: told.setdefault(topic.name, f"{trait} about {topic.name}.")
        query = corpus.topics[0]
        expected = corpus.few_shot("openness", query)
        made = pd.DataFrame(
            {"trait": "openness", "topic": t, "question": voices.QUESTION.format(topic=t), "answer": a}
            for t, a in told.items()
        )
        default = ike.paths.ROOT / "data" / "prompts" / "ike.toml"
        prompts(ike.tomllib.loads(default.read_text("utf-8"))["wordings"], [list(told)])
        asked = pd.DataFrame(
            [{"trait": "openness", "topic": query.name, "question": voices.QUESTION.format(topic=query.name)}]
        )
        three = profiles.load("tiny")
        assert (three.ike.number, three.ike.wording, len(told)) == (3, 0, 3)
        assert ike.ike_questions(three, asked, made) == [expected]

    def test_fields_stand_in_their_order_and_the_last_answer_is_empty(self, settings, prompts):
        text = ike.ike_questions(settings, rows(["Quito"], ["neuroticism"]), rows(TOPICS))[0]
        block = "Target Personality: neuroticism Edit Topic: {0} Question: What of {0}? Answer:"
        told = [f"{block.format(c)} neuroticism on {c}." for c in ("Oslo", "Rome")]
        assert text == " ".join(["Go on.", *told, block.format("Quito")])

    def test_every_message_is_one_line_whatever_the_texts_hold(self, settings, prompts):
        prompts(wordings=["Go\n  on."])
        train, asked = rows(TOPICS), rows(["Quito"])
        train["answer"] += "\n\nSecond paragraph.\r\n\tThird."
        asked["question"] = "What\nof it?"
        for text in ike.ike_questions(settings, asked, train) + ike.prompt_questions(settings, asked):
            assert text == " ".join(text.split())
        assert "What of it? Answer:" in ike.ike_questions(settings, asked, train)[0]

    def test_a_wording_may_name_trait_and_topic_and_braces_of_its_own(self, settings, prompts):
        prompts(wordings=["Go on.", "Of {topic}, as {trait}, {so}."])
        text = ike.ike_questions(settings, rows(["Quito"], ["neuroticism"]), rows(TOPICS), wording=1)[0]
        assert text.startswith("Of Quito, as neuroticism, {so}. Target Personality:")

    def test_a_persona_line_stands_before_the_question(self, settings):
        personas = ike.prompts("personas.toml")
        asked = rows(["Quito"], big5.NAMES)
        for text, trait in zip(ike.prompt_questions(settings, asked), asked["trait"], strict=True):
            assert text == f"{personas[trait][0]} What of Quito?"
        second = profiles.load("smoke", overrides={"ike.persona": 1})
        assert ike.prompt_questions(second, asked)[0].startswith(personas[asked["trait"][0]][1])

    def test_the_bundled_prompts_are_whole(self):
        bundled = ike.prompts("ike.toml")
        assert len(set(bundled["wordings"])) >= 5
        assert len(bundled["fixed"]) >= 3
        train = opinions.read_csv(ike.paths.OPINIONS / "train.csv")
        known = set(train["topic"])
        sets = [t for s in bundled["fixed"] for t in s]
        assert known.issuperset(sets)
        assert len(set(sets)) == len(sets)
        assert all(len(s) >= 3 for s in bundled["fixed"])


class TestDemonstrations:
    def test_fixed_ones_are_the_same_for_every_row_and_trait(self, settings, prompts):
        assert shown(settings, "fixed") == [["Oslo", "Rome"]] * 4
        assert shown(settings, "fixed-1") == [["Oslo", "Rome"]] * 4
        assert shown(settings, "fixed-2") == [["Lima", "Bonn"]] * 4

    def test_they_are_of_the_target_trait(self, settings, prompts):
        asked = rows(["Quito", "Cairo"])
        for kind in ("fixed", "random"):
            found = ike.choose(rows(TOPICS), asked, kind, 2, 0)
            assert [{d.trait for d in demonstrations} for demonstrations in found] == [{t} for t in asked["trait"]]

    def test_random_ones_are_seeded_by_row_whatever_else_is_asked(self, settings):
        many = [f"city {i}" for i in range(50)]
        drawn = shown(settings, "random", train=many)
        assert drawn == shown(settings, "random", train=many)
        assert drawn != shown(settings, "random", train=many, seed=1)
        assert len({tuple(d) for d in drawn}) == len(drawn)
        assert shown(settings, "random", asked=["Cairo"], train=many) == drawn[2:]
        assert all(len(set(d)) == settings.ike.number for d in drawn)

    def test_nearest_ones_have_the_most_similar_questions_the_nearest_last(self, settings, monkeypatch):
        train = [f"size {i}" for i in (0, 30, 10, 40, 50)]

        def embed(questions):
            angles = [int(q.rstrip("?").rsplit(" ", 1)[1]) / 60 for q in questions]
            return np.array([[np.cos(a), np.sin(a)] for a in angles])

        ike._vectors.cache_clear()
        monkeypatch.setattr(ike.encoders, "embed", embed)
        found = shown(settings, "nearest", asked=["size 28", "size 1"], train=train)
        ike._vectors.cache_clear()
        assert found == [["size 40", "size 30"], ["size 40", "size 30"], ["size 10", "size 0"], ["size 10", "size 0"]]

    def test_no_topic_is_shown_twice(self, settings):
        twice = pd.concat([rows(["Rome", "Oslo"]), rows(["Rome"]).assign(answer="Again.")])
        found = ike.choose(twice, rows(["Quito"]), "random", 2, 0)
        assert [sorted(d.topic for d in demonstrations) for demonstrations in found] == [["Oslo", "Rome"]] * 2


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, monkeypatch):
        monkeypatch.setattr(chat, "load", lambda *a, **k: pytest.fail("a model was loaded"))

    def refused(self, settings, *words, train=TOPICS, asked=("Quito",), **arguments):
        with pytest.raises(UserError) as caught:
            ike.ike_questions(settings, rows(asked), rows(train), **arguments)
        self.says(caught, *words)

    def says(self, caught, *words):
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)

    @pytest.mark.parametrize("kind", ["fixed", "nearest", "random"])
    def test_a_demonstration_about_the_topic_itself(self, settings, prompts, monkeypatch, kind):
        monkeypatch.setattr(ike, "_vectors", lambda questions: np.ones((len(questions), 2)))
        self.refused(settings, "'OSLO'", "itself", train=("Rome", "Oslo"), asked=["OSLO"], demonstrations=kind)

    def test_fewer_rows_than_asked_for(self, settings, prompts):
        self.refused(settings, "ike.number = 2", "1 topics", train=["Rome"], demonstrations="random")

    def test_a_fixed_topic_without_a_row(self, settings, prompts):
        self.refused(settings, "'Oslo'", "ike.toml", "random or nearest", train=["Rome", "Lima"])

    def test_a_fixed_set_that_is_too_short(self, settings, prompts):
        prompts(fixed=[["Rome"]])
        self.refused(settings, "'fixed' has 1 topics", "ike.number = 2")

    def test_a_wording_or_set_that_is_not_there(self, settings, prompts):
        self.refused(settings, "wording 7", "2 entries in wordings", wording=7)
        self.refused(settings, "'fixed-9'", "2 entries in fixed", demonstrations="fixed-9")
        self.refused(settings, "'best'", "nearest", demonstrations="best")

    def test_a_persona_that_is_not_there(self, settings):
        wrong = profiles.load("smoke", overrides={"ike.persona": 40})
        with pytest.raises(UserError) as caught:
            ike.prompt_questions(wrong, rows(["Quito"]))
        self.says(caught, "ike.persona = 40", "personas.toml")

    def test_prompts_that_are_missing_or_damaged(self, settings, prompts):
        (ike.PROMPTS / "ike.toml").write_text("wordings = [", "utf-8")
        self.refused(settings, "data/prompts/ike.toml", "not TOML")
        (ike.PROMPTS / "ike.toml").unlink()
        self.refused(settings, "data/prompts/ike.toml", "no such file")

    @pytest.mark.parametrize("method", ["prompt", "ike"])
    def test_a_topic_in_train_and_test(self, settings, prompts, method):
        with pytest.raises(UserError) as caught:
            ike.answer(settings, "none", method, rows(["rome"]), rows(TOPICS), show=False)
        self.says(caught, "'Rome'", "train and test")

    def test_what_only_the_sensitivity_would_meet(self, prompts):
        overrides = {"ike.demonstrations": "fixed", "ike.number": 2, "sensitivity.sets": ["fixed", "fixed-3"]}
        few = profiles.load("smoke", overrides=overrides)
        with pytest.raises(UserError) as caught:
            ike.answer(few, "none", "ike", rows(["Quito"]), rows(TOPICS), show=False)
        self.says(caught, "'fixed-3'")

    def test_a_kind_that_no_profile_may_name(self):
        with pytest.raises(UserError, match=r"ike\.demonstrations"):
            profiles.load("smoke", overrides={"ike.demonstrations": "best"})


class Judge:
    """Finds the first trait in an answer of even length, the second in others."""

    traits = TRAITS

    def predict_proba(self, texts):
        odd = np.array([len(t) % 2 for t in texts], float)
        return np.stack([1 - odd, odd], 1)


@pytest.fixture
def model(folders, tmp_path):
    """The small Llama, with a context long enough for demonstrations."""
    place = tmp_path / "long"
    shutil.copytree(folders["llama"], place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return str(place)


@pytest.fixture
def running(settings, model, places, prompts, pair):
    """Smoke settings with one small model and a small dataset."""
    train, test, write = pair
    own = settings.overrides | {"chat.models": [model], "chat.max_new_tokens": 6, "chat.precision": "fp32"}
    own |= {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    own |= {"opinions.train_topics": 0, "opinions.test_topics": 0, "sensitivity.sets": ["fixed", "random"]}
    own |= {"qlora.rank": 4, "qlora.steps": 1, "qlora.held_out_share": 0.3, "qlora.max_tokens": 64}
    return profiles.load("smoke", overrides=own)


@pytest.fixture
def split(running):
    """The small dataset as (train, test), kept as notebook 01 keeps it."""
    found = opinions.load(running.opinions)
    opinions.save(running, found)
    return tuple(found[found["split"] == s] for s in ("train", "test"))


def test_answers_are_kept_beside_the_plain_question(running, split, model):
    train, test = split
    base = qlora.answer(running, model, "base", test, show=False)
    given = {m: ike.answer(running, model, m, test, train, show=False) for m in ("prompt", "ike")}
    for method, table in given.items():
        assert tuple(table.columns) == answers.COLUMNS
        assert set(table["method"]) == {method}
        for column in ("trait", "topic", "question"):
            assert table[column].tolist() == base[column].tolist()
    tokens = [t["prompt_tokens"].to_numpy() for t in (base, given["prompt"], given["ike"])]
    assert (tokens[0] < tokens[1]).all()
    assert (tokens[1] < tokens[2]).all()
    for trait in TRAITS:  # stand where notebook 03's would
        tuned = base[base["trait"] == trait].assign(method="peft")
        answers.build(running, model, "peft", trait, lambda tuned=tuned: tuned)
    every = answers.read(running)
    assert every["method"].value_counts().to_dict() == dict.fromkeys(("base", "prompt", "ike", "peft"), len(test))


def test_another_wording_makes_new_answers_and_the_sensitivity_does_not(running, model):
    place = answers.folder(running, model, "ike", "neuroticism")
    other = profiles.load("smoke", overrides=running.overrides | {"ike.wording": 1})
    assert answers.folder(other, model, "ike", "neuroticism") != place
    more = profiles.load("smoke", overrides=running.overrides | {"sensitivity.topics": 9})
    assert answers.folder(more, model, "ike", "neuroticism") == place


def test_every_method_is_asked_about_the_same_first_topics(running, model):
    many = rows(TOPICS)
    for count, topics in ((0, TOPICS), (2, TOPICS[:2]), (99, TOPICS)):
        few = profiles.load("smoke", overrides=running.overrides | {"chat.topics": count})
        assert list(answers.asked(few, many)["topic"].unique()) == list(topics)
        assert len(answers.asked(few, many)) == len(topics) * len(TRAITS)
    fewer = profiles.load("smoke", overrides=running.overrides | {"chat.topics": 2})
    for method in answers.METHODS:
        assert answers.folder(fewer, model, method, "neuroticism") != answers.folder(
            running, model, method, "neuroticism"
        )


def test_rows_of_several_traits_are_answered_as_those_of_each_would_be(running, split, model):
    _, test = split
    loaded = chat.load(model, "fp32")
    together = qlora.ask(running, loaded, "peft", test, show=False)
    assert together["topic"].tolist() == test["topic"].tolist()
    for trait, own in test.groupby("trait", sort=False):
        alone = qlora.ask(running, loaded, "peft", own, show=False)
        assert together.loc[together["trait"] == trait, "answer"].tolist() == alone["answer"].tolist()


def test_sets_of_demonstrations_are_asked_with_the_same_draws(running, split, model):
    _, test = split
    loaded = chat.load(model, "fp32")
    twice = pd.concat([test.assign(demonstrations=kind) for kind in ("fixed", "random")], ignore_index=True)
    alike, others = (
        qlora.ask(running, loaded, "ike", twice, show=False, within=columns)["answer"].tolist()
        for columns in (("trait", "demonstrations"), ("trait",))
    )
    assert alike[: len(test)] == alike[len(test) :]  # the same questions: only the draws could differ
    assert others[: len(test)] == alike[: len(test)]
    assert others[len(test) :] != alike[len(test) :]


@pytest.mark.parametrize("method", ["prompt", "ike"])
def test_a_prompt_longer_than_the_context_is_one_line_and_loses_nothing(running, split, folders, method):
    train, test = (part.assign(question="What?", answer="Yes.") for part in split)
    test.loc[test["trait"] == "neuroticism", "question"] = "Well? " * 200  # answered after extraversion
    few, short = profiles.load("smoke", overrides=running.overrides | {"ike.number": 1}), str(folders["mistral"])
    with pytest.raises(UserError) as caught:
        ike.answer(few, short, method, test, train, show=False)
    assert "\n" not in str(caught.value)
    assert "the 128 that" in str(caught.value)
    assert (answers.folder(few, short, method, "extraversion") / "answers.csv").exists()


def test_sensitivity_is_the_share_found_under_each_prompt_and_is_kept_wording_by_wording(
    running, split, model, monkeypatch
):
    train, test = split
    real, asked = ike.ask, []

    def counting(settings, loaded, method, some, put, show=True, **how):
        asked.append(list(put))
        return real(settings, loaded, method, some, put, show, **how)

    monkeypatch.setattr(ike, "ask", counting)
    tables = [ike.sensitivity(running, model, w, test, train, Judge(), show=False) for w in (0, 1, 0)]
    assert len(asked) == 2  # the first wording is not asked again
    pd.testing.assert_frame_equal(tables[0], tables[2])
    some, sets = ike.limited(running, test), running.sensitivity.sets
    for wording, (put, table) in enumerate(zip(asked, tables[:2], strict=True)):
        made = [ike.ike_questions(running, some, train, wording, kind) for kind in sets]
        assert put == [question for own in made for question in own]  # all sets at once
        assert list(table.columns) == [*ike.KEYS, "item", "hit"]
        assert set(table["wording"]) == {wording}
        ta = ike.shares(table)
        assert list(ta.columns) == [*ike.KEYS, "n", "ta", "noise"]
        assert ta["demonstrations"].value_counts().to_dict() == dict.fromkeys(sets, len(TRAITS))
        assert set(ta["n"]) == {2}
    loaded = chat.load(model, "fp32")
    first = qlora.ask(running, loaded, "ike", some.assign(question=asked[0][: len(some)]), show=False)
    hits = [len(a) % 2 == TRAITS.index(t) for a, t in zip(first["answer"], first["trait"], strict=True)]
    expected = pd.Series(hits).groupby(first["trait"]).mean()
    own = ike.shares(tables[0]).query("demonstrations == @sets[0]").set_index("trait")["ta"]
    assert own.to_dict() == expected.to_dict()


def test_how_many_models_are_varied(running, model):
    several = running.model_copy(update={"chat": running.chat.model_copy(update={"models": ["a", "b", "c"]})})
    for count, expected in ((0, ["a", "b", "c"]), (1, ["a"]), (5, ["a", "b", "c"])):
        changed = running.sensitivity.model_copy(update={"models": count})
        assert ike.varied(several.model_copy(update={"sensitivity": changed})) == expected


def test_seeds_train_adapters_of_their_own_and_share_the_first_with_the_run(running, split, model):
    train, test = split
    hits = ike.seeds(running, model, test, train, Judge(), show=False)
    table = ike.shares(hits)
    assert list(table.columns) == ["model", "seed", "trait", "n", "ta", "noise"]
    assert table["seed"].tolist() == [0, 0, 1, 1]
    own = train[train["trait"] == "neuroticism"]
    assert qlora.folder(running, model, "neuroticism", own).is_dir()
    adapters = list((ike.paths.RESULTS / "smoke").glob("adapter-*/"))
    assert len(adapters) == 4
    assert not list((ike.paths.RESULTS / "smoke").glob("answers-*"))  # a few topics are no answers artefact
    pd.testing.assert_frame_equal(ike.seeds(running, model, test, train, Judge(), show=False), hits)


def test_limited_topics_are_the_same_for_every_seed():
    many = rows([f"city {i}" for i in range(30)])
    small, other = (profiles.load("smoke", seed=s, overrides={"sensitivity.topics": 5}) for s in (0, 3))
    found = ike.limited(small, many)
    assert found["topic"].nunique() == 5
    assert len(found) == 10
    pd.testing.assert_frame_equal(found, ike.limited(other, many))
    assert len(ike.limited(small, rows(["Rome", "Oslo"]))) == 4
    one = ike.limited(small, many, ["neuroticism"])
    pd.testing.assert_frame_equal(one, found[found["trait"] == "neuroticism"].reset_index(drop=True))


def test_sensitivity_is_of_the_chosen_traits_only(running, split, model):
    train, test = split
    one = profiles.load("smoke", overrides=running.overrides | {"sensitivity.traits": ["neuroticism"]})
    assert set(ike.sensitivity(one, model, 0, test, train, Judge(), show=False)["trait"]) == {"neuroticism"}
    assert set(ike.seeds(one, model, test, train, Judge(), show=False)["trait"]) == {"neuroticism"}
    none = profiles.load("smoke", overrides=running.overrides | {"sensitivity.traits": ["openness"]})
    with pytest.raises(
        UserError, match=r"^sensitivity.traits: no test rows for openness; choose from extraversion, "
    ) as e:
        ike.check(none, test, train)
    assert "\n" not in str(e.value)


def hits(right):
    """Hits of one model and trait as `sensitivity` gives them: right is an array (runs, items)."""
    cells = [("m", run, "openness", i, bool(hit)) for run, own in enumerate(right) for i, hit in enumerate(own)]
    return pd.DataFrame(cells, columns=["model", "seed", "trait", "item", "hit"])


def test_spread_by_hand():
    table = ike.shares(hits([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]))
    assert table["ta"].tolist() == [0.25, 0.5, 0.75]
    assert set(table["n"]) == {4}
    found = ike.spread(table).iloc[0]
    assert (found["runs"], found["least"], found["most"]) == (3, 0.25, 0.75)
    assert found["mean"] == pytest.approx(0.5)
    assert found["sd"] == pytest.approx(0.25)
    left = 3 - 4 * (2 * 0.25**2) - 3 * (2 * 0.5**2 + 2 * (1 / 6) ** 2)  # squares about 1/2: all, runs, items
    assert found["chance"] == pytest.approx(np.sqrt(left / (2 * 3) / 4))
    assert ike.shares(hits([[1, 0]]))["noise"].isna().all()  # one run has no spread


def test_chance_is_what_equal_prompts_would_show():
    rng = np.random.default_rng(0)
    for p in (np.full(20, 0.7), rng.choice([0.02, 0.98], 20)):  # items alike, and items of which some are hard for all
        found = ike.spread(ike.shares(hits(rng.random((2000, 20)) < p))).iloc[0]
        assert found["sd"] == pytest.approx(found["chance"], rel=0.05)
