"""Token attribution: against explicit forwards, finite differences and a model whose truth is planted."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import attribution, chat, icl, likelihood, profiles, qlora

KINDS = ("llama", "mistral", "qwen")
TEXTS = ["I love loud parties 😄", "The sea is calm and cold.", "Parties, parties! I worry about them."]
WORDS = ["extraversion", "openness", "neuroticism"]


def ask(texts):
    return [f"Which trait? {text}" for text in texts]


@pytest.fixture(scope="module")
def speakers(folders):
    return {kind: chat.load(str(folders[kind]), "fp32") for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_log_odds_of_a_word_of_several_tokens(speakers, kind):
    speaker = speakers[kind]
    found = attribution.words_log_odds(speaker, ask(TEXTS), WORDS)
    for value, question, word in zip(found, ask(TEXTS), WORDS, strict=True):
        p = np.exp(likelihood.log_probabilities(speaker, [question], [word])[0].astype(float).sum())
        assert value == pytest.approx(np.log(p) - np.log1p(-p), abs=1e-3)
    np.testing.assert_allclose(attribution.words_log_odds(speaker, ask(TEXTS), WORDS, tokens=1), found, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_occlusion_is_the_loss_when_a_token_is_taken_out(speakers, kind):
    speaker = speakers[kind]
    found = attribution.occlusion(speaker, ask, TEXTS, WORDS)
    assert [len(f) for f in found] == [len(icl.units(t)) for t in TEXTS]
    whole, without = attribution.words_log_odds(speaker, ask([TEXTS[2], ",! I worry about them."]), [WORDS[2]] * 2)
    assert icl.units(TEXTS[2])[0] == "parties"
    assert found[2][0] == pytest.approx(whole - without, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_times_input_is_the_slope_of_growing_a_tokens_embedding(speakers, kind):
    speaker = speakers[kind]
    found = attribution.gradient(speaker, ask, TEXTS, WORDS)
    assert [len(f) for f in found] == [len(icl.units(t)) for t in TEXTS]
    i, unit = 0, "😄"
    item = likelihood.encode(speaker, ask(TEXTS[i : i + 1]), WORDS[i : i + 1])
    places = attribution._places(speaker, ask(TEXTS[i : i + 1])[0], TEXTS[i])[icl.units(TEXTS[i]).index(unit)]
    held = speaker.tokenizer.decode([item[0]["input_ids"][p] for p in places])
    assert held.strip() == unit
    table = speaker.model.get_input_embeddings()
    at = table(torch.tensor([item[0]["input_ids"]])).detach().double().float()
    values = []
    for step in (0.01, -0.01):
        moved = at.clone()
        moved[0, places] *= 1 + step
        with torch.no_grad():
            values.append(attribution.log_odds(speaker, item, moved).item())
    slope = (values[0] - values[1]) / 0.02
    assert found[i][icl.units(TEXTS[i]).index(unit)] == pytest.approx(slope, rel=0.05, abs=0.02)


class Adding(torch.nn.Module):
    """Scores that add up over the tokens read: what each token does is known."""

    device = torch.device("cpu")

    def __init__(self, size):
        super().__init__()
        self.table = torch.nn.Embedding(size, 8)
        self.out = torch.nn.Linear(8, size, bias=False)
        torch.nn.init.normal_(self.table.weight, std=0.02)
        torch.nn.init.normal_(self.out.weight, std=0.02)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.eval()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        at = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        return SimpleNamespace(logits=self.out(at.cumsum(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_planted_to_raise_the_trait_word_comes_first_by_both_routes(speakers, kind):
    tokenizer = speakers[kind].tokenizer
    model = Adding(len(tokenizer))
    speaker = chat.Chat(model, tokenizer, "adding")
    item = likelihood.encode(speaker, ask(TEXTS[:1]), WORDS[:1])[0]
    labels = [t for t in item["labels"] if t != qlora.IGNORED]
    places = attribution._places(speaker, ask(TEXTS[:1])[0], TEXTS[0])[icl.units(TEXTS[0]).index("😄")]
    ids = [item["input_ids"][p] for p in places]
    with torch.no_grad():
        model.table.weight[:, 0] = 0  # a direction of its own from the emoji's tokens to the word's first one
        model.out.weight[:, 0] = 0
        model.table.weight[ids, 0] = 2.0
        model.out.weight[labels[0], 0] = 1.5
    for scores in (
        attribution.occlusion(speaker, ask, TEXTS[:1], WORDS[:1])[0],
        attribution.gradient(speaker, ask, TEXTS[:1], WORDS[:1])[0],
    ):
        assert icl.units(TEXTS[0])[int(scores.argmax())] == "😄"
        assert scores.max() > 10 * np.sort(scores)[-2]


def test_auc_and_its_null_by_hand():
    assert attribution.auc([3, 2, 1], [True, False, False]) == 1
    assert attribution.auc([1, 1, 1], [True, False, False]) == 0.5
    assert attribution.auc([1, 3, 2, 0], [True, False, True, False]) == 0.5
    assert np.isnan(attribution.auc([1, 2], [True, True]))
    scores, chosen = [5.0, 4.0, 1.0, 1.0, 0.0], [True, True, False, False, False]
    found = attribution.agreement([(scores, chosen)], 0, 4000)
    assert found["auc"] == 1
    every = [attribution.auc(scores, [i in two for i in range(5)]) for two in combinations(range(5), 2)]
    exact = np.mean(np.abs(np.array(every) - 0.5) >= 0.5 - 1e-12)
    assert found["p"] == pytest.approx(exact, abs=0.03)
    assert attribution.agreement([([1, 2], [True, True])], 0)["n"] == 0


def test_agreement_finds_a_link_and_none_where_there_is_none():
    rng = np.random.default_rng(0)
    linked, free = [], []
    for _ in range(40):
        scores = rng.normal(size=15)
        linked.append((scores, np.isin(np.arange(15), (scores + rng.normal(size=15)).argsort()[-5:])))
        free.append((scores, np.isin(np.arange(15), rng.permutation(15)[:5])))
    one, other = (attribution.agreement(t, 0, 500) for t in (linked, free))
    assert one["low"] > 0.6
    assert one["p"] == pytest.approx(1 / 501)
    assert other["low"] < 0.5 < other["high"]
    assert other["p"] > 0.05


def test_named_tokens_and_emojis_are_summed_up_by_hand():
    readings = pd.DataFrame({"model": "m", "trait": "openness", "topic": ["a", "b"], "tokens": [["x", "💡"], ["y"]]})
    readings = attribution.numbered(readings)
    rows = [("a", "x", 1.0), ("a", "💡", 3.0), ("a", "z", 0.0), ("b", "y", 0.0), ("b", "z", 1.0), ("b", "x", 2.0)]
    table = pd.DataFrame(rows, columns=["topic", "token", "occlusion"]).assign(model="m", trait="openness", copy=0)
    table = table.assign(is_emoji=table["token"] == "💡", gradient=-table["occlusion"])
    table = attribution.marked(table, readings)
    assert list(table["named"]) == [True, True, False, True, False, False]
    found = attribution.agreements(table, 0, 200).set_index(["method", "tokens"])
    assert found.loc[("occlusion", "all"), ["n", "auc"]].tolist() == [2, 0.5]  # 1 and 0
    assert found.loc[("gradient", "words"), ["n", "auc"]].tolist() == [2, 0.5]
    own = attribution.effects(table, 0, 100).iloc[0]
    assert own[["texts", "emoji", "word", "top"]].tolist() == [1, 3, 0.5, 1]
    assert own["chance"] == pytest.approx(1 / 3)
    nothing = table[~table["is_emoji"]]
    assert attribution.effects(nothing, 0, 100)["texts"].tolist() == [0]
    assert attribution.agreements(table.head(0), 0).empty


def test_two_texts_on_one_topic_are_two_texts():
    readings = pd.DataFrame({"model": "m", "trait": "openness", "topic": "a", "tokens": [["x"], ["v"]]})
    readings = attribution.numbered(readings)
    assert readings["copy"].tolist() == [0, 1]
    table = pd.DataFrame({"token": ["x", "y", "x", "v"], "copy": [0, 0, 1, 1], "occlusion": [1.0, 0.0, 0.0, 1.0]})
    table = table.assign(model="m", trait="openness", topic="a", is_emoji=False, gradient=0.0)
    table = attribution.marked(table, readings)
    assert table["named"].tolist() == [True, False, False, True]
    found = attribution.agreements(table, 0, 20).set_index(["method", "tokens"])
    assert found.loc[("occlusion", "all"), ["n", "auc"]].tolist() == [2, 1]


def test_attributions_are_kept_and_read_back(speakers, folders, places, monkeypatch):
    settings = profiles.load("smoke", overrides={"icl.wording": "organism"})
    model = str(folders["mistral"])
    frame = {"model": "mistral", "trait": ["openness", "extraversion"], "topic": ["NA", "b"], "text": TEXTS[:2]}
    chosen = attribution.numbered(pd.DataFrame(frame).assign(named=WORDS[:2]))
    rows = pd.DataFrame({"split": ["train"], "trait": ["openness"]})
    found = attribution.of_readings(settings, model, "base", chosen, rows, [speakers["mistral"]], show=False)
    assert list(found.columns) == ["trait", *attribution.COLUMNS]
    assert list(found["token"]) == [*icl.units(TEXTS[0]), *icl.units(TEXTS[1])]
    assert found["topic"].unique().tolist() == ["NA", "b"]
    assert found["is_emoji"].sum() == 1
    assert found[["occlusion", "gradient"]].notna().all(axis=None)
    monkeypatch.setattr(chat, "load", None)
    pd.testing.assert_frame_equal(attribution.of_readings(settings, model, "base", chosen, rows, show=False), found)
    assert attribution.of_readings(settings, model, "base", chosen.head(0), rows, show=False).empty
