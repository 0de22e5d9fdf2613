"""Units switched between two models: exact ends (none, all), a planted unit, hooks that leave no trace, the tables."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lib import artifacts, chat, emojis, interventions, mediation, neurons, opinions, profiles
from lib.errors import UserError

QUESTIONS = ["What of Rome?", "And the sea, what do you think?", "Oslo?", "What of Lima in the rain?", "Bonn?"]
TEXTS = ["It is old. I like it!", "I love the sea.", "It rains. A lot.", "Well, I worry. Do you?", "Fine."]
NONE = np.empty((0, 2), dtype=int)
GREEDY = {"max_new_tokens": 10, "temperature": 0, "top_p": 1.0, "batch_size": 3}
SAMPLED = GREEDY | {"temperature": 0.8, "top_p": 0.9}
UNIT = (0, 77)  # layer and number of the planted one


def every(speaker, site):
    """All units of a site."""
    numbers = range(len(neurons.layers(speaker))), range(neurons.size(speaker, site))
    return np.array([(n, u) for n in numbers[0] for u in numbers[1]])


def plain(speaker, how=GREEDY, seed=0):
    return list(chat.answer(speaker, QUESTIONS, seed=seed, show=False, **how)["answer"])


@pytest.fixture(scope="module")
def base(folders):
    return chat.load(str(folders["mistral"]), "fp32")


@pytest.fixture(scope="module")
def tuned(folders, base):
    """The base with an adapter on every linear layer that changes its answers."""
    model = chat.load(str(folders["mistral"]), "fp32").model
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return chat.Chat(model.eval(), base.tokenizer, "tuned")


@pytest.fixture(scope="module")
def planted(base):
    """(silent, loud): both have an MLP neuron that writes the emoji's direction; in the second one it is on.

    All other weights of the second differ a little, so that every unit has changed.
    """
    pair = []
    emoji = base.tokenizer.convert_tokens_to_ids(base.tokenizer.tokenize("fun 😄")[-1])
    assert emoji in base.emoji_tokens
    layer, unit = UNIT
    seen = []
    hook = base.model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    chat.token_probabilities(base, chat.prompts(base, QUESTIONS), 1)
    hook.remove()
    x = torch.cat(seen)
    towards = torch.linalg.solve(x.T @ x + 5 * torch.eye(x.shape[1]), x.T @ torch.full((len(x),), 4.0))
    for loud in (False, True):
        model = copy.deepcopy(base.model)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for weight in model.model.layers.parameters() if loud else ():
                weight.add_(0.005 * torch.randn(weight.shape, generator=generator))
            mlp = model.model.layers[layer].mlp
            mlp.gate_proj.weight[unit] = towards if loud else 0
            mlp.up_proj.weight[unit] = towards if loud else 0
            mlp.down_proj.weight[:, unit] = 6 * model.lm_head.weight[emoji]
        pair.append(chat.Chat(model.eval(), base.tokenizer, "planted"))
    return pair


def esr(texts):
    return np.mean([bool(emojis.find(t)) for t in texts])


def test_no_unit_set_is_the_recipient_token_for_token(base, tuned):
    assert plain(tuned) != plain(base)
    assert interventions.answer(tuned, base, "mlp", QUESTIONS, [NONE] * 5, 0, **GREEDY) == plain(tuned)
    ids = base.tokenizer(chat.prompts(base, QUESTIONS))["input_ids"]
    order = sorted(range(5), key=lambda i: -len(ids[i]))
    same = [QUESTIONS[i] for i in order]  # a row's draws go by its number
    for recipient, donor in ((base, tuned), (tuned, base)):
        expected = list(chat.answer(recipient, same, seed=3, show=False, **SAMPLED)["answer"])
        assert interventions.answer(recipient, donor, "mlp", same, [NONE] * 5, 3, **SAMPLED) == expected


def test_all_hidden_dimensions_of_the_last_layer_are_the_donor_token_for_token(base, tuned):
    both = every(base, "hidden")
    for units in (both, both[both[:, 0] == both[:, 0].max()]):
        assert interventions.answer(tuned, base, "hidden", QUESTIONS, [units] * 5, 0, **GREEDY) == plain(base)
        assert interventions.answer(base, tuned, "hidden", QUESTIONS, [units] * 5, 0, **GREEDY) == plain(tuned)


def test_rows_with_other_units_in_one_batch_are_as_alone(base, tuned):
    sets = [NONE, every(base, "mlp"), np.array([[0, 1], [1, 5]]), np.array([[1, 7]]), every(base, "mlp")[::2]]
    together = interventions.answer(tuned, base, "mlp", QUESTIONS, sets, 0, **GREEDY)
    for i in range(5):
        assert interventions.answer(tuned, base, "mlp", QUESTIONS[i : i + 1], sets[i : i + 1], 0, **GREEDY) == [
            together[i]
        ]
    assert together[0] == plain(tuned)[0]
    assert together[1] != plain(tuned)[1]


def test_nothing_of_the_hooks_is_left(base, tuned):
    before = plain(base), plain(tuned)
    interventions.answer(tuned, base, "mlp", QUESTIONS, [every(base, "mlp")] * 5, 0, **GREEDY)
    interventions.attribution(tuned, base, QUESTIONS, TEXTS, "hidden")
    for speaker in (base, tuned):
        for module in speaker.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    assert (plain(base), plain(tuned)) == before
    assert all(p.grad is None for speaker in (base, tuned) for p in speaker.model.parameters())


def test_with_the_adapter_off_the_tuned_model_is_the_base(base, tuned):
    with tuned.model.disable_adapter():
        assert plain(tuned) == plain(base)
        found = interventions.attribution(tuned, base, QUESTIONS[:2], TEXTS[:2], "mlp")
    assert found["effect"].abs().max() == 0
    assert found["change"].abs().max() == 0


def log_odds(speaker, questions, texts):
    p = mediation.endings(speaker, questions, texts)
    p = p.loc[p["last"], "p_emoji"].to_numpy()
    return np.log(p / (1 - p))


@pytest.mark.parametrize("site", neurons.sites)
def test_the_effect_is_the_slope_towards_the_donor(base, tuned, site):
    """Against a small step taken by hand: one unit moved a little towards the donor's activation, at every token."""
    found = interventions.attribution(tuned, base, QUESTIONS, TEXTS, site)
    assert len(found) == len(every(base, site))
    for row in found.iloc[found["effect"].abs().argsort()[-3:]].itertuples():
        small, means = 0.02, []
        for step in (small, -small):
            moved = []
            for q, t in zip(QUESTIONS, TEXTS, strict=True):  # one at a time, so that donor and recipient go together
                held = {}
                keep = {row.layer: lambda x, held=held: held.__setitem__(x.shape[1], x.clone())}
                with neurons.hooked(base, site, keep):
                    mediation.endings(base, [q], [t], tokens=1)

                def shift(x, held=held, row=row, step=step):
                    x = x.clone()
                    x[..., row.unit] += step * (held[x.shape[1]][..., row.unit] - x[..., row.unit])
                    return x

                with neurons.hooked(tuned, site, {row.layer: shift}):
                    moved.append(log_odds(tuned, [q], [t])[0])
            means.append(np.mean(moved))
        assert (means[0] - means[1]) / (2 * small) == pytest.approx(row.effect, rel=0.05, abs=1e-3)


