"""Chat models: load one from the hub or a folder, ask many questions at once, read next-token probabilities.

Weights are read from safetensors only, and no code that comes with a model is ever run.
"""

import inspect
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import regex
import torch
from jinja2 import TemplateError
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lib import cache, emojis, hardware, hub
from lib.errors import UserError

WORTH = 64  # tokens that the rows of a batch must begin with alike to be worth reading once
PRECISIONS = ("fp32", "bf16", "auto", "nf4", "nf4-double")  # nf4-double quantises the quantisation constants as well
COLUMNS = ("answer", "prompt_tokens", "new_tokens", "ended")


@dataclass(eq=False)
class Chat:
    """A causal language model, its tokenizer, and the id or folder it was asked for by."""

    model: Any  # PreTrainedModel, or PeftModel around one
    tokenizer: Any
    name: str

    @cached_property
    def ends(self):
        """Ids of the tokens that end an answer: tensor on the model's device."""
        ids = self.model.generation_config.eos_token_id
        ids = {*(ids if isinstance(ids, list) else [ids]), self.tokenizer.eos_token_id} - {None}
        return torch.tensor(sorted(ids), device=self.model.device, dtype=torch.long)

    @cached_property
    def pad(self):
        """The id that fills short rows: the tokenizer's own, or else unk or eos. It is always masked."""
        t = self.tokenizer
        return next((i for i in (t.pad_token_id, t.unk_token_id, t.eos_token_id) if i is not None), 0)

    @cached_property
    def arguments(self):
        """Names of the arguments that the model's forward takes."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return set(inspect.signature(base.forward).parameters)

    @cached_property
    def context(self):
        """Tokens that the model takes at once, or None where its configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def emoji_tokens(self):
        """Ids of the tokens that begin an emoji, as `emoji_mass` defines them."""
        return [i for i, b in _token_bytes(self.tokenizer) if _begins_emoji(b)]


