"""What happens inside a chat model at the last token of a prompt, just before it writes: activations of its units.

Two sites. `mlp`: an input coordinate of a layer's `down_proj` (an MLP neuron). `hidden`: a coordinate of a decoder
layer's output, before any final norm. Layers are numbered from 0, first to last; results come deepest first.
"""

from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import pandas as pd
import regex

from lib import artifacts, big5, chat, emojis, hub, ike, intervals, qlora, units
from lib.errors import UserError

sites = units.SITES
FILE = "neurons.toml"  # of data/prompts
EACH = 2  # emojis a trait in it
ANY = "any"  # stands for all emojis together
TINY = 1e-12  # probabilities below count as this where a ratio is taken


def layers(speaker):
    """The decoder layers of a `Chat`, first to last, also where a PEFT adapter is attached: list of modules."""
    model = speaker.model.get_base_model() if hasattr(speaker.model, "get_base_model") else speaker.model
    found = list(getattr(model.get_decoder(), "layers", []))
    if not found or not all(hasattr(getattr(layer, "mlp", None), "down_proj") for layer in found):
        raise UserError(
            f"model {speaker.name}: has no decoder layers with mlp.down_proj, as Llama, Mistral and Qwen have them; "
            "choose such a model"
        )
    return found


def size(speaker, site):
    """How many units a layer has at a site. Raises UserError."""
    _check_site(site)
    down = layers(speaker)[0].mlp.down_proj
    return down.in_features if site == "mlp" else down.out_features


def check(speaker, site, layer, unit=0):
    """Refuse a site, layer or unit that the model does not have. Raises UserError."""
    width, depth = size(speaker, site), len(layers(speaker))
    if not 0 <= layer < depth:
        raise UserError(f"layer {layer}: {speaker.name} has layers 0 to {depth - 1}; choose one of them")
    if not 0 <= unit < width:
        raise UserError(f"unit {unit}: layer {layer} of {speaker.name} has {site} units 0 to {width - 1}; choose one")


def _check_site(site):
    if site not in sites:
        raise UserError(f"site {site!r}: unknown; choose from {', '.join(sites)}")


@contextmanager
def hooked(speaker, site, actions):
    """While open, every forward pass hands the units of a site to functions that may change them.

    actions: {layer number: function}. A function gets a tensor (texts, tokens, units) and returns one that takes its
    place, or None to leave it as it is. Raises UserError.
    """
    _check_site(site)
    stack = layers(speaker)
    with ExitStack() as open_hooks:
        for number, act in actions.items():
            check(speaker, site, number)
            if site == "mlp":
                handle = stack[number].mlp.down_proj.register_forward_pre_hook(lambda _, args, act=act: act(args[0]))
            else:
                handle = stack[number].register_forward_hook(lambda _, args, out, act=act: act(out))
            open_hooks.callback(handle.remove)
        yield


def activations(speaker, texts, site, layers=None, batch_size=32):
    """Activations at the last token of every text: {layer number: float32 array (texts, units)}, deepest layer first.

    texts: as `chat.prompts` gives them, special tokens included. layers: numbers from 0; without them all. Texts are
    filled on the left and numbered from their own first token, so a text gives the same in any batch (up to
    rounding). Raises UserError.
    """
    return everywhere(speaker, texts, layers, batch_size, [site])[site]


def everywhere(speaker, texts, layers=None, batch_size=32, where=sites):
    """`activations` at several sites in one pass: {site: {layer number: (texts, units)}}."""
    texts, wanted = list(texts), {site: _numbers(speaker, site, layers) for site in where}
    found = {s: {n: np.empty((len(texts), size(speaker, s)), np.float32) for n in wanted[s]} for s in where}
    for chosen in chat._batches(chat._encode(speaker, texts), batch_size):

        def keep(x, into, chosen=chosen):
            into[chosen] = x[:, -1].float().cpu().numpy()

        with ExitStack() as open_hooks:
            for site in where:
                actions = {n: partial(keep, into=found[site][n]) for n in wanted[site]}
                open_hooks.enter_context(hooked(speaker, site, actions))
            chat.token_probabilities(speaker, [texts[i] for i in chosen], len(chosen))
    return found


