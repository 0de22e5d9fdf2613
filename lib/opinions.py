"""Opinion QA data: load it from the bundled files, the hub or any CSV, and check it.

Columns as published (hub id holistic-ai/personality_manipulation): Target Personality, Edit Topic,
Question, Answer. One row is one opinion; a topic belongs to train or to test, never to both.
"""

import csv
import difflib
import hashlib
import io
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from lib import artifacts, big5, emojis, paths
from lib.errors import UserError

COLUMNS = ("Target Personality", "Edit Topic", "Question", "Answer")
NAMES = ("trait", "topic", "question", "answer")
HUB_SECONDS = 20  # to wait for the hub before saying that it cannot be reached
_loaded = {}  # digest of the rows that this process last read from the hub, by section


def _text(path):
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a CSV file")
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path (it is relative to where you stand)")
    raw = path.read_bytes()
    if not raw.strip():
        raise UserError(f"{path}: empty file; it needs the columns {', '.join(COLUMNS)} and a row an opinion")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, row {row}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file with UTF-8 encoding"
        ) from None


def read_csv(path):
    """Rows of one file as a DataFrame with columns trait, topic, question, answer, row, file.

    `row` is the line at which the row starts, as an editor counts. Raises UserError.
    """
    path = Path(path)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows, line = [], 1
    try:
        header = next(reader)
        _check_header(path, header)
        line = reader.line_num + 1
        for values in reader:
            if len(values) != len(header) and values:
                raise UserError(
                    f"{path}, row {line}: {len(values)} fields where the header has {len(header)}; quote commas"
                )
            if values:
                rows.append({**dict(zip(header, values, strict=True)), "row": line})
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, row {line}: not CSV ({error}); check the quotes in this row") from None
    if not rows:
        raise UserError(f"{path}: no rows below the header; add a row an opinion")
    return _named(pd.DataFrame(rows)[[*COLUMNS, "row"]]).assign(file=str(path))


def _named(frame):
    """Published column names made short. frame: without other columns, one of which may be called `topic`."""
    return frame.rename(columns=dict(zip(COLUMNS, NAMES, strict=True)))


def _check_header(path, header):
    for column in COLUMNS:
        if column not in header:
            near = difflib.get_close_matches(column, header, n=1, cutoff=0.6)
            hint = f"rename {near[0]!r}" if near else f"found {', '.join(header)}; add it"
            raise UserError(f"{path}, row 1: column {column!r} is missing; {hint}")