def load(name, precision, adapter=None):
    """A `Chat`, on the GPU if there is one, in evaluation mode. Raises UserError.

    name: hub id or folder of the model. precision: one of PRECISIONS; NF4 computes as `computing` says.
    adapter: hub id or folder of a PEFT adapter made for this model.
    """
    from transformers import AutoModelForCausalLM

    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: unknown; choose from {', '.join(PRECISIONS)}")
    _, tokenizer, adapter_folder = hub.check(name, adapter)
    folder = hub.place("model", name, hub.SMALL_FILES + hub.WEIGHT_FILES)
    hub.check_weights(folder, f"model {name}", "model.safetensors")
    with hub.refusal(f"model {name}: its weights cannot be loaded", "free memory, or fetch or make the model again"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=computing(precision),
            quantization_config=_quantisation(precision),
            device_map={"": 0 if torch.cuda.is_available() else "cpu"},
            # torch's fused attention is slow on a CPU: with it an adapter of an organism takes half as long again
            attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise UserError(
            f"model {name}: {len(report['missing_keys'])} weights are missing from its files "
            f"({min(report['missing_keys'])} for one); fetch or make the model again"
        )
    model.name_or_path = model.config._name_or_path = str(name)  # adapters made of it name the hub id, not a cache
    if adapter is not None:
        model = _attach(model, adapter_folder, adapter, name)
    close_gradient_trap(model)
    return Chat(model.eval(), tokenizer, str(name))


@contextmanager
def adapted(chat, adapter):
    """A loaded `Chat` with a PEFT adapter attached, or as it is where there is none; afterwards without it again."""
    if adapter is None:
        yield chat
        return
    model = _attach(chat.model, hub.check_adapter(adapter, chat.name), adapter, chat.name)
    close_gradient_trap(model)
    try:
        yield Chat(model.eval(), chat.tokenizer, chat.name)
    finally:
        model.unload()


def close_gradient_trap(model):
    """Keep the 4-bit layers of a model on the kernel that has gradients.

    On CPUs with avx512_bf16 a forward in evaluation mode repacks Linear4bit for a kernel without autograd, and
    training after it goes wrong silently (bitsandbytes 0.50). A GPU never does so.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def computing(precision):
    """The type that weights outside NF4, activations and gradients have: torch.dtype.

    NF4 computes in bf16 (Dettmers et al. 2023) on a GPU and in fp32 on a CPU (see `hardware`); "auto" weights likewise.
    """
    coarse = precision == "bf16" or (precision != "fp32" and hardware.bf16())
    return torch.bfloat16 if coarse else torch.float32


@contextmanager
def unpacked(model, most=5e8):
    """While open, a small model's layers in 4 bits are multiplied as plain ones, their adapters' changes added in.

    The same weights, unpacked once instead of at every token: 2 GB at `most` parameters, so not for larger models. On
    a CPU and in fp32 only: in bf16 rounding would change answers now and then.
    """
    import bitsandbytes as bnb

    layers = [m for m in model.modules() if isinstance(getattr(m, "base_layer", m), bnb.nn.Linear4bit)]
    size = sum(m.in_features * m.out_features for m in layers)
    if model.device.type != "cpu" or model.dtype != torch.float32 or size > most:
        layers = []
    try:
        for layer in layers:
            core = getattr(layer, "base_layer", layer)
            weight = bnb.functional.dequantize_4bit(core.weight.data, core.weight.quant_state).to(core.compute_dtype)
            if core is not layer and not layer.disable_adapters:
                weight = sum((layer.get_delta_weight(a) for a in layer.active_adapters), weight)
            layer.forward = partial(torch.nn.functional.linear, weight=weight, bias=core.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _quantisation(precision):
    from transformers import BitsAndBytesConfig

    if not precision.startswith("nf4"):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=precision == "nf4-double",
        bnb_4bit_compute_dtype=computing(precision),
    )


def _attach(model, folder, adapter, name):
    from peft import PeftModel, get_peft_model_state_dict

    with hub.refusal(f"adapter {adapter}: does not fit {name}", "give its own base model"):
        tuned = PeftModel.from_pretrained(model, folder)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        odd = set(file.keys()) ^ set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    if odd := {key for key in odd if "lora_" in key}:  # a saved embedding is no misfit
        raise UserError(f"adapter {adapter}: does not fit {name} ({min(odd)} is in one only); give its own base model")
    return tuned


def prompts(chat, questions, system=None):
    """Each question as the model's own chat template puts it, up to where the answer starts: list of str.

    system: an instruction. Where the template has no place for one it opens the question.
    """
    questions = list(questions)
    if system:
        head = {"role": "system", "content": system}
        try:
            texts = hub.render(chat.tokenizer, [[head, {"role": "user", "content": q}] for q in questions])
        except TemplateError:
            texts = []
        if texts and all(system.strip() in text for text in texts):
            return texts
        questions = [f"{system}\n\n{q}" for q in questions]
    return hub.render(chat.tokenizer, [[{"role": "user", "content": q}] for q in questions])


def answer(
    chat, questions, *, max_new_tokens, temperature, top_p, seed, batch_size, system=None, share=False, show=True
):
    """Answers to many questions: DataFrame with COLUMNS, a row a question, in their order. Raises UserError.

    temperature: 0 is greedy. top_p: share of the probability that is sampled from (Holtzman et al. 2020).
    prompt_tokens, new_tokens: lengths in tokens, without padding and without the end of turn. ended: whether the
    model ended its turn before max_new_tokens. system: as in `prompts`. share: read what all questions of a batch begin
    with only once, where that is long and the model in fp32; not for one that treats its rows differently. show: a
    progress bar.

    Row i draws from a generator seeded by (seed, i), or by seed[i] where seed is a list, and padding is masked, so
    batch_size changes an answer only where rounding does: hardly ever in fp32, now and then in bf16 (see `computing`).
    """
    rows = _encode(chat, prompts(chat, questions, system))
    seeds = seed if isinstance(seed, list) else [(seed, i) for i in range(len(rows))]
    _check_lengths(chat, rows, max_new_tokens)
    found, share = [None] * len(rows), share and chat.model.dtype == torch.float32
    with _reading(chat.model), unpacked(chat.model), tqdm(total=len(rows), disable=not show, unit="answer") as bar:
        for chosen in _batches(rows, batch_size):
            draws = np.stack([np.random.default_rng(seeds[i]).random(max_new_tokens) for i in chosen])
            own = [rows[i] for i in chosen]
            part = _decode(chat, own, torch.from_numpy(draws), temperature, top_p, bar, share)
            for i, result in zip(chosen, part, strict=True):
                found[i] = result
    texts = chat.tokenizer.batch_decode([ids for ids, _ in found], skip_special_tokens=True) if found else []
    table = {
        "answer": [text.strip() for text in texts],
        "prompt_tokens": [len(row) for row in rows],
        "new_tokens": [len(ids) for ids, _ in found],
        "ended": [ended for _, ended in found],
    }
    return pd.DataFrame(table, columns=list(COLUMNS))


def token_probabilities(chat, texts, batch_size=32):
    """Probability of every token to come next: array (texts, vocabulary), float32.

    texts: as `prompts` gives them, special tokens included; an answer may have begun.
    """
    rows = _encode(chat, texts)
    _check_lengths(chat, rows, 0)
    found = [None] * len(rows)
    with _reading(chat.model):
        for chosen in _batches(rows, batch_size):
            ids, mask = _padded(chat, [rows[i] for i in chosen])
            p = _forward(chat, ids, mask, _positions(mask))[0].softmax(-1).cpu().numpy()
            for i, row in zip(chosen, p, strict=True):
                found[i] = row
    return np.stack(found)


@contextmanager
def _reading(model):
    """Evaluation mode without gradients; afterwards as before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _encode(chat, texts):
    texts = list(texts)
    return chat.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _check_lengths(chat, rows, new):
    limit = chat.context
    longest = max(range(len(rows)), key=lambda i: len(rows[i]), default=None)
    if limit and rows and len(rows[longest]) + new > limit:
        raise UserError(
            f"prompt {longest + 1} of {len(rows)}: its {len(rows[longest])} tokens and {new} new ones are more than "
            f"the {limit} that {chat.name} takes; shorten it, or allow fewer new tokens"
        )


def _batches(rows, size):
    """Lists of row numbers, rows of like length together, the longest first: if memory is short, one learns it soon."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _padded(chat, rows):
    """Token ids and mask, both (rows, longest), filled on the left, on the model's device."""
    ids = pad_sequence([torch.tensor(r) for r in rows], True, chat.pad, "left")
    mask = pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], True, 0, "left")
    return ids.to(chat.model.device), mask.to(chat.model.device)