def _numbers(speaker, site, given):
    """The layers asked for, without repeats, deepest first; all where none are given."""
    numbers = sorted({*(range(len(layers(speaker))) if given is None else given)}, reverse=True)
    for number in numbers:
        check(speaker, site, number)
    return numbers


def prompts():
    """The 17 prompts of data/prompts/neurons.toml: DataFrame prompt (its name), kind, trait, emoji, text.

    kind: neutral, emoji (the neutral sentence with one behind it), text (a trait's voice), question. trait and emoji
    are empty where there is none. Raises UserError naming file and key.
    """
    told = ike.prompts(FILE)
    if unknown := set(told) ^ {"neutral", "question", "emojis", "texts"}:
        key = min(unknown)
        _refuse(key, "is missing; add it" if key not in told else "no such key; remove or correct it")
    neutral, question = (_plain(told[key], key) for key in ("neutral", "question"))
    rows = [("neutral", "neutral", "", "", neutral)]
    for trait, given in _by_trait(told, "emojis"):
        for one in _emojis(given, f"emojis.{trait}"):
            rows.append((f"neutral {one}", "emoji", trait, one, f"{neutral} {one}"))
    rows += [(f"text, {t}", "text", t, "", _plain(text, f"texts.{t}")) for t, text in _by_trait(told, "texts")]
    rows.append(("question", "question", "", "", question))
    found = pd.DataFrame(rows, columns=["prompt", "kind", "trait", "emoji", "text"])
    if found["text"].duplicated().any():
        _refuse("prompts", f"{found.loc[found['text'].duplicated(), 'text'].iloc[0]!r} stands twice; change one")
    return found


def _refuse(key, what):
    raise UserError(f"data/prompts/{FILE}, {key}: {what}")


def _plain(text, key):
    if not isinstance(text, str) or not text.strip():
        _refuse(key, "is no text; write one sentence in quotes")
    if held := emojis.find(text):
        _refuse(key, f"holds the emoji {held[0]}, where none may be; remove it")
    return text.strip()


def _by_trait(told, key):
    """Pairs (trait, what stands there) of a section, in the order O C E A N."""
    part = told[key] if isinstance(told[key], dict) else {}
    if unknown := [t for t in part if t not in big5.NAMES]:
        _refuse(f"{key}.{unknown[0]}", f"unknown trait; use {', '.join(big5.NAMES)}")
    if missing := [t for t in big5.NAMES if t not in part]:
        _refuse(f"{key}.{missing[0]}", "is missing; every trait has an entry")
    return [(t, part[t]) for t in big5.NAMES]


def _emojis(given, key):
    if not isinstance(given, list) or len(given) != EACH:
        count = len(given) if isinstance(given, list) else 0
        _refuse(key, f"has {count} entries where a list of {EACH} is needed; correct it")
    for one in given:
        if not isinstance(one, str) or emojis.find(one) != [one]:
            _refuse(key, f"{one!r} is not one emoji; correct it")
    return given


def emoji_probabilities(speaker, texts, kinds=(), batch_size=32):
    """Probability that the next token begins an emoji: DataFrame (texts, [ANY, *kinds]). Raises UserError.

    texts: as `chat.prompts` gives them. ANY: summed over all emoji tokens, as `chat.emoji_mass` defines them. kinds:
    emojis; those that a token holds whole have a column of their own, summed over such tokens, the others NaN.
    """
    check_emojis(speaker)
    p = chat.token_probabilities(speaker, texts, batch_size)
    written = {i: speaker.tokenizer.decode([i]).strip() for i in speaker.emoji_tokens if i < p.shape[1]}
    whole = {i: emojis.toneless(regex.match(r"\X", text).group()) for i, text in written.items() if text}
    found = {ANY: chat.emoji_mass(speaker, p)}
    for one in kinds:
        ids = [i for i, held in whole.items() if held == emojis.toneless(one)]
        found[one] = p[:, ids].sum(1) if ids else np.full(len(p), np.nan)
    return pd.DataFrame(found)