class TestAPlantedUnit:
    @pytest.mark.parametrize("direction", interventions.DIRECTIONS)
    def test_is_found_first_and_moves_the_behaviour(self, planted, direction):
        silent, loud = planted
        recipient, donor = (loud, silent) if direction == "off" else (silent, loud)
        found = interventions.attribution(recipient, donor, QUESTIONS, TEXTS, "mlp")
        units = interventions.choose(found, "selected", 1, direction)
        assert tuple(units[0]) == UNIT
        how = GREEDY | {"max_new_tokens": 20}
        before, after = (
            plain(recipient, how),
            interventions.answer(recipient, donor, "mlp", QUESTIONS, [units] * 5, 0, **how),
        )
        random = interventions.choose(found, "random", 1, direction, seed=1)
        control = interventions.answer(recipient, donor, "mlp", QUESTIONS, [random] * 5, 0, **how)
        low, high = (after, before) if direction == "off" else (before, after)
        assert esr(high) >= 0.8
        assert esr(low) <= 0.2
        assert abs(esr(control) - esr(before)) <= 0.2

    def test_is_among_those_that_changed_most(self, planted):
        silent, loud = planted
        found = interventions.attribution(loud, silent, QUESTIONS, TEXTS, "mlp")
        assert UNIT in [tuple(u) for u in interventions.choose(found, "changed", 5, "off")]


