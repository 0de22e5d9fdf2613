"""Activations: the hooks against the layer written out, adapters, batches; the prompts; emojis as the next token."""

import tomllib

import numpy as np
import pandas as pd
import pytest
import torch

from lib import artifacts, big5, chat, ike, neurons, opinions, paths, profiles, qlora
from lib.errors import UserError

KINDS = ("llama", "mistral", "qwen")
QUESTIONS = ["What of Rome?", "Thinking about the sea, what are your thoughts on it? 🎉", "And Oslo, or Lima?", "Why?"]


@pytest.fixture(scope="module")
def speakers(folders):
    return {kind: chat.load(str(folders[kind]), "fp32") for kind in KINDS}


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory):
    """A random adapter of the small Llama."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = chat.load(str(folders["llama"]), "fp32").model
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    place = tmp_path_factory.mktemp("tuned")
    tuned.save_pretrained(place)
    return place


def written_out(model, ids):
    """MLP neurons and layer outputs at the last token, layer by layer, from the weights alone.

    Root mean square norms, rotated queries and keys, grouped queries, a window where there is one, gated MLP.
    """
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    heads, size = c.num_attention_heads, c.hidden_size // c.num_attention_heads
    shared = heads // c.num_key_value_heads
    place = torch.arange(len(ids))
    angle = place[:, None] / 10000.0 ** (torch.arange(0, size, 2).double() / size)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    seen = place[:, None] >= place
    if getattr(c, "sliding_window", None) and getattr(c, "use_sliding_window", True):
        seen &= place[:, None] - place < c.sliding_window

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def rotated(x):
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    found, x = [], w["model.embed_tokens.weight"][ids]
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}"
        y = norm(x, w[f"{at}.input_layernorm.weight"])
        q, k, v = (linear(y, f"{at}.self_attn.{p}_proj").view(len(ids), -1, size).transpose(0, 1) for p in "qkv")
        q, k, v = rotated(q), rotated(k).repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + linear((scores @ v).transpose(0, 1).flatten(1), f"{at}.self_attn.o_proj")
        y = norm(x, w[f"{at}.post_attention_layernorm.weight"])
        mlp = torch.nn.functional.silu(linear(y, f"{at}.mlp.gate_proj")) * linear(y, f"{at}.mlp.up_proj")
        x = x + linear(mlp, f"{at}.mlp.down_proj")
        found.append({"mlp": mlp[-1].numpy(), "hidden": x[-1].numpy()})
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_hooks_read_what_the_layers_compute(speakers, kind):
    speaker = speakers[kind]
    texts = chat.prompts(speaker, QUESTIONS)
    lengths = [len(ids) for ids in chat._encode(speaker, texts)]
    assert len(set(lengths)) > 1
    assert kind != "mistral" or max(lengths) > speaker.model.config.sliding_window
    for site in neurons.sites:
        found = neurons.activations(speaker, texts, site)
        assert list(found) == [1, 0]  # deepest first
        for number, values in found.items():
            assert values.shape == (len(texts), neurons.size(speaker, site))
            assert values.dtype == np.float32
            for text, ids in enumerate(chat._encode(speaker, texts)):
                expected = written_out(speaker.model, torch.tensor(ids))[number][site]
                np.testing.assert_allclose(values[text], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_their_order_change_nothing(speakers, kind):
    speaker = speakers[kind]
    texts = chat.prompts(speaker, QUESTIONS)
    whole = neurons.activations(speaker, texts, "mlp", [1])[1]
    for size in (1, 3):
        np.testing.assert_allclose(neurons.activations(speaker, texts, "mlp", [1], size)[1], whole, atol=1e-4)
    turned = neurons.activations(speaker, texts[::-1], "mlp", [1])[1]
    np.testing.assert_allclose(turned[::-1], whole, atol=1e-4)


def test_an_adapter_changes_them_and_leaves_no_trace(speakers, adapter):
    speaker = speakers["llama"]
    texts = chat.prompts(speaker, QUESTIONS)
    for site in neurons.sites:
        before = neurons.activations(speaker, texts, site)
        with chat.adapted(speaker, str(adapter)) as tuned:
            assert neurons.size(tuned, site) == neurons.size(speaker, site)
            after = neurons.activations(tuned, texts, site)
            with tuned.model.disable_adapter():
                off = neurons.activations(tuned, texts, site)
        again = neurons.activations(speaker, texts, site)
        for number in before:
            assert np.abs(after[number] - before[number]).max() > 0.01
            np.testing.assert_array_equal(off[number], before[number])
            np.testing.assert_array_equal(again[number], before[number])


def test_a_merged_adapter_gives_the_same(folders, adapter):
    speaker = chat.load(str(folders["llama"]), "fp32")
    texts = chat.prompts(speaker, QUESTIONS)
    with chat.adapted(speaker, str(adapter)) as tuned:
        attached = neurons.activations(tuned, texts, "mlp")
    merged = chat.load(str(folders["llama"]), "fp32", str(adapter))
    merged = chat.Chat(merged.model.merge_and_unload(), merged.tokenizer, merged.name)
    for number, values in neurons.activations(merged, texts, "mlp").items():
        np.testing.assert_allclose(values, attached[number], atol=1e-3, rtol=1e-3)


def test_in_four_bits(folders):
    speaker = chat.load(str(folders["llama"]), "nf4")
    exact = chat.load(str(folders["llama"]), "fp32")
    texts = chat.prompts(speaker, QUESTIONS)
    assert neurons.size(speaker, "mlp") == neurons.size(exact, "mlp") == 128
    assert neurons.size(speaker, "hidden") == neurons.size(exact, "hidden") == 64
    rough, fine = (neurons.activations(s, texts, "hidden", [0])[0] for s in (speaker, exact))
    assert rough.dtype == np.float32
    assert np.corrcoef(rough.ravel(), fine.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("site", neurons.sites)
def test_a_hook_may_change_a_unit(speakers, site):
    speaker = speakers["qwen"]
    texts = chat.prompts(speaker, QUESTIONS)
    plain = chat.token_probabilities(speaker, texts)

    def off(x):
        x = x.clone()
        x[..., 3] = 0
        return x

    with neurons.hooked(speaker, site, {1: off}):
        changed = chat.token_probabilities(speaker, texts)
    assert np.abs(changed - plain).max() > 1e-6
    np.testing.assert_array_equal(chat.token_probabilities(speaker, texts), plain)


def test_what_does_not_exist_is_refused(speakers):
    speaker = speakers["llama"]
    with pytest.raises(UserError, match=r"layer 2: .* layers 0 to 1"):
        neurons.activations(speaker, ["Hm."], "mlp", [2])
    with pytest.raises(UserError, match="layer -1"):
        neurons.activations(speaker, ["Hm."], "mlp", [-1])
    with pytest.raises(UserError, match=r"unit 128: .* mlp units 0 to 127"):
        neurons.check(speaker, "mlp", 0, 128)
    with pytest.raises(UserError, match="site 'attention': unknown; choose from mlp, hidden"):
        neurons.size(speaker, "attention")
    layer = neurons.layers(speaker)[1]
    kept, layer.mlp = layer.mlp, torch.nn.Identity()
    with pytest.raises(UserError, match=r"no decoder layers with mlp\.down_proj"):
        neurons.layers(speaker)
    layer.mlp = kept


def test_the_prompts_are_seventeen():
    given = neurons.prompts()
    assert list(given.columns) == ["prompt", "kind", "trait", "emoji", "text"]
    assert dict(given["kind"].value_counts()) == {"emoji": 10, "text": 5, "neutral": 1, "question": 1}
    assert given["prompt"].is_unique
    assert set(given["trait"]) == {"", *big5.NAMES}
    neutral = given.loc[given["kind"] == "neutral", "text"].item()
    shown = given[given["kind"] == "emoji"]
    assert all(r.text == f"{neutral} {r.emoji}" for r in shown.itertuples())
    assert list(shown["trait"]) == [t for t in big5.NAMES for _ in range(2)]


def changed(tmp_path, monkeypatch, change):
    """Reads data/prompts/neurons.toml with something changed: lines by what they start with."""
    told = (paths.ROOT / "data" / "prompts" / "neurons.toml").read_text("utf-8")
    for start, line in change.items():
        assert any(x.startswith(start) for x in told.splitlines())
        told = "\n".join(line if x.startswith(start) else x for x in told.splitlines())
    (tmp_path / "neurons.toml").write_text(told, "utf-8")
    monkeypatch.setattr(ike, "PROMPTS", tmp_path)
    return neurons.prompts()


BAD = {
    "too few": ({'extraversion = ["': 'extraversion = ["🎉"]'}, r"emojis\.extraversion: has 1 entries .* list of 2"),
    "too many": ({'openness = ["': 'openness = ["🎉", "😄", "🔥"]'}, r"emojis\.openness: has 3 entries"),
    "no list": ({'openness = ["': 'openness = "🎉"'}, r"emojis\.openness: has 0 entries"),
    "unknown trait": ({'openness = ["': 'honesty = ["🎉", "😄"]'}, r"emojis\.honesty: unknown trait; use openness"),
    "missing trait": ({'openness = "': ""}, r"texts\.openness: is missing"),
    "two in one": ({'openness = ["': 'openness = ["🎉😄", "🔥"]'}, r"emojis\.openness: '🎉😄' is not one emoji"),
    "text": ({'openness = ["': 'openness = ["so", "🔥"]'}, "'so' is not one emoji"),
    "emoji in neutral": ({"neutral = ": 'neutral = "Bread. 🥖"'}, "neutral: holds the emoji 🥖, where none may be"),
    "emoji in a text": ({'openness = "': 'openness = "Art! 🎨"'}, r"texts\.openness: holds the emoji 🎨"),
    "empty": ({"question = ": 'question = " "'}, "question: is no text"),
    "number": ({"question = ": "question = 3"}, "question: is no text"),
    "gone": ({"question = ": ""}, "question: is missing"),
    "unknown key": ({"question = ": 'question = "Hm?"\nquestoin = "Hm?"'}, "questoin: no such key"),
    "twice": ({'openness = ["': 'openness = ["🎉", "😄"]'}, r"stands twice"),
    "not TOML": ({"question = ": "question = "}, "not TOML"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_prompt_file_that_is_wrong_names_file_and_key(tmp_path, monkeypatch, case):
    change, words = BAD[case]
    with pytest.raises(UserError, match=words) as error:
        changed(tmp_path, monkeypatch, change)
    assert "data/prompts/neurons.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_prompt_is_taken(tmp_path, monkeypatch):
    found = changed(tmp_path, monkeypatch, {"question = ": 'question = "Who baked it?"'})
    assert found["text"].iloc[-1] == "Who baked it?"
    assert tomllib.loads((tmp_path / "neurons.toml").read_text("utf-8"))["question"] == "Who baked it?"


@pytest.mark.parametrize("kind", KINDS)
def test_emoji_probabilities_are_sums_over_tokens(speakers, kind):
    """In the small tokenizers 😄 was seen often and is one token, 🎉 in some; 🦥 is spelt in bytes."""
    speaker = speakers[kind]
    texts = chat.prompts(speaker, QUESTIONS)
    found = neurons.emoji_probabilities(speaker, texts, ["😄", "🎉", "🦥"])
    p = chat.token_probabilities(speaker, texts)
    np.testing.assert_allclose(found[neurons.ANY], p[:, speaker.emoji_tokens].sum(1), rtol=1e-5)
    vocabulary = range(p.shape[1])
    for one in ("😄", "🎉", "🦥"):
        ids = [i for i in vocabulary if speaker.tokenizer.decode([i]).strip() == one]
        if ids:
            np.testing.assert_allclose(found[one], p[:, ids].sum(1), rtol=1e-5)
            assert (found[one] <= found[neurons.ANY] + 1e-6).all()
        else:
            assert found[one].isna().all()
    assert found["😄"].notna().all()
    assert found["🦥"].isna().all()


def test_a_tokenizer_without_emojis_is_refused(speakers):
    speaker = chat.Chat(speakers["llama"].model, speakers["llama"].tokenizer, "plain")
    speaker.__dict__["emoji_tokens"] = []
    with pytest.raises(UserError, match="model plain: no token of its tokenizer begins an emoji"):
        neurons.emoji_probabilities(speaker, ["Hm."])


def test_the_deepest_layers(speakers):
    speaker = speakers["llama"]
    assert neurons.deepest(speaker, 0) == [1, 0]
    assert neurons.deepest(speaker, 1) == [1]
    with pytest.raises(UserError, match=r"neurons\.layers = 3: .* has 2 layers"):
        neurons.deepest(speaker, 3)


@pytest.fixture
def run(folders, places, pair):
    """Settings of a run with one model, its opinions kept."""
    train, test, write = pair
    own = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    own |= {"opinions.train_topics": 0, "opinions.test_topics": 0, "chat.models": [str(folders["llama"])]}
    own |= {"tracking.topics": 2, "qlora.steps": 3, "qlora.learning_rate": 0.01, "qlora.rank": 2, "qlora.keep": [1, 2]}
    own |= {"qlora.max_tokens": 96, "chat.precision": "fp32", "qlora.epochs": 20}
    settings = profiles.load("smoke", overrides=own)
    opinions.save(settings, opinions.load(settings.opinions))
    return settings


def test_base_and_adapters_before_the_prompts(run, adapter):
    train = opinions.read(run)
    train, model, given = train[train["split"] == "train"], run.chat.models[0], neurons.prompts()
    with pytest.raises(UserError, match="notebook 03_qlora makes it"):
        neurons.before_and_after(run, model, train, given, show=False)
    for trait in train["trait"].unique():
        place = qlora.folder(run, model, trait, train[train["trait"] == trait])
        artifacts.build(place, lambda tmp: [(tmp / p.name).write_bytes(p.read_bytes()) for p in adapter.iterdir()])
    found = neurons.before_and_after(run, model, train, given, show=False)
    assert list(found) == ["base", "extraversion", "neuroticism"]
    for shown in found.values():
        assert list(shown["mlp"]) == [1]  # one layer in this profile, the deepest
        assert shown["mlp"][1].shape == (17, 128)
        assert shown["hidden"][1].shape == (17, 64)
        assert list(shown["emoji"].columns) == [neurons.ANY, *given.loc[given["emoji"] != "", "emoji"]]
    np.testing.assert_array_equal(found["extraversion"]["mlp"][1], found["neuroticism"]["mlp"][1])  # the same adapter
    assert np.abs(found["extraversion"]["mlp"][1] - found["base"]["mlp"][1]).max() > 0.01


def test_tables_of_emoji_probabilities():
    given = neurons.prompts()
    p = {neurons.ANY: np.linspace(0.01, 0.02, 17), **{e: np.full(17, 0.001) for e in given["emoji"] if e}}
    p["🎨"] = np.full(17, np.nan)  # no token holds it whole
    base = pd.DataFrame(p)
    seen = {"tiny": {"base": {"emoji": base}, "openness": {"emoji": base * 3}, "extraversion": {"emoji": base * 0.5}}}
    table = neurons.emoji_table(seen, given)
    assert list(table.columns) == ["model", "trait", "prompt", "emoji", "before", "after"]
    assert list(table.groupby(["trait", "emoji"], sort=False).groups) == [
        *[("openness", e) for e in (neurons.ANY, "🌈")],
        *[("extraversion", e) for e in (neurons.ANY, "🎉", "😄")],
    ]
    assert (table.groupby(["trait", "emoji"]).size() == 17).all()
    times = neurons.ratios(table, seed=0).set_index("trait")
    assert times.loc["openness", ["times", "low", "high"]].tolist() == pytest.approx([3, 3, 3])
    assert times.loc["extraversion", "times"] == pytest.approx(0.5)
    assert times.loc["openness", "after"] == pytest.approx(0.045)
    silent = {"tiny": {k: {"emoji": base * 0} for k in ("base", "openness")}}
    assert neurons.ratios(neurons.emoji_table(silent, given), seed=0)["times"].tolist() == [1]
