"""What happens inside a chat model at the last token of a prompt, just before it writes: activations of its units.

Two sites. `mlp`: an input coordinate of a layer's `down_proj` (an MLP neuron). `hidden`: a coordinate of a decoder
layer's output, before any final norm. Layers are numbered from 0, first to last; results come deepest first.
"""

from contextlib import ExitStack, contextmanager

import numpy as np

from lib import chat
from lib.errors import UserError

sites = ("mlp", "hidden")


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
    texts, wanted = list(texts), _numbers(speaker, site, layers)
    found = {number: np.empty((len(texts), size(speaker, site)), dtype=np.float32) for number in wanted}
    for chosen in chat._batches(chat._encode(speaker, texts), batch_size):
        held = {}
        keep = {n: lambda x, n=n: held.__setitem__(n, x[:, -1].float().cpu().numpy()) for n in wanted}
        with hooked(speaker, site, keep):
            chat.token_probabilities(speaker, [texts[i] for i in chosen], len(chosen))
        for number, values in held.items():
            found[number][chosen] = values
    return found


def _numbers(speaker, site, given):
    """The layers asked for, without repeats, deepest first; all where none are given."""
    numbers = sorted({*(range(len(layers(speaker))) if given is None else given)}, reverse=True)
    for number in numbers:
        check(speaker, site, number)
    return numbers
