"""MEND: what an edit is made of, batched edits against edited weights, weights that come back, what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from lib import answers, artifacts, chat, mend, opinions, profiles
from lib.errors import UserError

KINDS = ("llama", "mistral")
TRAITS = ("extraversion", "neuroticism")
PARTS = ("gate_proj", "up_proj", "down_proj")


def rows(split="train", topics=8, traits=TRAITS):
    """Opinions of several traits about made-up topics, of unequal lengths."""
    found = [
        {
            "trait": t,
            "topic": f"thing {i}",
            "question": f"What of thing {i}?",
            "answer": f"{t} and thing {i}{' indeed' * (i % 3)}.",
            "split": split,
        }
        for i in range(topics)
        for t in traits
    ]
    return pd.DataFrame(found)


@pytest.fixture
def settings(folders, places, pair):
    """Smoke settings with the two small models; two layers edited, a few steps."""
    train, test, write = pair
    models = [str(folders[k]) for k in KINDS]
    own = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    own |= {"opinions.train_topics": 0, "opinions.test_topics": 0, "chat.models": models, "chat.max_new_tokens": 8}
    own |= {"mend.layers": 2, "mend.rank": 8, "mend.steps": 4, "mend.held_out_share": 0.3, "mend.max_tokens": 64}
    return profiles.load("smoke", overrides=own)


def changed(settings, **values):
    return profiles.load("smoke", overrides=settings.overrides | {f"mend.{k}": v for k, v in values.items()})


def fresh(folder, settings, edit_lr=1e-2):
    """A loaded model and an untrained editor for it."""
    loaded, m = chat.load(str(folder), "fp32"), settings.mend
    torch.manual_seed(0)
    return loaded, mend.Editor(loaded, mend.editable(loaded.model, m, "it"), m.rank, m.hidden_layers, edit_lr)


def shaken(editor, by=0.05):
    """The editor as if trained, and with statistics: random changes of all it holds."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in editor.networks.parameters():
            p += by * torch.randn_like(p)
        for name, b in editor.named_buffers():
            b += by * torch.randn_like(b).abs() if "deviation" in name else by * torch.randn_like(b)
    return editor


@pytest.fixture(params=KINDS)
def pieces(request, folders, settings):
    """A loaded model, an editor that has been shaken, and items of unequal length."""
    loaded, editor = fresh(folders[request.param], settings)
    return loaded, shaken(editor), mend.encode(loaded.tokenizer, rows(topics=3), 64)


def autograd(loaded, layers, item):
    """Gradient of one row's mean token negative log-likelihood for each weight, the plain way."""
    batch = mend.collate(loaded, [item])
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    loss = loaded.model(**batch).loss  # the library's own: shifted, mean over the labelled tokens
    found = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    return dict(zip(layers, found, strict=True)), -loss.item()


def test_rank_one_terms_sum_to_the_gradient_of_each_row_in_a_batch(pieces):
    loaded, editor, items = pieces
    factors, found = mend.decompose(loaded.model, editor.layers, mend.collate(loaded, items))
    assert len(factors) == 6
    for i, item in enumerate(items):
        plain, log_probability = autograd(loaded, editor.layers, item)
        assert found[i].item() == pytest.approx(log_probability, rel=1e-5)
        for name, (u, delta) in factors.items():
            torch.testing.assert_close(delta[i].mT @ u[i], plain[name], rtol=1e-4, atol=1e-6)


def test_no_gradient_of_a_weight_is_held(pieces):
    loaded, editor, items = pieces
    mend.decompose(loaded.model, editor.layers, mend.collate(loaded, items))
    assert all(p.grad is None and not p.requires_grad for p in loaded.model.parameters())


def test_an_untrained_editor_takes_the_plain_gradient_step(folders, settings):
    loaded, editor = fresh(folders["llama"], settings, edit_lr=0.5)
    item = mend.encode(loaded.tokenizer, rows(topics=1), 64)[0]
    plain, _ = autograd(loaded, editor.layers, item)
    for name, (keys, values) in editor.edits([item]).items():
        torch.testing.assert_close((values.mT @ keys)[0], -0.5 * plain[name], rtol=1e-4, atol=1e-6)