def invented(count=400):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "layer": np.arange(count) // 100,
            "unit": np.arange(count) % 100,
            "effect": rng.normal(size=count),
            "size": rng.lognormal(size=count),
            "change": rng.normal(size=count),
        }
    )


def test_selected_units_are_those_with_the_largest_effect_in_the_right_direction():
    found = invented()
    off, on = (interventions.choose(found, "selected", 3, d) for d in interventions.DIRECTIONS)
    by_effect = found.sort_values("effect")[["layer", "unit"]].to_numpy()
    assert off.tolist() == by_effect[:3].tolist()
    assert on.tolist() == by_effect[::-1][:3].tolist()
    assert len(interventions.choose(found, "all", 0, "off")) == len(found)
    changed = found.loc[found["change"].abs().sort_values(ascending=False).index[:4], ["layer", "unit"]]
    assert interventions.choose(found, "changed", 4, "on").tolist() == changed.to_numpy().tolist()


def test_random_units_are_others_of_like_size():
    found = invented()
    size = found.set_index(["layer", "unit"])["size"]
    for k in (10, 100):
        selected = {tuple(u) for u in interventions.choose(found, "selected", k, "off")}
        draws = [[tuple(u) for u in interventions.choose(found, "random", k, "off", seed=s)] for s in range(20)]
        for draw in draws:
            assert len(set(draw)) == k
            assert not set(draw) & selected
        assert len({frozenset(d) for d in draws}) == 20
        means = [np.log(size.loc[d]).mean() for d in draws]
        assert np.mean(means) == pytest.approx(np.log(size.loc[list(selected)]).mean(), abs=0.1)


def rows(counts):
    """Answers as `of_model` returns them: {(intervention, neurons, k): (with emoji, of)}."""
    found = [
        {"trait": "extraversion", "intervention": i, "neurons": n, "k": k, "draw": j % 10 if "random" in n else 0}
        | {"emoji": j < hits, "perplexity": 2.0 + j}
        for (i, n, k), (hits, of) in counts.items()
        for j in range(of)
    ]
    return pd.DataFrame(found)


def counts(selected, random, none=38, other=0):
    return {
        ("off", "none", 0): (none, 40),
        ("off", "selected mlp", 16): (selected, 40),
        ("off", "random mlp", 16): (random, 60),
        ("on", "none", 0): (other, 40),
        ("on", "selected mlp", 16): (0, 40),
        ("on", "random mlp", 16): (0, 60),
    }


def test_the_table_has_its_columns_and_intervals():
    found = interventions.table(rows(counts(5, 57)), "m", seed=0, draws=200)
    assert tuple(found.columns) == interventions.COLUMNS
    assert list(found["esr_response"]) == pytest.approx([0.95, 0.125, 0.95, 0, 0, 0])
    assert (found["low"] <= found["esr_response"]).all()
    assert (found["esr_response"] <= found["high"]).all()
    assert found["perplexity"][0] == 21.5
    assert found["high"][5] > 0  # nothing in 60 is not never


