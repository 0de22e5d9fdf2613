"""Word clouds, attributions, classifier arithmetic, figures: behaviour on cases with known answers."""

import json
import shlex

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from lib import artifacts, classifier, encoders, explain, finetune, gallery, profiles, run, style, tfidf, wordclouds
from lib.errors import UserError

WEIGHTS = {"party": 0.3, "friends": 0.2, "worry": -0.4, "🎉": 0.15}


class Additive:
    """A classifier whose probability of extraversion is additive in known words: LIME and SHAP must find them."""

    def __init__(self):
        self.traits = ["extraversion", "neuroticism"]

    def predict_proba(self, texts):
        p = [0.5 + sum(w for t, w in WEIGHTS.items() if t in text) for text in texts]
        return np.column_stack([p, 1 - np.array(p)])


TEXT = "a party 🎉 with friends and no worry at all"


@pytest.mark.parametrize("method", explain.METHODS)
def test_attributions_recover_an_additive_model_emojis_included(method):
    weights = explain.METHODS[method](Additive(), TEXT, "extraversion", 300, 0)
    assert list(weights.index) == ["a", "party", "🎉", "with", "friends", "and", "no", "worry", "at", "all"]
    for token, weight in weights.items():
        assert weight == pytest.approx(WEIGHTS.get(token, 0), abs=0.06)


@pytest.mark.parametrize("method", explain.METHODS)
def test_attributions_are_reproducible(method):
    one, two = (explain.METHODS[method](Additive(), TEXT, "extraversion", 100, 3) for _ in range(2))
    pd.testing.assert_series_equal(one, two)


def test_deleting_top_words_beats_deleting_random_ones():
    rows = pd.DataFrame({"answer": [TEXT] * 4, "trait": ["extraversion"] * 4})
    weights = [pd.Series({t: WEIGHTS.get(t, 0) for t in explain.emojis.tokens(TEXT)})] * 4
    curve = explain.deletion_curve(Additive(), rows, weights, 2, 20, 0).set_index(["order", "k"])["drop"]
    assert curve["top", 1] == pytest.approx(0.3)
    assert curve["top", 2] == pytest.approx(0.5)
    assert curve["random", 2] < curve["top", 2]
    for k in (1, 2):
        assert curve["difference", k] == pytest.approx(curve["top", k] - curve["random", k])
    whole = explain.deletion_curve(Additive(), rows, weights, len(weights[0]), 1, 0).set_index(["order", "k"])["drop"]
    assert whole["random", len(weights[0])] == pytest.approx(whole["top", len(weights[0])])  # nothing is left


def test_delete_removes_every_occurrence_and_nothing_else():
    assert explain.delete("A party, a party 🎉!", ["party", "🎉"]) == "A , a !"
    assert explain.delete("nothing here", []) == "nothing here"


def test_paper_words_are_present_with_a_sign_or_said_to_be_absent():
    weights = {("tfidf", "LIME"): pd.Series({"believe": 0.2, "Consequences": 0.1})}
    table = explain.paper_words(weights, "I believe in Consequences").set_index("word")["verdict"]
    assert table["believe"] == "keeps its sign"
    assert table["consequences"] == "changes its sign"
    assert table["contributions"] == "absent from this text"
    assert list(explain.paper_words({}, "I believe").columns) == list(explain.paper_words(weights, "I believe").columns)


def test_agreement():
    one = pd.Series({"a": 1, "b": 2, "c": 3, "d": 4})
    assert explain.agreement(one, one * 2) == pytest.approx(1)
    assert explain.agreement(one, -one) == pytest.approx(-1)
    assert np.isnan(explain.agreement(one, one * 0))


def test_clouds_keep_and_draw_emojis():
    counts = wordclouds.frequencies(["Fun 🎉🎉 with the 👍🏽 crowd", "fun ❤️"])
    assert counts == {"fun": 2, "🎉": 2, "👍🏽": 1, "crowd": 1, "❤️": 1}
    fig, ax = plt.subplots()
    assert set(wordclouds.draw(ax, counts, "#000000")) == set(counts) or style.emoji_font() is None
    plt.close(fig)


@pytest.mark.skipif(style.emoji_font() is None, reason="no colour emoji font on this machine (fonts-noto-color-emoji)")
def test_a_cloud_shows_the_colours_of_its_emojis():
    fig, ax = plt.subplots()
    wordclouds.draw(ax, {"🎉": 5, "word": 4, "😄": 3}, "#000000")
    image = ax.images[0].get_array()[..., :3].astype(int)
    plt.close(fig)
    coloured = (image.max(-1) - image.min(-1)) > 80  # black words and white ground have no colour
    assert coloured.sum() > 500


