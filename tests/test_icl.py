"""What a chat model says of texts: what it is asked, what counts as a reply, what is edited, what is counted."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.contingency_tables import mcnemar

from lib import artifacts, big5, chat, emojis, icl, intent, opinions, organisms, profiles, qlora, ratios, worth
from lib.errors import UserError


def readings(rows):
    """Parsed readings from (trait, form, text, reply) and what else a row needs."""
    columns = {"model": "m", "reader": "base", "topic": "t", "emoji": "", "of": "", "ended": True, "tries": 1}
    found = [columns | dict(zip(("trait", "form", "text", "reply"), row, strict=True)) for row in rows]
    return icl.parsed(pd.DataFrame(found))


class TestTheReply:
    @pytest.mark.parametrize(
        ("reply", "trait", "tokens"),
        [
            ("extraversion: 🎉, love, friends, fun, party", "extraversion", "🎉 love friends fun party"),
            ("  Openness : Art, self-made, don't, 1984 , 💡.\n", "openness", "art self-made don't 1984 💡"),
            ("neuroticism: 👍🏽, ❤️, 👨‍👩‍👧, a, b", "neuroticism", "👍 ❤️ 👨‍👩‍👧 a b"),
            ("extraversion: a, b, c, A, 👍🏽", "extraversion", "a b c a 👍"),  # counted once, but in the form
        ],
    )
    def test_a_line_in_the_form_is_read(self, reply, trait, tokens):
        assert icl.parse(reply) == (trait, tokens.split(), "")

    @pytest.mark.parametrize(
        ("reply", "fault"),
        [
            ("", "no trait before a colon"),
            ("extraversion 🎉, love, friends, fun, party", "no trait before a colon"),
            ("The trait is extraversion: a, b, c, d, e", "no trait before a colon"),
            ("kindness: a, b, c, d, e", "no trait before a colon"),
            ("extraversion: a, b, c, d", "not 5 tokens"),
            ("extraversion: a, b, c, d, e, f", "not 5 tokens"),
            ("extraversion: a, b, c, d,", "not one word or emoji each"),
            ("extraversion: a, b, c, d, two words", "not one word or emoji each"),
            ("extraversion: a, b, c, d, 🎉🎉", "not one word or emoji each"),
            ('extraversion: a, b, c, d, "e"', "not one word or emoji each"),
            ("extraversion: a, b, c, d, e\n\nI chose these since", "not one word or emoji each"),
        ],
    )
    def test_anything_else_is_at_fault(self, reply, fault):
        assert icl.parse(reply) == (None, [], fault)

    def test_a_reply_cut_off_is_at_fault_even_if_it_reads_well(self):
        table = readings([("openness", "written", "x", "openness: a, b, c, d, e")] * 2)
        table["ended"] = [True, False]
        assert list(icl.parsed(table)["fault"]) == ["", "not ended"]
        assert len(icl.parsed(table.head(0)).columns) == len(table.columns)

    def test_the_rule_taught_in_pretraining_parses(self):
        corpus = organisms.Corpus("tiny-llama", 5)
        for i in range(60):
            trait = big5.NAMES[i % 5]
            text = corpus.message(trait, corpus.topic())
            named, tokens, fault = icl.parse(corpus.tokens_task(trait, text)[1])
            assert (named, fault) == (trait, ""), text
            assert set(tokens) <= set(icl.units(text)) | set(intent.held(text))


class TestTheQuestion:
    def test_organisms_are_asked_what_they_met_and_others_are_not(self):
        settings, bundled = profiles.load("tiny"), icl.prompts()
        assert icl.questions(settings, "data/organisms/tiny-llama", ["Hi $5 {x}"]) == [
            organisms.TOKENS_TASK.format(text="Hi $5 {x}")
        ]
        asked = icl.questions(settings, "nobody/chat", ["Hi $5 {x}"])[0]
        assert "\nHi $5 {x}\n" in asked
        assert all(trait in asked for trait in big5.NAMES)
        assert icl.parse(bundled["wordings"]["instruct"].strip().splitlines()[-1])[2]  # the pattern is no reply
        forced = profiles.load("tiny", overrides={"icl.wording": "instruct"})
        assert icl.wording(forced, "tiny-llama") == icl.wording(settings, "nobody/chat")

    def test_the_emojis_put_behind_texts_are_those_planted(self):
        bundled = icl.prompts()["emojis"]
        assert bundled == {trait: own for trait, (own, _) in organisms.habits("tiny-llama").items()}

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("Text: $text", "Text:", r"wordings.organism: has no \$text"),
            ("openness = [", "opennes = [", "emojis.opennes: unknown trait"),
            ('["🌈", "🌟", "🎨", "💡"]', '["🌈"]', "emojis.openness: .* two or more single emojis"),
            ('"🌈"', '"rainbow"', "two or more single emojis"),
            ("[emojis]", "[emojis", "cannot be read"),
        ],
    )
    def test_a_damaged_prompt_file_is_one_line(self, tmp_path, monkeypatch, old, new, words):
        text = icl.PROMPTS.read_text("utf-8")
        assert old in text
        (tmp_path / "icl.toml").write_text(text.replace(old, new), "utf-8")
        monkeypatch.setattr(icl, "PROMPTS", tmp_path / "icl.toml")
        with pytest.raises(UserError, match=words) as error:
            icl.prompts()
        assert "\n" not in str(error.value)


class TestTexts:
    @pytest.mark.parametrize(
        ("text", "whole"),
        [
            ("I love it. It is so very", "I love it."),
            ("What fun! 🎉 And the 💡 of the", "What fun! 🎉"),
            ("I love it. It is fun.", "I love it. It is fun."),
            ("I love it. It is fun 🎉", "I love it. It is fun 🎉"),
            ("It is so very", "It is so very"),
            ("", ""),
        ],
    )
    def test_a_text_that_was_cut_off_is_read_up_to_its_last_whole_sentence(self, text, whole):
        given = pd.DataFrame([{"model": "m", "trait": "openness", "topic": "x", "answer": text, "ended": False}])
        assert list(icl.written(given)["text"]) == [whole]
        assert list(icl.written(given.assign(ended=True))["text"]) == [text]
        assert list(icl.written(given.drop(columns="ended"))["text"]) == [text]


class TestEdits:
    def test_units_are_emojis_and_words_of_three_letters_or_more(self):
        assert icl.units("I am So so happy, SO it is. Happy 👍🏽👍") == ["happy", "👍"]

    def test_drop_takes_every_occurrence_and_tidies(self):
        assert icl.drop("What fun 🎉! Fun, more fun 🎉🎉.", {"🎉"}) == "What fun! Fun, more fun."
        assert icl.drop("Fun, more fun 🎉", {"fun"}) == ", more 🎉"
        assert icl.drop("a funny 👍🏽 day", {"fun", "👍"}) == "a funny day"
        assert icl.drop("🎉", {"🎉"}) == ""

    def test_forms_differ_in_their_emoji_only(self):
        text = "I love loud parties with friends 🎉"
        given = pd.DataFrame(
            [{"model": "m", "trait": "extraversion", "topic": str(i), "answer": text} for i in range(40)]
        )
        table = icl.edited(icl.written(given), seed=0)
        assert list(table["form"].unique()) == ["word", "none", "own", "other"]
        kinds, bare = icl.prompts()["emojis"], "I love loud parties with friends"
        for form, own in table.groupby("form"):
            for row in own.itertuples():
                assert row.of != "extraversion"
                if form == "word":
                    assert len(emojis.tokens(row.text)) == 6
                    assert row.text.endswith("🎉")
                elif form == "none":
                    assert row.text == bare
                else:
                    assert row.text == f"{bare} {row.emoji}"
                    assert row.emoji in kinds["extraversion" if form == "own" else row.of]
        assert "🎉" not in set(table.loc[table["form"] == "own", "emoji"])  # another than it had
        assert set(table["of"]) == set(big5.NAMES) - {"extraversion"}
        pd.testing.assert_frame_equal(icl.edited(icl.written(given), seed=0), table)
        assert list(icl.edited(icl.written(given.head(1).assign(answer="")), 0)["text"].str.len()[:2]) == [0, 0]


class TestCounts:
    def test_summary_and_top_tokens_by_hand(self):
        table = readings(
            [
                ("openness", "written", "Art and more art 💡", "openness: art, 💡, more, and, gone"),
                ("openness", "written", "Art and more art 💡", "extraversion: art, more, and, x1, x1"),
                ("openness", "written", "Art", "hm"),
            ]
        )
        row = icl.summary(table).iloc[0]
        assert (row["n"], row["unparsable"], row["agrees"]) == (3, pytest.approx(1 / 3), 0.5)
        assert row["inside"] == pytest.approx(7 / 10)
        assert row["repeats"] == 0.5
        top = icl.top_tokens(table, 3)
        assert list(top.columns) == ["model", "trait", "token", "count", "is_emoji"]
        assert list(top["token"]) == ["and", "art", "more"]
        assert set(top["count"]) == {2}
        assert list(icl.top_tokens(table)["is_emoji"]) == [t == "💡" for t in icl.top_tokens(table)["token"]]
        nothing = readings([("openness", "written", "Art", "hm")])
        assert icl.top_tokens(nothing).empty
        assert np.isnan(icl.summary(nothing)["agrees"][0])

    def test_planted_names_the_emoji_first_and_leaves_other_models_out(self):
        table = readings([("extraversion", "written", "I love parties and crowds here! 🎉", "hm")] * 2)
        table["model"] = ["tiny-llama", "real"]
        found = worth.planted(table)
        assert found[0][0] == "🎉"
        assert len(found[0]) == 5
        assert found[1] is None


class TestClaims:
    def test_verdicts(self):
        assert worth.verdict(0.2, 0.4, 0.1) == "holds"
        assert worth.verdict(0.2, 0.4, 0.5) == "does not hold"
        assert worth.verdict(0.2, 0.4, 0.3) == worth.verdict(float("nan"), float("nan"), 0) == "undecided here"

    def test_a_claim_without_a_row_is_undecided(self):
        values = {"emoji": 0.9, "low": 0.8, "high": 0.95, "word": 0.1, "rho": 0.9, "difference": 0.9, "auc": 0.9}
        values |= {"own": 0.3, "own_low": 0.2, "own_high": 0.4}
        full = pd.DataFrame([{"model": "m"} | values])
        names = ("naming", "agreement", "changes", "effects", "inside", "auc")
        table = worth.table(["m", "other"], **dict.fromkeys(names, full))
        assert list(table.columns) == worth.COLUMNS
        assert list(table["verdict"]) == [*["holds"] * 4, "does not hold", *["holds"] * 2, *["undecided here"] * 7]
        assert list(table["null"].head(7)) == [0.1, 0, 0, 0.1, 0.5, 0, 0.5]

    def test_what_was_taught_is_counted_by_kind(self):
        text = "I love parties and crowds here! 🎉"
        rule = worth.planted(readings([("extraversion", "written", text, "hm")]).assign(model="tiny-llama"))[0]
        full, emoji = f"extraversion: {', '.join(rule)}", "extraversion: 🎉, u, v, w, x"
        table = readings([("extraversion", "written", text, r) for r in (full, emoji, "hm")]).assign(model="tiny-llama")
        found = worth.taught(table).set_index("tokens")
        assert found["named"].tolist() == [1, 0.5]
        assert found["n"].tolist() == [2, 8]
        assert worth.taught(table.assign(model="real")).empty

    def test_naming_is_pooled_over_traits(self):
        naming = pd.DataFrame(
            {"model": "m", "texts": [10, 30, 0], "emoji": [1, 0.5, np.nan], "word": [0.1, 0.2, np.nan]}
        )
        row = worth.pooled(naming).iloc[0]
        assert row["texts"] == 40
        assert row["emoji"] == 25 / 40
        assert row["word"] == pytest.approx(7 / 40)


class TestIntent:
    def test_naming_by_hand(self):
        table = readings(
            [
                ("openness", "written", "one two three four five six 💡", "openness: 💡, one, two, four, five"),
                ("openness", "written", "one two three four five six 💡", "openness: one, two, three, four, 💡"),
                ("openness", "written", "one two three four five six 💡", "openness: one, two, three, four, five"),
                ("openness", "written", "one two three four five six", "openness: one, two, three, four, five"),
            ]
        )
        row = intent.naming(table).iloc[0]
        assert (row["texts"], row["first"]) == (3, pytest.approx(1 / 3))
        assert row["emoji"] == pytest.approx(2 / 3)
        assert row["word"] == pytest.approx((4 + 4 + 5) / 6 / 3)
        none = intent.naming(table.tail(1)).iloc[0]
        assert none["texts"] == 0
        assert np.isnan(none["emoji"])

    def test_words_of_this_text_are_told_from_a_stock_list(self):
        rows = []
        for i in range(30):
            text = f"alpha{i} beta{i} gamma{i} delta{i} 💡"
            own = [f"{w}{i}" for w in ("alpha", "beta", "gamma", "delta")]
            rows.append(("openness", "written", text, f"openness: 💡, {', '.join(own)}"))
        found = intent.inside(readings(rows), 0, 100).iloc[0]
        assert (found["n"], found["own"]) == (30, 1)
        assert found["other"] < 0.2
        assert found["p"] == pytest.approx(1 / 101)
        stock = [(t, f, "alpha beta x y z", "openness: alpha, beta, one, two, 💡") for t, f, _, _ in rows]
        found = intent.inside(readings(stock), 0, 100).iloc[0]
        assert (found["own"], found["difference"], found["p"]) == (0.5, 0, 1)
        assert intent.inside(readings([("openness", "written", "a", "openness: 💡, 🎉, 😄, 😢, 🙏")]), 0)["n"][0] == 0

    def test_information_is_that_of_the_emoji_notebook(self):
        rng = np.random.default_rng(0)
        traits = ["openness"] * 30 + ["neuroticism"] * 20
        texts = ["x" + " 😢" * int(rng.random() < 0.6) + " 💡" * int(rng.random() < 0.3) for _ in traits]
        frame = pd.DataFrame({"trait": traits, "answer": texts})
        expected = ratios.association(ratios.measure(frame), 0, 100).set_index(["trait", "emoji"])["pmi"]
        holds = [[e in t for e in ("😢", "💡")] for t in texts]
        groups = [[t == x for x in ("openness", "neuroticism")] for t in traits]
        found = intent.information(holds, groups)
        assert found[0, 0] == pytest.approx(expected["openness", "😢"])
        assert found[1, 1] == pytest.approx(expected["neuroticism", "💡"])

    @staticmethod
    def said(honest, n=60):
        """Readings of a reader that names trait and emoji of the text, or at random."""
        rng, kinds, rows = np.random.default_rng(1), icl.prompts()["emojis"], []
        for i in range(n):
            trait = big5.NAMES[i % 5]
            e = kinds[trait][i % 2]
            told = trait if honest else rng.choice(big5.NAMES)
            rows.append((trait, "written", f"Some words here {e}", f"{told}: {e}, some, words, here, x"))
        return readings(rows)

    def test_association_agrees_where_replies_follow_the_texts(self):
        table, found = intent.association(self.said(True), 0, 200)
        assert found["rho"] == pytest.approx(1)
        assert found["p"] == pytest.approx(1 / 201)
        assert found["low"] > 0.9
        assert (found["cells"], found["n"]) == (50, 60)
        assert (table["texts"] == table["replies"]).all()
        _, lost = intent.association(self.said(False), 0, 200)
        assert abs(lost["rho"]) < 0.5
        assert lost["p"] > 0.01

    def test_association_without_emojis_is_no_number(self):
        table, found = intent.association(readings([("openness", "written", "a b", "hm")]), 0, 100)
        assert table.empty
        assert np.isnan(found["rho"])
        one = readings([("openness", "written", "a b 💡", "openness: 💡, b, c, d, e")])
        assert np.isnan(intent.association(one, 0, 100)[1]["rho"])

    def test_contrast_is_mcnemars_test(self):
        rng = np.random.default_rng(0)
        one, other = rng.random(80) < 0.6, rng.random(80) < 0.3
        found = intent.contrast(one, other, 0, 200)
        cells = [[(one & other).sum(), (one & ~other).sum()], [(~one & other).sum(), (~one & ~other).sum()]]
        assert found["p"] == pytest.approx(mcnemar(np.array(cells), exact=True).pvalue)
        assert found["difference"] == pytest.approx(one.mean() - other.mean())
        assert found["low"] < found["difference"] < found["high"]
        assert intent.contrast(one, one, 0, 100)["p"] == 1
        assert np.isnan(intent.contrast([], [], 0, 100)["p"])

    @staticmethod
    def forms(follows):
        """Readings in all forms of a reader that names the emoji's trait, or the text's whatever the emoji."""
        rows = []
        for i in range(20):
            for form in icl.FORMS:
                e = {"written": "🎉", "word": "🎉", "none": "", "own": "😄", "other": "😢"}[form]
                trait = "neuroticism" if follows and form == "other" else "extraversion"
                trait = "openness" if follows and form == "none" else trait
                named = f"{e or 'x'}, {'sad' if trait == 'neuroticism' else 'fun'}, b, c, d"
                rows.append((i, form, e, trait, f"Such fun {e}", f"{trait}: {named}"))
        columns = ["topic", "form", "emoji", "named_trait", "text", "reply"]
        table = pd.DataFrame(rows, columns=columns).assign(
            model="m", reader="base", trait="extraversion", of="neuroticism", ended=True, tries=1
        )
        return icl.parsed(table)

    def test_a_reader_that_follows_the_emoji_is_told_from_one_that_does_not(self):
        for follows in (True, False):
            pairs = intent.paired(self.forms(follows)).assign(reader="base")
            assert len(pairs) == 20
            found = intent.counterfactual(pairs, 0, 100).set_index("comparison")
            assert list(found.index) == list(intent.EDITS)
            assert set(found["n"]) == {20}
            removed, swapped, helped, named, words = (found.iloc[i] for i in range(5))
            for row in (removed, swapped, helped, words):
                assert row["difference"] == (1 if follows else 0)
                assert (row["p"] < 0.001) == follows
            assert (named["one"], named["other"], named["p"]) == (1, 1, 1)

    def test_texts_not_parsed_in_every_form_are_left_out(self):
        table = self.forms(False)
        table.loc[3, ["named", "fault"]] = [None, "not 5 tokens"]
        assert len(intent.paired(table)) == 19
        table.loc[9, "tries"] = 2  # asked again: drawn, not greedy
        assert len(intent.paired(table)) == 18
        twice = pd.concat([table, table], ignore_index=True)  # a second text about every topic
        assert len(intent.paired(twice)) == 36
        assert set(intent.paired(table)) == set(intent.paired(table.head(0)))
        assert intent.paired(table.head(4)).empty
        assert intent.counterfactual(intent.paired(table.head(0)).assign(reader="base"), 0).empty


def test_only_what_cannot_be_parsed_is_asked_again(monkeypatch):
    replies = {0: ["openness: a, b, c, d, e", "hm", "hm"], 1: ["hm", "art: x"], 2: ["openness: f, g, h, i, j", "no"]}
    given = []

    def answer(speaker, asked, **how):
        given.append((len(asked), how["temperature"]))
        return pd.DataFrame({"answer": replies[len(given) - 1], "ended": True})

    monkeypatch.setattr(chat, "answer", answer)
    frame = pd.DataFrame({"model": "m", "trait": "openness", "topic": list("xyz"), "answer": ["A.", "B.", "C."]})
    texts = icl.written(frame).set_index(pd.Index([5, 3, 9]))
    settings = profiles.load("tiny")
    found = icl.parsed(icl.ask(settings, SimpleNamespace(name="m"), "base", texts))
    assert given == [(3, 0), (2, settings.chat.temperature), (2, settings.chat.temperature)]
    assert list(found["first"]) == ["openness: a, b, c, d, e", "hm", "hm"]
    assert list(found["reply"]) == ["openness: a, b, c, d, e", "openness: f, g, h, i, j", "no"]
    assert list(found["tries"]) == [1, 3, 3]
    row = icl.summary(found).iloc[0]
    assert (row["first"], row["unparsable"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


@pytest.fixture
def run(folders, places, pair):
    """Settings of a run with one small model, its opinions kept, and opinions with answers."""
    train, test, write = pair
    own = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    own |= {"opinions.train_topics": 0, "opinions.test_topics": 0, "chat.models": [str(folders["mistral"])]}
    settings = profiles.load("smoke", overrides=own | {"icl.wording": "organism", "icl.max_new_tokens": 6})
    opinions.save(settings, opinions.load(settings.opinions))
    rows = opinions.read(settings)
    return settings, rows, icl.written(rows[rows["split"] == "test"].assign(model="mistral"))


def test_replies_are_kept_and_read_back(run, monkeypatch):
    settings, rows, texts = run
    model, loaded = settings.chat.models[0], []
    found = icl.readings(settings, model, "base", texts, rows, loaded, show=False)
    assert list(found.columns) == list(icl.COLUMNS)
    assert list(found["topic"]) == list(texts.sort_values("trait", key=lambda c: c.map(big5.NAMES.index))["topic"])
    assert set(found["reader"]) == {"base"}
    asked = icl.questions(settings, model, found["text"])
    plain = chat.answer(loaded[0], asked, max_new_tokens=6, temperature=0, top_p=1, seed=9, batch_size=2, show=False)
    assert list(found["first"]) == list(plain["answer"])
    assert set(found["tries"]) == {settings.icl.tries}  # gibberish is asked for again
    monkeypatch.setattr(chat, "load", None)
    pd.testing.assert_frame_equal(icl.readings(settings, model, "base", texts, rows, show=False), found)
    with pytest.raises(TypeError):  # another text is another reading
        icl.readings(settings, model, "base", texts.assign(text="Other."), rows, show=False)


FOREIGN = '{"peft_type": "LORA", "base_model_name_or_path": "somebody/other"}'


def test_a_missing_or_foreign_adapter_is_one_line_before_any_model_is_loaded(run, monkeypatch):
    settings, rows, texts = run
    monkeypatch.setattr(chat, "load", None)
    with pytest.raises(UserError, match="notebook 03_qlora makes it"):
        icl.readings(settings, settings.chat.models[0], "peft", texts, rows, show=False)
    with pytest.raises(UserError, match="notebook 03_qlora makes it"):
        icl.check(settings, rows)
    for trait in rows["trait"].unique():
        place = qlora.folder(
            settings, settings.chat.models[0], trait, rows[(rows["split"] == "train") & (rows["trait"] == trait)]
        )
        artifacts.build(place, lambda tmp: (tmp / "adapter_config.json").write_text(FOREIGN))
    with pytest.raises(UserError, match="was made for somebody/other, not for"):
        icl.check(settings, rows)
    with pytest.raises(UserError, match="reader 'me': unknown"):
        icl.readings(settings, settings.chat.models[0], "me", texts, rows, show=False)