def check_emojis(speaker):
    """Refuse a tokenizer in which no token begins an emoji. Raises UserError."""
    if not speaker.emoji_tokens:
        raise UserError(
            f"model {speaker.name}: no token of its tokenizer begins an emoji, so it can write none; "
            "choose a model whose tokenizer knows emojis or bytes"
        )


def deepest(speaker, number):
    """Numbers of the `number` deepest layers, deepest first; 0 means all."""
    depth = len(layers(speaker))
    if number > depth:
        raise UserError(
            f"neurons.layers = {number}: {speaker.name} has {depth} layers; give at most that, or 0 for all"
        )
    return list(range(depth))[::-1][: number or depth]


def read(speaker, given, number, kinds=()):
    """What a `Chat` shows before the prompts: {"mlp": {layer: (prompts, units)}, "hidden": ..., "emoji": DataFrame}.

    given: as from `prompts`. number: of layers, as in `deepest`. kinds: as in `emoji_probabilities`.
    """
    texts = chat.prompts(speaker, given["text"])
    found = everywhere(speaker, texts, deepest(speaker, number))
    return found | {"emoji": emoji_probabilities(speaker, texts, kinds)}


def emoji_table(seen, given):
    """Next-token probability of an emoji, untuned and tuned: columns model, trait, prompt, emoji, before, after.

    seen: {model: as from `before_and_after`}. emoji: ANY, or one of the trait's own two, where a token holds it whole.
    """
    parts = []
    for model, readings in seen.items():
        for trait in [t for t in readings if t != "base"]:
            for kind in [ANY, *given.loc[(given["kind"] == "emoji") & (given["trait"] == trait), "emoji"]]:
                before, after = (readings[key]["emoji"][kind].to_numpy() for key in ("base", trait))
                at = {"model": model, "trait": trait, "prompt": given["prompt"], "emoji": kind}
                parts.append(pd.DataFrame(at | {"before": before, "after": after}))
    return pd.concat(parts, ignore_index=True).dropna(subset="before").reset_index(drop=True)


def ratios(table, seed, draws=2000):
    """How many times as likely an emoji became: columns model, trait, times, low, high, before, after.

    table: as from `emoji_table`. times: geometric mean over the prompts of after / before for any emoji, with its
    bootstrap interval; before, after: mean probabilities.
    """
    found = []
    for (model, trait), own in table[table["emoji"] == ANY].groupby(["model", "trait"], sort=False):
        logs = np.log(own["after"].clip(lower=TINY) / own["before"].clip(lower=TINY))
        times = [float(np.exp(v)) for v in intervals.bootstrap(logs, seed, draws)]
        found.append((model, trait, *times, own["before"].mean(), own["after"].mean()))
    return pd.DataFrame(found, columns=["model", "trait", "times", "low", "high", "before", "after"])


def before_and_after(settings, model, train, given, show=True):
    """`read` of a model without an adapter and with each trait's: {"base": ..., trait: ...}. Raises UserError.

    train: train opinions, by which the adapters of notebook 03 are found, all of them before a model is loaded.
    """
    from tqdm.auto import tqdm

    traits = big5.ordered(train["trait"])
    places = {t: qlora.folder(settings, model, t, train[train["trait"] == t]) for t in traits}
    for place in places.values():
        artifacts.require(place, "03_qlora", settings.profile)
        hub.check_adapter(str(place), model)
    plain, kinds, found = chat.load(model, settings.chat.precision), given.loc[given["emoji"] != "", "emoji"], {}
    for trait, place in tqdm({"base": None, **places}.items(), desc=hub.label(model), unit="reading", disable=not show):
        with chat.adapted(plain, place and str(place)) as speaker:
            found[trait] = read(speaker, given, settings.neurons.layers, kinds)
    return found