def read_hub(settings):
    """Both splits of the hub dataset in the form of `read_csv`, in file order. Raises UserError."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are not the user's concern
    name = settings.hub_id
    remedy = "check the id, your connection and (if it is gated) `hf auth login`, or use --set opinions.source=files"
    try:
        from datasets import load_dataset

        loaded = _within(HUB_SECONDS, lambda: load_dataset(name, revision=settings.hub_revision))
    except Exception as error:
        # everything the hub client raises is about the hub, the id or the login
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"hub dataset {name}: cannot be loaded ({reason}); {remedy}") from None
    frames = {}
    for split in ("train", "test"):
        if split not in loaded:
            raise UserError(f"hub dataset {name}: no split {split!r} (it has {', '.join(loaded)}); choose another")
        frame = loaded[split].to_pandas()
        label = f"{name}/{split}"
        _check_header(label, list(frame.columns))
        frame = _named(frame[list(COLUMNS)]).fillna("")
        frames[split] = frame.assign(row=np.arange(len(frame)) + 2, file=label)
    return frames["train"], frames["test"]


def _within(seconds, call):
    """Run `call` in a daemon thread and give up after `seconds`: the hub client retries for minutes."""
    import threading

    box = {}

    def work():
        try:
            box["value"] = call()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds} s")
    if "error" in box:
        raise box["error"]
    return box["value"]


def _fail(bad, column, what, remedy):
    """Raise for the first bad row of a frame, naming how many more there are."""
    first = bad.iloc[0]
    value = f" {str(first[column])[:60]!r}" if str(first[column]).strip() else ""
    more = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
    name = dict(zip(NAMES, COLUMNS, strict=True))[column]
    raise UserError(f"{first['file']}, row {first['row']}, column {name!r}{value}: {what}{more}; {remedy}")


def check(train, test, allow_emoji=False):
    """Refuse data that would give wrong numbers. Raises UserError with file, row, column, value and remedy."""
    both = pd.concat([train, test], ignore_index=True)
    for column in NAMES:
        if len(bad := both[both[column].str.strip() == ""]):
            _fail(bad, column, "empty", "write a text or delete the row")
    if len(bad := both[~both["trait"].isin(big5.NAMES)]):
        near = difflib.get_close_matches(bad.iloc[0]["trait"].lower(), big5.NAMES, n=1)
        _fail(bad, "trait", "unknown trait", f"use {near[0] if near else ', '.join(big5.NAMES)} (lower case)")
    for frame in (train, test):
        if len(bad := frame[frame.duplicated(["trait", "topic", "answer"])]):
            _fail(bad, "answer", "the same trait, topic and answer stand in an earlier row", "delete one of them")
    seen = {key(t) for t in train["topic"]}
    if len(bad := test[[key(t) in seen for t in test["topic"]]]):
        _fail(bad, "topic", "this test topic is also in train", "keep its rows in one of the two files")
    for one, other in ((train, test), (test, train)):
        if missing := big5.ordered(set(one["trait"]) - set(other["trait"])):
            file, reference = other["file"].iloc[0], one["file"].iloc[0]
            raise UserError(
                f"{file}, column 'Target Personality': no row of trait {missing[0]}, which {reference} has; "
                "add rows of it or remove it there"
            )
    if train["trait"].nunique() < 2:
        raise UserError(f"{train['file'].iloc[0]}, column 'Target Personality': one trait only; two or more are needed")
    if not allow_emoji and len(bad := train[[bool(emojis.find(a)) for a in train["answer"]]]):
        _fail(bad, "answer", "an emoji in a training answer", "remove it, or pass --set opinions.allow_emoji=true")


def key(topic):
    """A topic without case and extra white space, for comparison."""
    return " ".join(topic.casefold().split())


def _first_topics(frame, count):
    return frame if count == 0 else frame[frame["topic"].isin(frame["topic"].drop_duplicates().head(count))]


def load(settings):
    """All rows of a profile's opinions, checked: columns trait, topic, question, answer, row, file, split.

    settings: profiles.Opinions. Traits in the order O C E A N within a topic stay as the file has them.
    """
    if settings.source == "hub":
        train, test = read_hub(settings)
    else:
        train, test = read_csv(settings.train), read_csv(settings.test)
    check(train, test, settings.allow_emoji)
    train, test = _first_topics(train, settings.train_topics), _first_topics(test, settings.test_topics)
    both = pd.concat([train.assign(split="train"), test.assign(split="test")], ignore_index=True)
    both = both.assign(file=both["file"].map(os.path.basename))
    if settings.source == "hub":
        _loaded[settings] = hashlib.sha256(_csv(both)).hexdigest()
    return both


def fingerprint(settings):
    """Identity of the rows: contents of the files, or of the rows from the hub, the limits and the code.

    What the hub has may change under one revision's name, so the rows count: those that are kept, and those that this
    process has read. Where they differ a notebook has yet to be made from the new ones.
    """
    s, origin = settings.opinions, _origin(settings)
    if s.source == "files":
        return origin
    kept = folder(settings) / "opinions.csv"
    rows = {artifacts.digest(kept)} if kept.exists() else set()
    return artifacts.fingerprint(origin, sorted(rows | {_loaded.get(s)} - {None}))


def _origin(settings):
    """What can be known of the rows' identity without reaching the hub and before they are kept."""
    from lib import opinions

    s = settings.opinions
    origin = [s.hub_id, s.hub_revision] if s.source == "hub" else [Path(s.train), Path(s.test)]
    return artifacts.fingerprint(*origin, s.train_topics, s.test_topics, s.allow_emoji, opinions)


def folder(settings):
    """Where notebook 01 keeps the checked rows that later notebooks read, with the hub in reach or not."""
    return paths.RESULTS / settings.profile / f"opinions-{_origin(settings)}"


def _csv(frame):
    """Rows as the bytes of a CSV file; texts in quotes, since a lone carriage return would else end the row."""
    return frame.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").encode()


def save(settings, frame):
    """Keep checked rows as the artefact `opinions`, in place of others that the hub once had; returns its folder."""
    place, rows = folder(settings), _csv(frame)
    kept = place / "opinions.csv"
    if kept.exists() and kept.read_bytes() != rows:
        shutil.rmtree(place)
    return artifacts.build(place, lambda tmp: (tmp / "opinions.csv").write_bytes(rows))


def read(settings):
    """The rows that notebook 01 checked and kept. Raises UserError if it has not."""
    place = artifacts.require(folder(settings), "01_dataset", settings.profile)
    return pd.read_csv(place / "opinions.csv", keep_default_na=False)


def kinds():
    """Kind of each bundled topic (city, band, ...): a Series indexed by topic."""
    topics = pd.read_csv(paths.OPINIONS / "topics.csv", keep_default_na=False)
    return topics.set_index("topic")["kind"]


def composition(frame):
    """Rows per trait and split: a DataFrame trait x split."""
    counts = Counter(zip(frame["trait"], frame["split"], strict=True))
    table = [{"trait": t, **{s: counts[t, s] for s in ("train", "test")}} for t in big5.ordered(frame["trait"])]
    return pd.DataFrame(table)