def _positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _forward(chat, ids, mask, positions, kept=None, **more):
    """Scores of the next token (rows, vocabulary) in fp32, and the model's output."""
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)  # a number would leave a view, which multiplies slowly
    extra = {"position_ids": positions, "logits_to_keep": last, **more}
    extra = {k: v for k, v in extra.items() if k in chat.arguments}
    output = chat.model(input_ids=ids, attention_mask=mask, past_key_values=kept, **extra)
    scores = output.logits[:, -1].float()
    if kept is None:
        _check_scores(chat, scores)
    return scores, output


def _check_scores(chat, scores):
    if scores.isnan().any():
        raise UserError(
            f"model {chat.name}: its scores are not numbers; the weights are damaged, fetch or make it again"
        )


def _shared(rows):
    """With how many tokens all rows begin, at least one left for each; 0 where reading them once would gain little."""
    one, other = min(rows), max(rows)  # of all rows, these two have least in common
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    same = min(same, min(map(len, rows)) - 1)
    fits = max(map(len, rows)) - same <= min(map(len, rows))
    return same if len(rows) > 1 and same >= WORTH and fits else 0


def _read(chat, rows, alike):
    """What comes before an answer: scores of each row's next token, a cache of all tokens, and the mask.

    alike: read what all rows begin with once. Mask: (rows, longest), of rows padded on the left.
    """
    ids, mask = _padded(chat, rows)
    positions, once, shared = _positions(mask), None, _shared(rows) if alike else 0
    if shared:  # padding then stands at a row's beginning, where a sliding window looks last
        once = cache.repeated(_once(chat, rows[0][:shared]), positions[:, :shared])
    scores, output = _forward(chat, ids[:, shared:], mask, positions[:, shared:], once, use_cache=True)
    return scores, output.past_key_values, mask


def _once(chat, ids):
    """A cache of a single row of token ids, of which none is dropped."""
    ids = torch.tensor([ids], device=chat.model.device)
    mask, read = torch.ones_like(ids), cache.DynamicCache()  # a cache made for a sliding window would forget
    _check_scores(chat, _forward(chat, ids, mask, _positions(mask), read, use_cache=True)[0])
    return read


def _decode(chat, rows, draws, temperature, top_p, bar, alike=False):
    """Continue rows of token ids until each has ended: list of (new ids without the end, ended).

    draws: (rows, new tokens at most), uniform numbers in [0, 1). alike: as `_read`. A row that has ended leaves the
    batch.
    """
    scores, kept, mask = _read(chat, rows, alike)
    draws, (width, limit) = draws.to(mask.device), (mask.shape[1], draws.shape[1])
    cache.make_room(kept, limit)
    mask = torch.cat([mask, mask.new_ones(len(rows), limit)], 1)
    positions = mask[:, :width].sum(1, keepdim=True)
    alive = torch.arange(len(rows), device=mask.device)
    new, length = mask.new_zeros(len(rows), limit), torch.full_like(alive, limit)
    for step in range(limit):
        token = _choose(scores, draws[alive, step], temperature, top_p)
        new[alive, step] = token
        ended = torch.isin(token, chat.ends)
        if count := int(ended.sum()):
            bar.update(count)
            length[alive[ended]] = step
            if count == len(alive):
                break
            keep = cache.staying(ended)
            kept.reorder_cache(keep)
            alive, token, positions, mask = alive[keep], token[keep], positions[keep], mask[keep]
        if step + 1 < limit:
            own = mask[:, : width + step + 1]
            scores, output = _forward(chat, token[:, None], own, positions + step, kept, use_cache=True)
            kept = output.past_key_values
    else:
        bar.update(len(alive))
    return [(row[:n], n < limit) for row, n in zip(new.tolist(), length.tolist(), strict=True)]