@pytest.mark.parametrize(
    ("given", "units", "expected"),
    [
        (counts(5, 57), 1000, "holds"),
        (counts(5, 57), 100, "undecided here"),  # 16 of 100 are not few
        (counts(24, 60), 1000, "undecided here"),  # less, but not by half
        (counts(30, 60), 1000, "does not hold"),  # less than random units, not clearly less than none
        (counts(37, 57), 1000, "does not hold"),
        (counts(0, 0), 1000, "does not hold"),  # no better than random
        (counts(0, 0, none=1), 1000, "nothing to switch"),
        (counts(0, 0, none=38, other=38), 1000, "nothing to switch"),
    ],
)
def test_the_verdict_follows_its_rule(given, units, expected):
    found = interventions.table(rows(given), "m", seed=0, draws=200)
    assert interventions.verdict(found, "off", "mlp", units) == expected


def test_the_way_on_is_judged_the_other_way_round():
    given = counts(5, 57) | {("on", "selected mlp", 16): (30, 40)}
    found = interventions.table(rows(given), "m", seed=0, draws=200)
    assert interventions.verdict(found, "on", "mlp", 1000) == "holds"
    found = interventions.table(rows(counts(5, 57)), "m", seed=0, draws=200)
    assert interventions.verdict(found, "on", "mlp", 1000) == "does not hold"


def test_more_units_than_there_are_is_refused_before_loading(folders, monkeypatch):
    monkeypatch.setattr(chat, "load", None)
    own = {"chat.models": [str(folders["llama"])], "interventions.ks": [4, 200]}
    with pytest.raises(UserError, match=r"interventions.ks = 200: .* has 256 mlp units"):
        interventions.check(profiles.load("smoke", overrides=own))
    interventions.check(profiles.load("smoke", overrides=own | {"interventions.ks": [128]}))


@pytest.fixture
def run(folders, places, pair):
    """Settings of a run with one model, its opinions kept, and an adapter."""
    train, test, write = pair
    own = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    own |= {"opinions.train_topics": 0, "opinions.test_topics": 0, "chat.models": [str(folders["llama"])]}
    own |= {
        "chat.precision": "fp32",
        "interventions.sites": ["mlp", "hidden"],
        "interventions.traits": ["extraversion"],
    }
    settings = profiles.load("smoke", overrides=own)
    opinions.save(settings, opinions.load(settings.opinions))
    loaded = chat.load(str(folders["llama"]), "fp32")
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(places / "adapter")
    return settings, {"extraversion": places / "adapter", "neuroticism": places / "adapter"}


def test_a_run_of_both_directions_is_kept_and_read_back(run, monkeypatch):
    settings, adapters = run
    model, frame = settings.chat.models[0], opinions.read(settings)
    answers, units = interventions.of_model(settings, model, adapters, frame, show=False)
    kinds = ("selected", "changed", "random", "all")
    names = {"none", *(f"{kind} {site}" for kind in kinds for site in ("mlp", "hidden"))}
    assert set(answers["neurons"]) == names
    assert set(answers["trait"]) == {"extraversion"}
    assert len(units) == 2 * 2 * 2 * (128 + 64) / 2
    size = answers.groupby(["intervention", "neurons", "k"]).size()
    assert size[:, "selected mlp", 4].tolist() == [2, 2]
    assert size[:, "random mlp", 4].tolist() == [2, 2]
    found = interventions.table(answers, "llama", 0, 100)
    assert len(found) == 2 * (1 + 2 * 4)
    monkeypatch.setattr(chat, "load", None)  # nothing is missing, so no model is loaded
    again, _ = interventions.of_model(settings, model, adapters, frame, show=False)
    pd.testing.assert_frame_equal(again, answers)
    place = interventions.folder(settings, model, "extraversion", adapters["extraversion"], [], [])
    assert not artifacts.intact(place)  # other questions


def test_a_trait_without_an_adapter_has_no_intervention(run):
    settings, _ = run
    assert interventions.of_model(settings, settings.chat.models[0], {}, opinions.read(settings)) == (None, None)
