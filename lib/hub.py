"""Chat models and adapters on the hub or in folders: are they there, whole, and what they claim to be?

Everything is checked before weights are loaded. Weights are read from safetensors only, and no code that comes with a
model is ever run.
"""

import json
import re
from contextlib import contextmanager
from pathlib import Path

from lib import artifacts
from lib.errors import UserError

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]  # of a model on the hub: settings and tokenizer
WEIGHT_FILES = ["model*.safetensors"]
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]


def check(name, adapter=None):
    """Refuse a model or adapter that cannot be used, before any weights are loaded. Raises UserError.

    name: hub id or folder. Of a model on the hub only settings and tokenizer are fetched.
    Returns (folder, tokenizer, adapter's folder or None).
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    folder = place("model", name, SMALL_FILES)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"model {name}: is an adapter; name its base model and give this as the adapter")
        raise UserError(f"model {name}: has no config.json, so it is not a model; give one that save_pretrained wrote")
    with refusal(f"model {name}: not a model that transformers knows without code of its own", "choose another model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"model {name}: is a {config.model_type}, which does not answer questions; give a chat model")
    with refusal(f"model {name}: its tokenizer cannot be loaded", "restore its tokenizer files"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise UserError(f"model {name}: its tokenizer has no chat template; give a chat (instruct) model")
    with refusal(f"model {name}: its chat template cannot be used", "mend or replace the template"):
        render(tokenizer, [[{"role": "user", "content": "?"}]])
    if Path(name).expanduser().is_dir():
        check_weights(folder, f"model {name}", "model.safetensors")
    return folder, tokenizer, None if adapter is None else check_adapter(adapter, name)


def label(name):
    """What a model is called in tables: the last part of its id or folder."""
    return Path(name).name


def identity(name):
    """What a model's answers depend on: the digests of a folder's files, or a hub id. For fingerprints."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return str(name)
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = sorted(p for p in path.iterdir() if p.suffix in kinds and p.name != "log.json")
    return [label(name), *((p.name, artifacts.digest(p)) for p in files)]


@contextmanager
def refusal(what, remedy):
    """Turn whatever a library raises while reading a user's files into one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({first_line(error)}); {remedy}") from None


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def place(what, name, patterns):
    """The folder of a model or adapter: itself, or where the hub's files are kept. what: "model" or "adapter"."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or re.match(r"[./~]|[^/]+/[^/]*/|.*\\", str(name)):
        found = "is a file" if path.exists() else "there is no such folder"
        raise UserError(f"{what} {name}: {found}; give the folder of a {what}, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(
            f"{what} {name}: gated on the hub; accept its terms at https://huggingface.co/{name}, then `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{what} {name}: neither a folder here nor on the hub; correct it, or `hf auth login`"
        ) from None
    except Exception as error:
        # offline, no route, a broken cache: for the user it is one thing
        raise UserError(
            f"{what} {name}: no folder here, and the hub cannot be reached ({first_line(error)}); "
            "check the connection and HF_HUB_OFFLINE, or give a folder"
        ) from None


def check_weights(folder, label, single):
    """Refuse weights that are not whole safetensors files. single: the file's name where there is one file only."""
    from safetensors import safe_open

    index = folder / f"{single}.index.json"
    if (folder / single).is_file():
        shards = {single}
    elif index.is_file():
        with refusal(f"{label}: {index.name} is damaged", "fetch or make it again"):
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    else:
        raise UserError(f"{label}: has no {single}, and other formats can run code; give safetensors weights")
    for shard in sorted(shards):
        damage = refusal(f"{label}: {shard} is missing or damaged", "fetch or make it again")
        with damage, safe_open(folder / shard, framework="pt") as file:
            file.keys()


def origin(name):
    """The last part of a model's id or folder, by which an adapter's base is known wherever it was moved to."""
    cached = re.search(r"models--[^/\\]+--([^/\\]+)[/\\]snapshots", str(name))
    return (cached.group(1) if cached else Path(name).expanduser().resolve().name).lower()


def check_adapter(adapter, name):
    """The folder of an adapter that was made for the model `name`."""
    from peft import PeftConfig

    folder = place("adapter", adapter, ADAPTER_FILES)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"adapter {adapter}: has no adapter_config.json, so it is not an adapter; name another folder")
    with refusal(f"adapter {adapter}: adapter_config.json cannot be read", "fetch or make the adapter again"):
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if base and origin(base) != origin(name):
        raise UserError(f"adapter {adapter}: was made for {base}, not for {name}; give its own base model")
    check_weights(folder, f"adapter {adapter}", "adapter_model.safetensors")
    return folder


def render(tokenizer, turns, answered=False):
    """Conversations as the tokenizer's chat template writes them; unless `answered`, up to where the answer starts.

    turns: list of conversations, each a list of {"role", "content"}. Returns a list of str.
    """
    # enable_thinking: templates of reasoning models ask for it, others ignore it
    settings = {"tokenize": False, "add_generation_prompt": not answered, "enable_thinking": False}
    return tokenizer.apply_chat_template(turns, **settings) if turns else []


def tail(tokenizer):
    """What a chat template writes after an answer: str, the end of the turn and whatever follows."""
    marker = "an answer whose end is looked for"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
    return render(tokenizer, [turns], answered=True)[0].rpartition(marker)[2]
