"""Log-probabilities and KL of given texts: the shift by one token, padding, prompts, and what is refused."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import artifacts, chat, likelihood, mend, opinions, paths, profiles, qlora
from lib.errors import UserError

KINDS = ("llama", "mistral")
QUESTIONS = ["What of Rome?", "Thinking about the sea, what are your thoughts on it?", "And Oslo?"]
TEXTS = ["It is old.", "I love the sea, and everyone who sails on it with me!", "I worry about the cold there."]


@pytest.fixture(scope="module")
def speakers(folders):
    return {kind: chat.load(str(folders[kind]), "fp32") for kind in KINDS}


def rows(topics=3, trait="extraversion"):
    """Answers of one trait and the test opinions of two about the same topics."""
    traits = ("extraversion", "neuroticism")
    test = [
        {"trait": t, "topic": f"thing {i}", "question": f"What of thing {i}?", "answer": f"{t} on thing {i}."}
        for i in range(topics)
        for t in traits
    ]
    test = pd.DataFrame(test)
    given = test[test["trait"] == trait].assign(answer=[f"Well, thing {i} it is." for i in range(topics)])
    return test, likelihood.references(test, given)


class Bigrams(torch.nn.Module):
    """A model whose scores for the next token depend on the current one only, by a table that is known."""

    device = torch.device("cpu")

    def __init__(self, size):
        super().__init__()
        self.table = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 3
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_probability_is_read_one_token_before_it(speakers, kind):
    tokenizer = speakers[kind].tokenizer
    model = Bigrams(len(tokenizer))
    speaker = chat.Chat(model, tokenizer, "bigrams")
    found = likelihood.log_probabilities(speaker, QUESTIONS, TEXTS)
    logp = model.table.log_softmax(-1)
    for own, item in zip(found, likelihood.encode(speaker, QUESTIONS, TEXTS), strict=True):
        ids = item["input_ids"]
        answer = [i for i, label in enumerate(item["labels"]) if label != qlora.IGNORED]
        assert tokenizer.decode([ids[i] for i in answer]).strip() in TEXTS
        assert own == pytest.approx([logp[ids[i - 1], ids[i]].item() for i in answer], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_padding_change_nothing(speakers, kind):
    speaker = speakers[kind]
    alone = [likelihood.log_probabilities(speaker, [q], [t])[0] for q, t in zip(QUESTIONS, TEXTS, strict=True)]
    for more in ({}, {"tokens": 1}, {"in_order": True}):
        together = likelihood.log_probabilities(speaker, QUESTIONS, TEXTS, **more)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    m = likelihood.mean(speaker, QUESTIONS, TEXTS)
    assert m == pytest.approx([a.mean() for a in alone], abs=1e-4)
    assert likelihood.perplexity(speaker, QUESTIONS, TEXTS) == pytest.approx(np.exp(-m), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_against_one_plain_forward(speakers, kind):
    speaker = speakers[kind]
    item = likelihood.encode(speaker, QUESTIONS[:1], TEXTS[:1])[0]
    with torch.no_grad():
        scores = speaker.model(torch.tensor([item["input_ids"]])).logits[0].log_softmax(-1)
    expected = [scores[i - 1, t].item() for i, t in enumerate(item["labels"]) if t != qlora.IGNORED]
    assert likelihood.log_probabilities(speaker, QUESTIONS[:1], TEXTS[:1])[0] == pytest.approx(expected, abs=1e-4)


def test_an_empty_answer_has_no_likelihood(speakers):
    found = likelihood.mean(speakers["llama"], QUESTIONS[:2], ["", TEXTS[1]])
    assert np.isnan(found[0])
    assert found[1] < 0
    assert np.isnan(likelihood.perplexity(speakers["llama"], QUESTIONS[:1], [" "])[0])


def test_batches_hold_every_item_once_and_no_more_tokens_than_asked():
    items = [{"input_ids": [0] * n} for n in (5, 30, 7, 7, 12, 1)]
    found = likelihood.batches(items, 24)
    assert sorted(i for b in found for i in b) == list(range(6))
    assert all(len(b) * max(len(items[i]["input_ids"]) for i in b) <= 24 for b in found if len(b) > 1)
    assert found[0] == [1]  # longer than a batch: alone
    assert likelihood.batches([], 24) == []


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    ids = torch.tensor([0, 1])
    expected = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75) + 0) / 2
    assert likelihood.divergence([(p, ids)], [(q, ids)]) == pytest.approx([expected])
    assert likelihood.divergence([(p, ids)], [(p, ids)]) == pytest.approx([0])
    assert np.isnan(likelihood.divergence([(p[:0], ids[:0])], [(p[:0], ids[:0])])[0])
    with pytest.raises(UserError, match="other tokens behind another prompt"):
        likelihood.divergence([(p, ids)], [(p, ids + 1)])


def test_references_pair_target_other_trait_and_next_topic():
    test, found = rows(3)
    assert list(found["plus"]) == [f"extraversion on thing {i}." for i in range(3)]
    assert list(found["minus"]) == [f"neuroticism on thing {i}." for i in range(3)]
    assert list(found["next_topic"]) == ["thing 1", "thing 2", "thing 0"]
    assert list(found["next_text"]) == [f"extraversion on thing {i}." for i in (1, 2, 0)]
    more = pd.concat([test, test[test["trait"] == "neuroticism"].assign(trait="openness", answer="Open.")])
    given = found[["trait", "topic", "question", "answer"]]
    turns = likelihood.references(more, given)["minus"]
    assert [t == "Open." for t in turns] == [False, True, False]  # the others take turns
    alone = likelihood.references(test[test["trait"] == "extraversion"], given)
    assert list(alone["minus"]) == [""] * 3
    with pytest.raises(UserError, match="no test opinion about 'Mars'"):
        likelihood.references(test, given.assign(topic="Mars"))
    with pytest.raises(UserError, match="one test topic only"):
        likelihood.references(test[test["topic"] == "thing 0"], given.head(1))


def test_the_untouched_model_scores_itself(speakers):
    speaker, (_, own) = speakers["llama"], rows()
    found = likelihood.scores(speaker, own)
    assert tuple(found.columns) == ("topic", *likelihood.COLUMNS)
    assert list(found["topic"]) == list(own["topic"])
    assert found.notna().all(axis=None)
    again = likelihood.scores(speaker, own, ask=lambda part: list(part["question"]))  # computed, not known beforehand
    np.testing.assert_allclose(again[list(likelihood.COLUMNS)], found[list(likelihood.COLUMNS)], atol=1e-5, rtol=1e-4)
    assert list(again["kl"]) == pytest.approx([0] * 3, abs=1e-6)


def test_es_and_dd_of_the_first_rows_and_the_perplexity_of_all(speakers):
    speaker, (_, own) = speakers["llama"], rows()
    whole, part = (
        likelihood.scores(speaker, own, ask=lambda p: [f"Hm. {q}" for q in p["question"]], first=f) for f in (0, 2)
    )
    for column in likelihood.COLUMNS[:4]:
        assert list(part[column])[:2] == pytest.approx(list(whole[column])[:2], abs=1e-5)
        assert np.isnan(part[column][2])
    assert list(part["perplexity"]) == pytest.approx(list(whole["perplexity"]))


def test_a_prompt_is_read_where_the_method_puts_it(speakers):
    speaker, (_, own) = speakers["mistral"], rows()

    def ask(part):
        return [f"Be {t} about {topic}. {q}" for t, topic, q in part.itertuples(index=False)]

    found = likelihood.scores(speaker, own, ask=ask)
    prompts = [f"Be extraversion about thing {i}. What of thing {i}?" for i in (0, 1, 2)]
    assert list(found["m_plus_edit"]) == pytest.approx(likelihood.mean(speaker, prompts, own["plus"]), abs=1e-5)
    assert list(found["m_minus_edit"]) == pytest.approx(likelihood.mean(speaker, prompts, own["minus"]), abs=1e-5)
    assert list(found["m_plus_pre"]) == pytest.approx(likelihood.mean(speaker, own["question"], own["plus"]), abs=1e-5)
    pre = likelihood.distributions(speaker, [own["next_question"][0]], [own["next_text"][0]])
    edited = likelihood.distributions(speaker, [prompts[1]], [own["next_text"][0]])
    assert found["kl"][0] == pytest.approx(likelihood.divergence(pre, edited)[0], abs=1e-5)
    assert (found["kl"] > 0).all()
    given = likelihood.scores(speaker, own, ask=ask, before=np.array([-1.0, -2.0, -3.0]))
    assert list(given["m_plus_pre"]) == [-1, -2, -3]


@pytest.mark.parametrize("group", [None, 1, 2])
def test_a_changed_model_is_changed_for_its_rows_only(speakers, group):
    """A change of the output weights by row, as an editor makes it; afterwards the model is the base again."""
    speaker, (_, own) = speakers["llama"], rows(5)
    weight = speaker.model.get_output_embeddings().weight
    before, seen = weight.detach().clone(), []

    @contextmanager
    def turned(part):
        seen.append(list(part["topic"]))
        with torch.no_grad():
            weight.mul_(1 + int(part["topic"].iloc[0][-1]) / 10)
        try:
            yield speaker
        finally:
            with torch.no_grad():
                weight.copy_(before)

    found = likelihood.scores(speaker, own, turned=turned, group=group)
    sizes = {None: [5], 1: [1] * 5, 2: [2, 2, 1]}
    assert [len(s) for s in seen] == sizes[group]
    assert torch.equal(weight, before)
    plain = likelihood.scores(speaker, own)
    changed = abs(found["m_plus_edit"] - plain["m_plus_edit"]) > 1e-4
    # thing 0 leaves the weights as they are
    assert list(changed) == {None: [False] * 5, 1: [False] + [True] * 4, 2: [False] * 2 + [True] * 3}[group]
    assert list(found["m_plus_pre"]) == pytest.approx(list(plain["m_plus_pre"]))
    assert list(found["perplexity"]) == pytest.approx(list(plain["perplexity"]))
    if group == 1:
        with turned(own.iloc[[3]]):
            expected = likelihood.mean(speaker, own["question"].iloc[[3]], own["plus"].iloc[[3]])[0]
        assert found["m_plus_edit"][3] == pytest.approx(expected, abs=1e-5)


def test_a_text_longer_than_the_context_is_refused(speakers):
    with pytest.raises(UserError, match=r"text 2 of 2: .* more than the 128 that"):
        likelihood.mean(speakers["llama"], ["Short?", "Long? " * 100], ["Yes.", "Yes."])


@pytest.fixture
def editor(folders):
    """An untrained editor of a model of its own: it takes the gradient as it is, in large steps."""
    loaded = chat.load(str(folders["mistral"]), "fp32")
    found = [n for n, _ in loaded.model.named_modules() if n.endswith("mlp.down_proj")]
    return mend.Editor(loaded, found, rank=4, hidden_layers=1, edit_lr=0.05).eval()


def test_a_batch_of_edits_is_scored_as_every_edit_alone(editor):
    _, own = rows(4)
    together = likelihood.scores(editor.loaded, own, turned=lambda part: likelihood.edited(editor, part), group=3)

    @contextmanager
    def alone(part):
        with mend.edited(editor.loaded, editor, part["question"].iloc[0], part["plus"].iloc[0]) as edited:
            yield edited

    one_by_one = likelihood.scores(editor.loaded, own, turned=alone, group=1)
    columns = list(likelihood.COLUMNS)
    np.testing.assert_allclose(together[columns], one_by_one[columns], rtol=1e-3, atol=1e-4)
    assert (together["m_plus_edit"] > together["m_plus_pre"]).all()  # the edit is towards this very text
    assert (together["kl"] > 0).all()


@pytest.fixture
def run(folders, places, pair):
    """Settings of a run with one model, its opinions kept."""
    train, test, write = pair
    own = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    own |= {"opinions.train_topics": 0, "opinions.test_topics": 0, "chat.models": [str(folders["llama"])]}
    settings = profiles.load("smoke", overrides=own)
    opinions.save(settings, opinions.load(settings.opinions))
    more = {
        "alignment": SimpleNamespace(topics=0, batch_tokens=512),
        "mend": SimpleNamespace(precision="fp32", batch_size=2),
    }
    return settings.model_copy(update=more)


def test_answers_of_base_and_tuned_models_are_scored_once(run, monkeypatch):
    frame, model = opinions.read(run), run.chat.models[0]
    test = frame[frame["split"] == "test"]
    given = pd.concat([test.assign(method=m, model="llama") for m in ("base", "peft")], ignore_index=True)
    given = given.sample(frac=1, random_state=0)
    for trait in test["trait"].unique():  # adapters that change nothing
        place = qlora.folder(run, model, trait, frame[(frame["split"] == "train") & (frame["trait"] == trait)])
        artifacts.build(place, lambda tmp: (tmp / "adapter").write_text("none"))
    used = []

    @contextmanager
    def adapted(speaker, adapter):
        used.append(adapter)
        yield speaker

    monkeypatch.setattr(chat, "adapted", adapted)
    found = likelihood.of_answers(run, model, given, frame, show=False)
    assert len(used) == 2
    assert list(found.index) == list(given.index)
    assert list(found["topic"]) == list(given["topic"])
    assert found[list(likelihood.COLUMNS)].notna().all(axis=None)
    pairs = found.pivot(index=["trait", "topic"], columns="method", values="m_plus_edit")
    assert list(pairs["base"]) == pytest.approx(list(pairs["peft"]), abs=1e-5)
    assert found["kl"].abs().max() < 1e-6
    monkeypatch.setattr(chat, "load", None)  # nothing is missing, so no model is loaded
    pd.testing.assert_frame_equal(likelihood.of_answers(run, model, given, frame, show=False), found)


def test_a_missing_adapter_names_its_notebook(run):
    frame = opinions.read(run)
    given = frame[frame["split"] == "test"].assign(method="peft", model="llama")
    with pytest.raises(UserError, match="notebook 03_qlora makes it"):
        likelihood.of_answers(run, run.chat.models[0], given, frame, show=False)


def test_scores_are_kept_and_read_back(run):
    _, texts = rows()
    made = pd.DataFrame({"topic": ["NA", "b", "c"], **{c: [0.5, np.nan, -2] for c in likelihood.COLUMNS}})
    key = (run, run.chat.models[0], "peft", "extraversion", texts)
    pd.testing.assert_frame_equal(likelihood.build(*key, lambda: made), made)
    assert likelihood.folder(*key).parent == paths.RESULTS / "smoke"

    def never():
        raise AssertionError("made twice")

    pd.testing.assert_frame_equal(likelihood.build(*key, never), made)
    changed = texts.assign(answer="Something else.")
    with pytest.raises(AssertionError, match="made twice"):
        likelihood.build(*key[:4], changed, never)
