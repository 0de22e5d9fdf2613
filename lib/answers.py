"""Generated answers: one row an answer, an artefact for every model and method; or read from anyone's own CSV.

A table of answers only ever gains columns. `method` says how the model was turned towards `trait`: base (not at all),
prompt, ike, mend, peft. `ended`: by the end of turn rather than by length. Tokens are the model's own.
"""

import csv
import difflib
import io
import re
from pathlib import Path

import pandas as pd

from lib import artifacts, big5, hub, opinions, paths
from lib.errors import UserError

TEXTS = ("model", "method", "trait", "topic", "question", "answer")
COLUMNS = (*TEXTS, "prompt_tokens", "new_tokens", "ended")
METHODS = ("base", "prompt", "ike", "mend", "peft")
GROUP = ["model", "method", "trait"]
# of each method: the notebook that makes its answers; the settings, modules and files of data/prompts that shape them
MAKERS = {
    "base": ("03_qlora", ("chat",), ("cache", "chat", "hub", "qlora"), ()),
    "prompt": (
        "04_baselines",
        ("chat", "ike"),
        ("cache", "chat", "hub", "qlora", "ike"),
        ("personas.toml",),
    ),
    "ike": (
        "04_baselines",
        ("chat", "ike"),
        ("cache", "chat", "hub", "qlora", "ike", "encoders"),
        ("ike.toml",),
    ),
    "mend": (
        "04_baselines",
        ("chat", "mend"),
        ("cache", "chat", "hub", "classifier", "qlora", "mend"),
        (),
    ),
    "peft": ("03_qlora", ("chat", "qlora"), ("cache", "chat", "hub", "finetune", "qlora"), ()),
}


def check(frame, where="answers"):
    """Refuse a table that would give wrong numbers. Raises UserError."""
    if missing := [c for c in COLUMNS if c not in frame]:
        raise UserError(
            f"{where}: column {missing[0]!r} is missing (of {', '.join(COLUMNS)}); make it again with --fresh"
        )
    if frame.empty:
        raise UserError(f"{where}: no rows; make it again with --fresh")
    for column, known in (("trait", big5.NAMES), ("method", METHODS)):
        strange = ~frame[column].isin(known).to_numpy()
        if strange.any():
            row = int(strange.argmax())
            value = frame[column].iloc[row]
            raise UserError(f"{where}, row {row + 1}: unknown {column} {value!r}; {_near(value, known)}")
    if frame[list(TEXTS)].isna().any(axis=None):
        column = next(c for c in TEXTS if frame[c].isna().any())
        raise UserError(f"{where}, column {column!r}: a value is missing; an answer without text is an empty string")
    return frame


def _near(value, known):
    near = difflib.get_close_matches(str(value).strip().lower(), known, n=1)
    return f"use {near[0] if near else ', '.join(known)}"


def folder(settings, model, method, trait):
    """Where the answers of a model by a method are kept: all that shapes them decides about the name."""
    _, sections, modules, files = MAKERS[method]
    values = {s: getattr(settings, s).model_dump(mode="json") for s in sections}
    values["chat"].pop("models")
    shaped = [*(artifacts.code(m) for m in modules), *(paths.ROOT / "data" / "prompts" / f for f in files)]
    mark = artifacts.fingerprint(values, settings.seed, opinions.fingerprint(settings), hub.identity(model), *shaped)
    return paths.RESULTS / settings.profile / f"answers-{hub.label(model)}-{method}-{trait}-{mark}"


def asked(settings, rows):
    """The rows that the models are asked about: those of the first `chat.topics` topics, 0 = all."""
    return rows[rows["topic"].isin(rows["topic"].drop_duplicates().head(settings.chat.topics or None))]


def identity(settings, notebook):
    """Names of the answers that a notebook makes or reads: its own and 03's in any case, others' if they are there."""
    found = []
    for model in settings.chat.models:
        for method, (maker, *_) in MAKERS.items():
            places = [folder(settings, model, method, trait) for trait in big5.NAMES]
            found += [p.name for p in places if maker in ("03_qlora", notebook) or (maker < notebook and p.exists())]
    return found