def test_an_edit_is_what_the_formula_says(pieces):
    """Token by token: normalise, h = z + max(0, s (U V z + b) + o), h' = h + s' (U' V' h + b') + o', W - rate * sum."""
    loaded, editor, items = pieces
    factors, _ = mend.decompose(loaded.model, editor.layers, mend.collate(loaded, items[:2]))
    edits, seen = editor(factors), {}
    for i, (name, layer) in enumerate(editor.layers.items()):
        outputs, inputs = layer.weight.shape
        first, last = editor.networks[f"{outputs}x{inputs}"]
        number = seen[outputs, inputs] = seen.get((outputs, inputs), -1) + 1
        u, delta = (f[1] for f in factors[name])
        update = torch.zeros(outputs, inputs)
        for t in range(len(u)):
            if not delta[t].any():
                continue
            z = (torch.cat([u[t], delta[t]]) - getattr(editor, f"mean_{i}")) / getattr(editor, f"deviation_{i}")
            inner = first.scale[number] * (first.u @ first.v @ z + first.bias) + first.offset[number]
            h = z + inner.relu()
            out = h + last.scale[number] * (last.u @ last.v @ h + last.bias) + last.offset[number]
            update -= editor.rates[i] * torch.outer(out[inputs:], out[:inputs])
        keys, values = edits[name]
        torch.testing.assert_close(values[1].mT @ keys[1], update, rtol=1e-3, atol=1e-5)
    assert seen == {(128, 64): 3, (64, 128): 1}  # gate and up of both layers share one network, down has its own


