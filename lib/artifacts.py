"""Artefacts that can be trusted: made in a temporary place, checked, then renamed.

An artefact is a folder `results/<profile>/<name>-<fingerprint>/` with a `manifest.json` that holds the
sha256 of every file in it. The fingerprint covers settings, input files and the code of the modules
involved, so a change of any of them leads to another folder, and changing back finds the old one.
"""

import ast
import contextlib
import csv
import hashlib
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import psutil

from lib.errors import UserError

MANIFEST = "manifest.json"


def sha256(path):
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _once(read, path, *_):
    return read(path)


def _version(path):
    """What tells one version of a file from another without reading it."""
    found = os.stat(path)
    return str(path), found.st_mtime_ns, found.st_size, found.st_ino


def digest(path):
    """Hex digest of a file's bytes, read once as long as the file stays as it is."""
    return _once(sha256, *_version(path))


def _syntax(path):
    return hashlib.sha256(ast.dump(ast.parse(Path(path).read_text("utf-8"))).encode()).hexdigest()


def code(module):
    """Hex digest of the code of a module of lib, by name, without comments and layout."""
    return _once(_syntax, *_version(Path(__file__).with_name(f"{module}.py")))


def _plain(part):
    if isinstance(part, ModuleType):
        return _once(_syntax, *_version(part.__file__))
    if isinstance(part, Path):
        return digest(part)
    if hasattr(part, "model_dump"):
        return part.model_dump(mode="json")
    return part


def fingerprint(*parts):
    """12 hex digits over settings (plain values, pydantic models), files (Path, by content) and modules (by code)."""
    text = json.dumps([_plain(p) for p in parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def intact(folder):
    """Whether `folder` holds exactly the bytes its manifest lists."""
    try:
        listed = json.loads((folder / MANIFEST).read_text("utf-8"))
        return bool(listed) and all(sha256(folder / name) == digest for name, digest in listed.items())
    except (OSError, ValueError, AttributeError):
        return False


def build(folder, make):
    """Return `folder` if it is intact; otherwise have `make(tmp)` fill a temporary folder and rename it to `folder`.

    A crash or kill at any moment leaves either no `folder` or a whole one.
    """
    folder = Path(folder)
    if intact(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{os.getpid()}.", dir=folder.parent))
    try:
        make(tmp)
        files = sorted(p for p in tmp.rglob("*") if p.is_file())
        manifest = {p.relative_to(tmp).as_posix(): sha256(p) for p in files}
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or we would not be here
        tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return folder


def abandoned(parent):
    """The temporary folders in `parent` whose process has ended without removing them: a list of Paths."""
    found = [p for p in Path(parent).glob(".*.*") if p.is_dir()]
    owners = [p.name.split(".")[-2] for p in found]  # as `build` names them
    return [p for p, o in zip(found, owners, strict=True) if not (o.isdecimal() and psutil.pid_exists(int(o)))]


def write_csv(frame, path):
    """Write a DataFrame with texts by a model, which may hold a lone carriage return: unquoted it would end the row."""
    frame.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)


def require(folder, notebook, profile):
    """Return an intact `folder`, or say which notebook makes it. Raises UserError."""
    if not intact(folder):
        raise UserError(
            f"{folder.name.rsplit('-', 1)[0]}: not made yet (or damaged) for these settings; "
            f"notebook {notebook} makes it: {making(notebook, profile)}"
        )
    return folder


def making(notebook, profile):
    """The command that makes what a notebook keeps, in words for a message."""
    return f"./run_all.sh --profile {profile} --only {notebook[:2]} with the same --set and --seed"


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success it replaces `path` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
