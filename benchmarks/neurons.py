"""Activations beside TransformerLens (4.x): the same numbers, and time and memory as ratios of one run.

    PYTHON -m venv lens && lens/bin/pip install -r requirements.txt transformer-lens
    lens/bin/python benchmarks/neurons.py

TransformerLens is no part of this project's lock, so it goes into an environment of its own. The model is a small
random Llama; all its layers are read, MLP neurons and hidden dimensions, at the last token of every text. Conventions,
matched here: the raw weights of the hub's format (no folded norms, no centring); `hook_resid_post` is a layer's output,
`mlp.hook_post` the input of `down_proj`; attention step by step ("eager") on both sides; texts of one length, so no
padding. Each side runs in a process of its own, for its peak of memory. It prints; only agreement is judged.
TransformerLens 4 wraps the hub's own modules, so agreement shows that the places are the same; that they hold what a
layer computes is shown by tests/test_neurons.py, which writes the layers out from the weights.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

RUNS = 9
TEXTS, TOKENS = 64, 48
TOLERANCE = 1e-4  # of the largest value of a layer
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8}
HINT = "TransformerLens is not here: lens/bin/pip install -r requirements.txt transformer-lens, and run it from there"


def small_llama(folder):
    """A random Llama in hub format, with the byte-fallback tokenizer of the tests."""
    import small_models
    from transformers import LlamaConfig

    tokenizer = small_models.byte_fallback_tokenizer()
    more = small_models.SMALL | SHAPE | {"initializer_range": 0.05}
    small_models.write_model(folder, LlamaConfig(vocab_size=len(tokenizer), **more), tokenizer)


def texts(tokenizer):
    """Texts of exactly TOKENS tokens, which come out the same when they are encoded again."""
    import small_models

    found = []
    for i in range(0, 400, 4):
        ids = tokenizer(" ".join(small_models.plain_texts()[i : i + 4]), add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(ids[:TOKENS])
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == TOKENS:
            found.append(text)
    return found[:TEXTS]


def ours(folder):
    """A function that reads all units of all layers at the last token: {"site.layer": (texts, units)}."""
    from lib import chat, neurons

    speaker = chat.load(folder, "fp32")
    speaker.model.set_attn_implementation("eager")
    asked = texts(speaker.tokenizer)

    def read():
        sites = neurons.everywhere(speaker, asked, batch_size=TEXTS)
        return {f"{site}.{n}": v for site, layers in sites.items() for n, v in layers.items()}

    return read


def lens(folder):
    """The same by TransformerLens."""
    import torch
    from transformer_lens import TransformerBridge
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TransformerBridge.boot_transformers(folder, device="cpu", tokenizer=tokenizer)
    model.eval()
    asked = texts(tokenizer)
    hooks = {"mlp": "mlp.hook_post", "hidden": "hook_resid_post"}
    names = {f"blocks.{n}.{h}": f"{s}.{n}" for n in range(SHAPE["num_hidden_layers"]) for s, h in hooks.items()}

    def read():
        ids = torch.tensor(tokenizer(asked, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            _, cache = model.run_with_cache(ids, names_filter=lambda name: name in names)
        return {own: cache[name][:, -1].numpy() for name, own in names.items()}

    return read


def side(name, folder, target):
    """Run one side: its activations and what they cost, into `target`."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    read = {"ours": ours, "lens": lens}[name](folder)
    found, spent = read(), []
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(RUNS):
        began = time.perf_counter()
        found = read()
        spent.append(time.perf_counter() - began)
    np.savez(target / f"{name}.npz", **found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {"seconds": statistics.median(spent), "spread": [min(spent), max(spent)], "peak": peak, "before": base}
    (target / f"{name}.json").write_text(json.dumps(facts), "utf-8")


def main():
    import numpy as np

    try:
        import transformer_lens  # noqa: F401
    except ImportError:
        sys.exit(HINT)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "llama"
        small_llama(folder)
        for name in ("ours", "lens"):
            subprocess.run([sys.executable, __file__, "--side", name, str(folder), place], check=True)
        a, b = (np.load(Path(place) / f"{name}.npz") for name in ("ours", "lens"))
        cost = {name: json.loads((Path(place) / f"{name}.json").read_text("utf-8")) for name in ("ours", "lens")}
        assert set(a) == set(b)
        off = {k: float(np.abs(a[k] - b[k]).max() / np.abs(b[k]).max()) for k in a}
    worst = max(off, key=off.get)
    verdict = "agree" if off[worst] <= TOLERANCE else "DO NOT AGREE"
    print(
        f"{len(off)} layers and sites, {TEXTS} texts: largest difference {off[worst]:.1e} of the layer's "
        f"largest value ({worst}): they {verdict} to {TOLERANCE:g}"
    )
    for name, facts in cost.items():
        low, high = facts["spread"]
        print(
            f"{name}: {facts['seconds']:.3f} s ({low:.3f} to {high:.3f}, {RUNS} runs), "
            f"peak memory of its process {facts['peak'] / 1024:.0f} MB"
        )
    time_ratio, memory = (cost["ours"][k] / cost["lens"][k] for k in ("seconds", "peak"))
    print(f"ours against TransformerLens: time {time_ratio:.2f}, peak memory {memory:.2f}")
    return off[worst] <= TOLERANCE


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", nargs=3)
    if wanted := parser.parse_args().side:
        side(wanted[0], wanted[1], Path(wanted[2]))
    else:
        sys.exit(0 if main() else 1)