def test_statistics_normalise_the_inputs(folders, settings):
    loaded, editor = fresh(folders["mistral"], settings)
    items = mend.encode(loaded.tokenizer, rows(topics=4), 64)
    batches = [mend.collate(loaded, items[i : i + 3]) for i in range(0, len(items), 3)]
    editor.measure(batches)
    last = list(editor.layers)[-1]
    pairs = [mend.decompose(loaded.model, editor.layers, b)[0][last] for b in batches]
    tokens = torch.cat([torch.cat(pair, -1)[pair[1].any(-1)] for pair in pairs])
    assert len(tokens) == sum(sum(t != mend.qlora.IGNORED for t in i["labels"]) for i in items)  # the last layer's
    torch.testing.assert_close(editor.mean_5, tokens.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(editor.deviation_5, tokens.std(0, correction=0), rtol=1e-3, atol=1e-6)


def test_editor_parameters_get_the_gradient_of_the_loss_after_the_edit(pieces, settings):
    """Against finite differences, each a true edit of the weights."""
    loaded, editor, _ = pieces
    frame = rows(topics=3)
    items = mend.encode(loaded.tokenizer, frame, 64)
    chosen = np.array([[0, 1, 4]])
    parameters = [editor.rates, editor.networks["64x128"][0].u, editor.networks["128x64"][1].scale]
    mend.losses(editor, items, chosen, settings.mend)["edit"].sum().backward()
    for p in parameters:
        direction = p.grad / p.grad.norm()
        step, sides = 1e-2 * max(p.detach().norm().item(), 0.1), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * step * direction
                with mend.edited(loaded, editor, frame["question"][0], frame["answer"][0]):
                    sides.append(-mend.likelihood(loaded.model, mend.collate(loaded, items[:1]))[0].item())
                p -= sign * step * direction
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(p.grad.norm().item(), rel=0.05)


def weights(loaded):
    return {n: p.detach().clone() for n, p in loaded.model.named_parameters()}


def same(loaded, before):
    return all(
        torch.equal(p.view(torch.int32), before[n].view(torch.int32)) for n, p in loaded.model.named_parameters()
    )


def test_weights_come_back_bit_for_bit_whatever_happens(pieces, monkeypatch):
    loaded, editor, _ = pieces
    before = weights(loaded)
    with mend.edited(loaded, editor, "What of Rome?", "I love it.") as speaker:
        moved = {n for n, p in speaker.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {f"{name}.weight" for name in editor.layers}
    assert same(loaded, before)
    with pytest.raises(ZeroDivisionError), mend.edited(loaded, editor, "What of Rome?", "I love it."):
        raise ZeroDivisionError
    assert same(loaded, before)
    whole = editor.edits
    monkeypatch.setattr(editor, "edits", lambda items: dict(list(whole(items).items())[:-1]) | {"none": (0, 0)})
    with pytest.raises(KeyError), mend.edited(loaded, editor, "What of Rome?", "I love it."):
        pytest.fail("it was half edited only")
    assert same(loaded, before)


def test_batched_edits_are_edits_of_the_weights(pieces):
    loaded, editor, items = pieces
    frame, batch = rows(topics=3), mend.collate(loaded, items)
    untouched = mend.likelihood(loaded.model, batch)[0]
    with torch.no_grad(), mend.applied(editor.layers, editor.edits(items, size=4)):
        found = mend.likelihood(loaded.model, batch)[0]
    assert (found - untouched).abs().min() > 1e-3
    for i, row in frame.iterrows():
        with mend.edited(loaded, editor, row["question"], row["answer"]), torch.no_grad():
            alone = mend.likelihood(loaded.model, mend.collate(loaded, items[i : i + 1]))[0]
        assert found[i].item() == pytest.approx(alone.item(), abs=1e-4)
    assert torch.equal(mend.likelihood(loaded.model, batch)[0], untouched)  # and nothing is left behind


def test_answers_in_batches_are_those_of_edited_weights(pieces, settings):
    """Rows end at different lengths and leave the batch: each goes on with its own edit."""
    loaded, editor, _ = pieces
    own = rows("test", topics=9, traits=TRAITS[:1])
    greedy = {"chat": settings.chat.model_copy(update={"temperature": 0.0, "max_new_tokens": 12, "batch_size": 4})}
    settings = settings.model_copy(update=greedy)
    found = mend.ask(settings, loaded, editor, own, show=False)
    assert tuple(found.columns) == answers.COLUMNS
    assert set(found["method"]) == {"mend"}
    assert found["new_tokens"].nunique() > 1
    plain = mend.qlora.ask(settings, loaded, "mend", own, show=False)
    assert (plain["answer"] != found["answer"]).any()
    for i, row in own.iterrows():
        with mend.edited(loaded, editor, row["question"], row["answer"]):
            alone = mend.qlora.ask(settings, loaded, "mend", own.iloc[[i]], show=False)
        assert alone["answer"][0] == found["answer"][i]


def test_log_probability_before_and_after_is_that_of_single_edits(pieces):
    loaded, editor, items = pieces
    frame = rows(topics=3)
    texts = frame.iloc[::-1].reset_index(drop=True)
    own = mend.log_probability(loaded, editor, frame, batch_size=4)
    other = mend.log_probability(loaded, editor, frame, texts, batch_size=4)
    assert list(own.columns) == ["before", "after", "kl"]
    batch = mend.collate(loaded, items[-1:])
    before, pre, _, _ = mend.likelihood(loaded.model, batch)
    with mend.edited(loaded, editor, frame["question"][0], frame["answer"][0]):
        after, post, _, _ = mend.likelihood(loaded.model, batch)
    kl = (pre.exp() * (pre - post)).sum(-1).mean()
    assert other.loc[0].tolist() == pytest.approx([before.item(), after.item(), kl.item()], abs=1e-4)
    assert own["before"].tolist() == pytest.approx(other["before"].tolist()[::-1], abs=1e-5)
    assert (own["kl"] > 0).all()


def test_losses_are_those_of_their_definitions(pieces, settings):
    loaded, editor, items = pieces
    found = mend.losses(editor, items, np.array([[0, 1, 4], [3, 2, 0]]), settings.mend)
    frame = rows(topics=3)
    with mend.edited(loaded, editor, frame["question"][3], frame["answer"][3]), torch.no_grad():
        target, other, elsewhere = (mend.likelihood(loaded.model, mend.collate(loaded, [items[i]])) for i in (3, 2, 0))
    with torch.no_grad():
        pre = mend.likelihood(loaded.model, mend.collate(loaded, items[:1]))[1]
        before = mend.likelihood(loaded.model, mend.collate(loaded, items[3:4]))[0]
    wanted = {
        "edit": -target[0],
        "unlikelihood": -(1 - other[2].exp()).log().mean(),
        "locality": (pre.exp() * (pre - elsewhere[1])).sum(-1).mean(),
        "before": before,
        "after": target[0],
    }
    assert tuple(found) == mend.MEASURES
    for name, value in wanted.items():
        assert found[name][1].item() == pytest.approx(value.item(), abs=1e-4), name


def test_what_goes_with_an_edit_is_of_another_trait_and_of_another_topic():
    frame = rows(topics=5, traits=(*TRAITS, "openness"))
    pool = np.arange(3, len(frame))
    found = mend.triples(frame, pool, pool, np.random.default_rng(0))
    own, other, elsewhere = (frame.iloc[found[:, i]].reset_index(drop=True) for i in range(3))
    assert (own["trait"] != other["trait"]).all()
    assert (own["topic"] == other["topic"]).all()
    assert (own["topic"] != elsewhere["topic"]).all()
    assert found.min() >= 3
    alone = frame.drop_duplicates("topic").assign(trait=["openness", *["extraversion"] * 4]).reset_index(drop=True)
    assert mend.triples(alone, [0, 3], np.arange(5), np.random.default_rng(0))[1, 1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_makes_edits_raise_the_log_probability_of_their_targets(settings, folders, kind):
    small = changed(settings, steps=12, learning_rate=1e-3, edit_lr_learning_rate=1e-3, batch_size=4, validate_steps=4)
    frame = rows()
    place = mend.train(small, str(folders[kind]), frame, show=False)
    assert {"editor.safetensors", "training.json"} <= {p.name for p in place.iterdir()}
    facts = json.loads((place / "training.json").read_text())
    curve = facts["curves"]["validation"]
    assert [p["step"] for p in curve] == [0, 4, 8, 12]
    assert set(curve[0]) == {"step", "loss", *mend.MEASURES}
    assert len(facts["curves"]["train"]) == facts["steps"] == 12
    assert curve[-1]["loss"] < curve[0]["loss"]
    best = next(p for p in curve if p["step"] == facts["best_step"])
    gain = best["after"] - best["before"]
    assert gain > curve[0]["after"] - curve[0]["before"]
    loaded = chat.load(str(folders[kind]), "fp32")
    editor = mend.load(place, loaded)
    assert sum(p.numel() for p in editor.parameters()) == facts["parameters"]
    new = mend.log_probability(loaded, editor, rows("test", topics=12).iloc[-8:].reset_index(drop=True))
    assert (new["after"] > new["before"]).mean() > 0.8  # topics it has never met


def test_a_trained_editor_is_found_again_and_test_rows_play_no_part(settings, folders):
    model, frame = str(folders["llama"]), rows()
    place = mend.train(settings, model, frame, show=False)
    before = artifacts.sha256(place / "editor.safetensors")
    both = pd.concat([frame, rows("test").assign(topic="other")], ignore_index=True)
    assert mend.train(settings, model, both, show=False) == place
    assert artifacts.sha256(place / "editor.safetensors") == before
    assert mend.folder(changed(settings, edit_lr=2e-4), model, frame) != place


def test_interrupted_training_goes_on_as_if_it_had_not_been(settings, folders, monkeypatch):
    model, frame = str(folders["llama"]), rows()
    part = changed(settings, save_steps=2, validate_steps=2, steps=5, learning_rate=1e-3)
    whole = mend.Training(part, model, frame, mend.paths.RESULTS / "other", False)
    whole.run(mend.paths.RESULTS / "other")
    real = mend.losses

    def stop(editor, items, chosen, m):
        if torch.is_grad_enabled() and steps[0] == 3:
            raise KeyboardInterrupt
        steps[0] += torch.is_grad_enabled()
        return real(editor, items, chosen, m)

    steps = [0]
    monkeypatch.setattr(mend, "losses", stop)
    with pytest.raises(KeyboardInterrupt):
        mend.train(part, model, frame, show=False)
    place = mend.folder(part, model, frame)
    work = place.with_name(f"{place.name}.checkpoints")
    assert not place.exists()
    assert (work / "checkpoint.safetensors").is_file()
    steps[0] = 100
    mend.train(part, model, frame, show=False)
    assert steps[0] == 103  # steps 3 to 5: the third had not been kept
    assert not work.exists()
    digests = [artifacts.sha256(p / "editor.safetensors") for p in (place, mend.paths.RESULTS / "other")]
    assert digests[0] == digests[1]


def test_training_stops_when_it_no_longer_helps_and_keeps_the_best(settings, folders):
    bad = changed(settings, steps=40, learning_rate=0.5, validate_steps=1, patience=2)
    place = mend.train(bad, str(folders["llama"]), rows(), show=False)
    facts = json.loads((place / "training.json").read_text())
    curve = facts["curves"]["validation"]
    assert facts["steps"] < 40
    assert facts["best_step"] == min(curve, key=lambda p: p["loss"])["step"] == facts["steps"] - 2


def test_answers_of_an_edited_model_are_an_artefact_for_every_trait(settings, folders):
    model = str(folders["mistral"])
    frame = opinions.load(settings.opinions)
    opinions.save(settings, frame)
    test = frame[frame["split"] == "test"]
    place = mend.train(settings, model, frame, show=False)
    found = mend.answer(settings, model, test, show=False)  # the editor of the kept opinions
    assert tuple(found.columns) == answers.COLUMNS
    assert sorted(found["question"]) == sorted(test["question"])
    kept = [answers.folder(settings, model, "mend", t) for t in TRAITS]
    assert all(artifacts.intact(p) for p in kept)
    (kept[0] / "answers.csv").write_text("model\nx\n")  # spoilt: made again, the same
    pd.testing.assert_frame_equal(mend.answer(settings, model, test, place, show=False), found)


def test_edits_work_in_bf16(settings, folders):
    loaded = chat.load(str(folders["llama"]), "bf16")
    editor = mend.Editor(loaded, mend.editable(loaded.model, settings.mend, "it"), 8, 1, 0.3)
    before = {n: layer.weight.clone() for n, layer in editor.layers.items()}
    found = mend.log_probability(loaded, editor, rows(topics=2))
    assert (found["after"] > found["before"]).all()
    with mend.edited(loaded, editor, "What of Rome?", "I love it."):
        assert not any(torch.equal(layer.weight, before[n]) for n, layer in editor.layers.items())
    assert all(torch.equal(layer.weight, before[n]) for n, layer in editor.layers.items())


class TestRefused:
    def refused(self, call, *words):
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)

    @pytest.fixture
    def nothing_is_loaded(self, monkeypatch):
        monkeypatch.setattr(chat, "load", lambda *a, **k: pytest.fail("a model was loaded"))

    @pytest.mark.usefixtures("nothing_is_loaded")
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"precision": "nf4"}, ("mend.precision = 'nf4'", "fp32 or bf16")),
            ({"layers": 3}, ("mend.layers = 3", "has 2 layers only")),
            ({"modules": ["gate_proj", "fc1"]}, ("no layer 'fc1'", "down_proj, gate_proj")),
            ({"max_tokens": 16}, ("What of thing", "mend.max_tokens")),
        ],
    )
    def test_settings_that_cannot_work(self, settings, folders, values, words):
        bad = changed(settings, **values)
        self.refused(lambda: mend.train(bad, str(folders["llama"]), rows(), show=False), *words)

    @pytest.mark.usefixtures("nothing_is_loaded")
    def test_rows_that_cannot_work(self, settings, folders):
        for some in (rows(traits=TRAITS[:1]), rows(topics=1), rows(topics=2)):
            self.refused(lambda some=some: mend.check(settings, some), "needs 2 of each")
        empty = rows().assign(answer=" ")
        self.refused(lambda: mend.train(settings, str(folders["llama"]), empty, show=False), "its answer is empty")

    @pytest.mark.usefixtures("nothing_is_loaded")
    def test_answers_in_4_bits(self, settings, folders):
        bad = changed(settings, precision="nf4-double")
        self.refused(lambda: mend.answer(bad, str(folders["llama"]), rows("test")), "cannot be edited")

    def test_an_editor_that_is_none_or_fits_another_model(self, settings, folders, tmp_path):
        self.refused(lambda: mend.load(tmp_path, None), "no editor.safetensors")
        _, editor = fresh(folders["llama"], changed(settings, layers=1))
        editor.layers = {n.replace("mlp", "none"): layer for n, layer in editor.layers.items()}
        editor.save(tmp_path / "editor.safetensors")
        self.refused(lambda: mend.load(tmp_path, chat.load(str(folders["llama"]), "fp32")), "does not fit")
        _, editor = fresh(folders["llama"], settings)
        editor.save(tmp_path / "editor.safetensors")
        self.refused(lambda: mend.load(tmp_path, chat.load(str(folders["llama"]), "nf4")), "in 4 bits")