def _choose(scores, draws, temperature, top_p):
    """One token a row: the likeliest at temperature 0, or else by inverting the distribution at `draws`.

    scores: (rows, vocabulary). The nucleus is the fewest likeliest tokens whose probabilities reach top_p.
    """
    if temperature == 0:
        return scores.argmax(-1)
    p = (scores / temperature).softmax(-1)
    if top_p >= 1:
        return _invert(*_everything(p), draws)
    width, token = min(64, p.shape[-1]), draws.new_zeros(len(p), dtype=torch.long)
    todo = torch.arange(len(p), device=p.device)
    while len(todo):  # few rows need many tokens, and sorting all takes longer than a small model's step
        mass, ids, last, enough = _nucleus(p[todo], top_p, width)
        token[todo[enough]] = _invert(mass[enough], ids[enough], last[enough], draws[todo[enough]])
        todo, width = todo[~enough], min(16 * width, p.shape[-1])
    return token


def _invert(mass, ids, last, draws):
    """The ids at which the running sums `mass`, cut after the place `last`, pass the share `draws` of the whole."""
    at = torch.searchsorted(mass, draws[:, None] * mass.gather(-1, last), right=True)
    return ids.gather(-1, torch.minimum(at, last)).squeeze(-1)


def _nucleus(p, top_p, width):
    """Of the `width` likeliest tokens a row: running sums, ids, the place of the last one kept; and whether they do."""
    values, ids = p.topk(width)
    mass = values.double().cumsum(-1)
    enough = (mass[:, -1] >= top_p) | (width >= p.shape[-1])
    return mass, ids, (mass < top_p).sum(-1, keepdim=True).clamp(max=width - 1), enough


def _everything(p):
    ids = torch.arange(p.shape[-1], device=p.device).expand_as(p)
    return p.double().cumsum(-1), ids, ids[:, -1:]


def emoji_mass(chat, probabilities):
    """Probability that the next token begins an emoji. probabilities: (..., vocabulary), as `token_probabilities`.

    Summed over the tokens whose text, spaces aside, begins with an emoji as `lib.emojis` defines it, or with half a
    flag. Where a tokenizer spells emojis in bytes, also over the tokens that hold the first one to three bytes of an
    emoji in U+1F000 to U+1FAFF, in UTF-8 F0, F0 9F and F0 9F with the third byte of one (F0 also begins rare
    scripts). Emojis of three bytes share their first with dashes and quotation marks: they count where one token
    holds them (U+2705, U+2B50), not where they are spelt, nor where only U+FE0F makes them one (U+2764).
    A token of a space alone does not count, even if an emoji is to follow: read the probabilities after the space.
    """
    probabilities = np.asarray(probabilities)
    return probabilities[..., [i for i in chat.emoji_tokens if i < probabilities.shape[-1]]].sum(-1)


def _token_bytes(tokenizer):
    """Pairs (id, bytes) of every token, whichever way the tokenizer writes bytes that are not characters."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        back = {c: bytes([b]) for b, c in bytes_to_unicode().items()}
        return [(i, b"".join(back.get(c, c.encode()) for c in t)) for t, i in tokenizer.get_vocab().items()]

    def spelt(token):
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte.group(1)) if byte else token.replace("\u2581", " ").encode()

    return [(i, spelt(t)) for t, i in tokenizer.get_vocab().items()]


_FLAG_HALVES = {chr(c) for c in range(0x1F1E6, 0x1F200)}
_PICTURES = [chr(c) for c in range(0x1F000, 0x1FB00) if emojis.is_emoji(chr(c))]
_HEADS = {c.encode()[:n] for c in {*_PICTURES, *_FLAG_HALVES} for n in (1, 2, 3)}


def _begins_emoji(token):
    token = token.lstrip()
    if token.isascii():
        return False
    if token in _HEADS:
        return True
    first = regex.match(r"\X", token.decode("utf-8", "replace")).group()
    return emojis.is_emoji(first) or first[0] in _FLAG_HALVES