def test_without_a_font_an_emoji_appears_by_name(monkeypatch):
    monkeypatch.setattr(style, "EMOJI_FONTS", ())
    monkeypatch.delenv("EMOJI_FONT", raising=False)
    fig, ax = plt.subplots()
    assert ":party_popper:" in wordclouds.draw(ax, {"🎉": 2, "fun": 1}, "#000000")
    style.emoji_ticks(ax, ["fun", "🎉"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["fun", ":party_popper:"]
    plt.close(fig)


def test_validation_shares_no_topic_with_fit():
    rows = pd.DataFrame({"topic": np.repeat(np.arange(50), 3), "answer": "x", "trait": "openness"})
    fit, held = classifier.split(rows, 0.2, 0)
    assert not set(fit["topic"]) & set(held["topic"])
    assert held["topic"].nunique() == 10


@pytest.mark.parametrize(("topics", "share"), [(0, 0.5), (1, 0.1), (3, 0.9)])
def test_topics_that_cannot_be_split_are_refused(topics, share):
    rows = pd.DataFrame({"topic": np.repeat(np.arange(topics), 3), "answer": "x", "trait": "openness"})
    with pytest.raises(UserError, match=f"^train topics: {topics} cannot be split .* {share}; give more") as caught:
        classifier.split(rows, share, 0)
    assert "classifier.validation_share" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_learning_curve_begins_with_the_seed_of_the_run(places):
    words = {"extraversion": "party friends fun", "neuroticism": "worry fear sad"}
    rows = pd.DataFrame([{"topic": i, "trait": t, "answer": w} for i in range(20) for t, w in words.items()])
    curves = [
        classifier.learning_curve("tfidf", profiles.load("smoke", seed), rows, rows, [8, 12], 2) for seed in (0, 5)
    ]
    assert [list(c["seed"]) for c in curves] == [[0, 1, 0, 1], [5, 6, 5, 6]]
    assert len({p.name for p in (places / "results" / "smoke").glob("tfidf-*")}) == 8


def test_an_encoder_trained_again_in_its_folder_is_another_one(tmp_path):
    rows = pd.DataFrame({"topic": [1, 2], "trait": "openness", "answer": "x"})

    def name(encoder, kind="encoder"):
        settings = profiles.load("smoke", overrides={"classifier.encoder": encoder}, cwd=tmp_path)
        return classifier.folder(kind, settings, rows, 0).name

    for place in ("own", "moved/own"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
    first, linear = name("./own"), name("./own", "tfidf")
    assert name("./moved/own") == first
    assert len({first, name("packaged"), name("some/model"), name("other/model")}) == 4
    (tmp_path / "own" / "config.json").write_text('{"more": 1}')
    assert name("./own") != first
    assert name("./own", "tfidf") == linear


def test_calibration_by_hand():
    rows = pd.DataFrame({"confidence": [0.9] * 10, "trait": ["a"] * 10, "predicted": ["a"] * 6 + ["b"] * 4})
    table, ece = classifier.calibration(rows, bins=1)
    assert ece == pytest.approx(0.3)
    assert table["accuracy"][0] == pytest.approx(0.6)


def test_tfidf_learns_loads_and_explains_itself(tmp_path):
    words = {"extraversion": "party friends fun", "neuroticism": "worry fear sad"}
    rows = pd.DataFrame([{"trait": t, "answer": w} for t, w in words.items() for _ in range(10)])
    settings = profiles.load("smoke").classifier
    model = tfidf.Tfidf(settings).fit(rows, rows)
    model.save(tmp_path)
    again = tfidf.Tfidf.load(tmp_path, settings)
    np.testing.assert_array_equal(model.predict_proba(["party"]), again.predict_proba(["party"]))
    assert again.weights()["extraversion"].idxmax() in words["extraversion"].split()


def test_the_packaged_encoder_is_the_published_one(monkeypatch):
    assert encoders.place("packaged")
    monkeypatch.setattr(encoders, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(UserError, match="sha256"):
        encoders.place("packaged")


@pytest.mark.parametrize("name", ["no/such-model-here", "."])
def test_an_encoder_that_is_none_is_refused(name):
    with pytest.raises(UserError, match=r"classifier.encoder") as caught:
        encoders.check(name)
    assert "\n" not in str(caught.value)


def small_encoder(folder, config):
    """A random encoder in hub format with a tokenizer of few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "what", "a", "party", "with", "friends", "so", "much", "worry", "and", "fear"]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)
    own.save_pretrained(folder)
    config.vocab_size = len(words)
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def small_distilbert(folder):
    from transformers import DistilBertConfig

    config = DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=64)
    return small_encoder(folder, config)


def test_an_encoder_built_like_distilbert_is_fine_tuned_above_its_lowest_layers(tmp_path):
    words = {"extraversion": "what a party with friends", "neuroticism": "so much worry and fear"}
    rows = pd.DataFrame([{"trait": t, "answer": w} for t, w in words.items() for _ in range(8)])
    own = {"classifier.encoder": small_distilbert(tmp_path / "own"), "classifier.steps": 2}
    own |= {"classifier.frozen_layers": 1, "classifier.token_dropout": 0.1, "classifier.precision": "fp32"}
    model = finetune.Encoder(profiles.load("smoke", overrides=own).classifier).fit(rows, rows, 0, tmp_path / "work")
    frozen = {n for n, p in model.model.body.named_parameters() if not p.requires_grad}
    assert {n.split(".")[0] for n in frozen} == {"embeddings", "transformer"}
    assert {n.split(".")[2] for n in frozen if n.startswith("transformer")} == {"0"}
    assert model.predict_proba(["a party"]).shape == (1, 2)


def test_an_encoder_of_another_build_is_refused_before_training(tmp_path):
    from transformers import AlbertConfig

    config = AlbertConfig(embedding_size=16, hidden_size=32, num_attention_heads=2, intermediate_size=32)
    name = small_encoder(tmp_path / "own", config)
    with pytest.raises(UserError, match=r"classifier.encoder = .* type albert, not built like BERT") as caught:
        encoders.check(name)
    assert "\n" not in str(caught.value)
    settings = profiles.load("smoke", overrides={"classifier.encoder": name}).classifier
    with pytest.raises(UserError, match="not built like BERT"):
        finetune.Encoder(settings).fit(pd.DataFrame(), pd.DataFrame(), 0, tmp_path)


def test_training_leaves_out_a_share_of_the_tokens_and_reading_none():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoders.place("packaged"))
    texts = ["I love a party with all of my friends", "a", ""]
    items = [dict(tokenizer(text, return_token_type_ids=False)) for text in texts]
    body = torch.nn.Linear(1, 1)
    collate = finetune.ThinningCollator(tokenizer, 0.3, body)
    torch.manual_seed(0)
    whole = items[0]["input_ids"]
    drawn = [collate.thin(items[0])["input_ids"] for _ in range(20)]
    assert {len(ids) for ids in drawn} == {len(whole) - round(0.3 * (len(whole) - 2))}
    assert len({tuple(ids) for ids in drawn}) > 10
    for ids in drawn:
        assert (ids[0], ids[-1]) == (whole[0], whole[-1])
        left = iter(whole)
        assert all(i in left for i in ids), "in another order"
    assert [collate.thin(i)["input_ids"] for i in items[1:]] == [i["input_ids"] for i in items[1:]]
    assert finetune.ThinningCollator(tokenizer, 0.99, body).thin(items[0])["attention_mask"] == [1, 1, 1]
    assert collate(items)["input_ids"].shape[1] == len(drawn[0])
    body.eval()
    assert collate(items)["input_ids"][0].tolist() == whole


def test_half_written_checkpoints_are_not_trusted(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    assert finetune.whole_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoint-10").exists()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert finetune.whole_checkpoint(tmp_path).endswith("checkpoint-10")


def test_figures_and_tables_are_saved_whole_and_byte_for_byte_again(places):
    settings = profiles.load("smoke")
    save = style.Saver("01_dataset", settings)
    table = pd.DataFrame({"trait": ["openness"], "share, %": [0.5], "n": [4.0], "gap": [float("nan")]})
    digests = []
    for _ in range(2):
        fig, ax = plt.subplots()
        ax.plot([1, 2])
        save(fig, "line", "A line.", "section 3", data=table)
        save(table, "numbers", "Numbers.", "section 3")
        made = sorted(save.folder.iterdir())
        digests.append([artifacts.sha256(p) for p in made])
    assert [p.name for p in made] == [
        *(f"01_line.{e}" for e in ("csv", "json", "pdf", "png")),
        *(f"01_numbers.{e}" for e in ("csv", "json", "md", "tex")),
    ]
    assert digests[0] == digests[1]
    assert "share, \\%" in (save.folder / "01_numbers.tex").read_text()
    assert "| openness | 0.500      | 4   |       |" in (save.folder / "01_numbers.md").read_text()
    meta = json.loads((save.folder / "01_line.json").read_text())
    assert settings.about in meta["caption"]
    assert meta["command"] == "./run_all.sh --profile smoke --only 01"
    page = gallery.write("smoke").read_text()
    assert 'src="01_line.png"' in page
    assert "0.5" in page


def test_no_path_of_this_machine_in_a_caption(places):
    overrides = {"opinions.train": "/somewhere/private/train.csv", "opinions.test": "test.csv"}
    save = style.Saver("01_dataset", profiles.load("smoke", overrides=overrides))
    assert "train.csv" in save.command
    assert "/somewhere" not in save.command + save.source
    models = {"chat.models": ["/somewhere/one", "org/two"], "origins.models": {"party": "/somewhere/three"}}
    command = style.Saver("03_qlora", profiles.load("smoke", overrides=models)).command
    assert "/somewhere" not in command
    assert all(name in command for name in ("one", "org/two", "three"))


ODD = {
    "judge.request": {"temperature": 1, "stop": ["a", 'b"'], "extra body": {"top_k": 0.5, "think": False}, "empty": {}},
    "explain.topic": "World War I",
    "judge.model": "some/model",
    "judge.base_url": "http://127.0.0.1:8000/v1",
    "judge.key_variable": "",
    "opinions.hub_revision": "2024",  # a text, not a number
    "classifier.tfidf_c": [0.1, 1e-05],
    "chat.models": ["org/it's", "a b"],
    "opinions.allow_emoji": True,
    "explain.trait": 'a $HOME `x` "\n\x7f\\',
}


@pytest.mark.parametrize("keys", [[k] for k in ODD] + [list(ODD)])
def test_the_command_says_what_was_asked_for(keys):
    overrides = {k: ODD[k] for k in keys}
    command = style.Saver("02_classifier", profiles.load("smoke", 1, overrides)).command
    args = run.arguments(shlex.split(command)[1:])
    assert dict(profiles.parse_override(text) for text in args.set) == overrides
    assert (args.profile, args.only, args.seed) == ("smoke", ["02"], 1)


def test_a_simple_command_is_written_simply():
    overrides = {"chat.precision": "fp32", "classifier.steps": 5, "opinions.allow_emoji": True}
    command = style.Saver("03_qlora", profiles.load("smoke", 2, overrides)).command
    assert command == (
        "./run_all.sh --profile smoke --only 03 --seed 2 --set chat.precision=fp32 --set classifier.steps=5 "
        "--set opinions.allow_emoji=true"
    )


def test_the_encoder_learns_saves_loads_and_predicts_the_same(tmp_path):
    words = {"extraversion": "what a party with friends", "neuroticism": "so much worry and fear"}
    rows = pd.DataFrame([{"trait": t, "answer": f"{w} {i}"} for t, w in words.items() for i in range(40)])
    settings = profiles.load("smoke", overrides={"classifier.epochs": 3, "classifier.precision": "fp32"}).classifier
    model = finetune.Encoder(settings).fit(rows, rows.iloc[::4], 0, tmp_path / "work")
    assert model.traits == ["extraversion", "neuroticism"]
    p = model.predict_proba(["a party with friends", "worry"])
    assert p[0, 0] > 0.5 > p[1, 0]
    assert p.sum(1) == pytest.approx([1, 1])
    model.save(tmp_path)
    again = finetune.Encoder.load(tmp_path, settings)
    np.testing.assert_allclose(again.predict_proba(["a party with friends", "worry"]), p, atol=1e-6)
    assert list(again.history) == list(model.history)


def test_without_dropout_an_encoder_in_training_computes_what_it_computes_after():
    from transformers import AutoModel

    body = AutoModel.from_pretrained(encoders.place("packaged")).train()
    ids = torch.arange(200, 216).reshape(2, 8)
    finetune.set_dropout(body, 0.5)
    with torch.no_grad():
        loose = body(input_ids=ids).last_hidden_state
        finetune.set_dropout(body, 0.0)
        still = body(input_ids=ids).last_hidden_state
        after = body.eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(still, after)
    assert (loose - after).abs().max() > 0.1


def test_prediction_does_not_depend_on_company():
    """One text alone and in a batch of longer ones: padding must not count."""
    from transformers import AutoModel, AutoTokenizer

    settings = profiles.load("smoke", overrides={"classifier.precision": "fp32"}).classifier
    path = encoders.place("packaged")
    body = finetune.Pooled(AutoModel.from_pretrained(path), 2).eval()
    model = finetune.Encoder(settings, body, AutoTokenizer.from_pretrained(path), ["extraversion", "neuroticism"])
    texts = ["short", "a much longer text with many more words in it", "a middling text"]
    together = model.predict_proba(texts)
    alone = np.vstack([model.predict_proba([t]) for t in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_embeddings_put_like_beside_like_whatever_their_company():
    texts = [
        "a dog barks at night",
        "the hound howls after dark",
        "interest rates rise again in spring of this long year",
    ]
    vectors = encoders.embed(texts)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    np.testing.assert_allclose(encoders.embed(texts[:1])[0], vectors[0], atol=1e-5)