def build(settings, model, method, trait, make):
    """The artefact's answers, or those that `make()` returns, checked and kept. Raises UserError."""

    def write(tmp):
        table = check(make())
        artifacts.write_csv(table[[*COLUMNS, *(c for c in table if c not in COLUMNS)]], tmp / "answers.csv")

    return load(artifacts.build(folder(settings, model, method, trait), write))


def load(place):
    """The answers in an artefact's folder, checked."""
    frame = pd.read_csv(place / "answers.csv", keep_default_na=False, dtype=dict.fromkeys(TEXTS, str))
    return check(frame, where=f"{place.name}/answers.csv")


def read(settings):
    """Answers of all models by every method that has been run. Raises UserError if those of notebook 03 are missing."""
    found, traits = [], big5.ordered(opinions.read(settings)["trait"])
    for model in settings.chat.models:
        for method, (notebook, *_) in MAKERS.items():
            places = [folder(settings, model, method, trait) for trait in traits]
            if notebook == "03_qlora":
                places = [artifacts.require(p, notebook, settings.profile) for p in places]
            found += [load(p) for p in places if artifacts.intact(p)]
    return pd.concat(found, ignore_index=True)


def names_topic(frame):
    """Whether each answer holds its topic's name, or the form that the bundled topic takes in mid-sentence."""
    from lib import voices  # its grammar takes half a second to load

    forms = {t.name: {bare(t.name), bare(t.ref)} for t in voices.topics()}
    pairs = zip(frame["topic"], frame["answer"], strict=True)
    return [any(form in a.lower() for form in forms.get(t, {bare(t)})) for t, a in pairs]


def bare(name):
    """A topic's name in lower case and without its article."""
    return re.sub(r"^(the|an?) ", "", name.lower())


def from_csv(path):
    """Anyone's own texts: a CSV with the columns trait and answer, one row an answer, in UTF-8.

    Columns model and method are used where the file has them; otherwise they are the file's name and "own". An empty
    answer is a response without a sentence. Returns columns model, method, trait, answer. Raises UserError.
    """
    path = Path(path)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows, line = [], 1
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        line = reader.line_num + 1
        for values in reader:
            if values:
                rows.append(_row(path, line, header, values))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, row {line}: not CSV ({error}); check the quotes in this row") from None
    if not rows:
        raise UserError(f"{path}: no rows below the header; add a row an answer")
    return pd.DataFrame(rows, dtype=str)


def _text(path):
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, row {row}: not UTF-8; save the file with UTF-8 encoding") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror.lower()}); name a CSV file") from None


def _check_header(path, header):
    for column in ("trait", "answer"):
        if column not in header:
            near = [name for name in header if name.lower() == column]
            hint = f"rename {near[0]!r}" if near else f"found {', '.join(map(repr, header))[:100] or 'nothing'}; add it"
            raise UserError(f"{path}, row 1: column {column!r} is missing; {hint} (trait,answer, with commas)")


def _row(path, line, header, values):
    if len(values) != len(header):
        raise UserError(f"{path}, row {line}: {len(values)} fields where the header has {len(header)}; quote commas")
    row = dict(zip(header, values, strict=True))
    if row["trait"] not in big5.NAMES:
        hint = _near(row["trait"], big5.NAMES)
        raise UserError(f"{path}, row {line}, column 'trait': unknown trait {row['trait'][:60]!r}; {hint} (lower case)")
    return {
        "model": row.get("model") or path.stem,
        "method": row.get("method") or "own",
        "trait": row["trait"],
        "answer": row["answer"],
    }


def groups(given):
    """((model, method, trait), rows): models as they come, methods from base to peft, traits O C E A N."""
    rank = {m: i for i, m in enumerate(METHODS)}
    for model, of_model in given.groupby("model", sort=False):
        for method in sorted(of_model["method"].unique(), key=lambda m: rank.get(m, len(rank))):
            rows = of_model[of_model["method"] == method]
            for trait in big5.ordered(rows["trait"]):
                yield (model, method, trait), rows[rows["trait"] == trait]


def numbered(rows, keys=(*GROUP, "topic")):
    """With a column copy: 0, or 1, 2 ... where the same keys come again, so that rows pair one to one."""
    return rows.assign(copy=rows.groupby(list(keys), sort=False).cumcount())
