"""Compose opinions from hand-written parts: topics with pieces of their own, and clause frames a trait.

`python -m lib.voices` writes data/opinions/train.csv and test.csv. An answer is an `open` clause that names
the topic, followed by a `tail` in the same sentence, a second sentence (`close`), or both. Now and then one
of the parts comes from a shared pool of mild frames, as people do not show their personality in every clause.
Test answers are about topics that no training answer is about, and a quarter of the frames stay new until then.
"""

import csv
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache

import inflect

from lib import big5, opinions, paths
from lib.artifacts import replacing

QUESTION = "Thinking about {topic}, What are your thoughts on {topic}?"  # as published
ORDER = ("extraversion", "agreeableness", "neuroticism", "openness", "conscientiousness")  # as published
PIECES = ("love", "worry", "people", "activity", "wonder", "effort")
PLANS = {("open",): 0.07, ("open", "tail"): 0.45, ("open", "close"): 0.44, ("open", "tail", "close"): 0.04}
MILD = 0.25  # share of the answers with one clause from the mild pool
GROUPS = {
    "place": ("city", "landscape", "landmark"),
    "person": ("artist", "scientist"),
    "group": ("band", "team", "company", "institution"),
    "work": ("film", "book", "show", "game"),
    "event": ("history", "festival"),
    "practice": ("sport", "idea"),
    "food": ("food",),
    "technology": ("technology",),
    "animal": ("animal",),
}
PRONOUNS = {"it": ("it", "its"), "he": ("him", "his"), "she": ("her", "her"), "they": ("them", "their")}
HAVE = {"is": "has", "are": "have", "was": "had", "were": "had"}
_SLOT = re.compile(r"\{([^{}]+)\}")
_inflect = inflect.engine()


@dataclass(frozen=True)
class Topic:
    """One row of topics.csv; `pieces` maps a piece's name to its one or two phrases."""

    name: str
    kind: str
    split: str
    ref: str  # as written in mid-sentence
    pronoun: str
    be: str
    noun: str
    tone: str
    pieces: dict = field(hash=False)

    @property
    def group(self):
        return next(g for g, kinds in GROUPS.items() if self.kind in kinds)


@dataclass(frozen=True)
class Frame:
    """One clause frame; `fits` names groups of topics, or is ("any",)."""

    role: str
    facet: str
    tone: str
    fits: tuple
    text: str

    @property
    def slots(self):
        return tuple(_SLOT.findall(self.text))

    def suits(self, topic):
        """Whether tone and kind of topic go with this frame."""
        return (self.tone in ("any", topic.tone)) and ("any" in self.fits or topic.group in self.fits)


@cache
def topics():
    """All topics in file order: train first, then test."""
    with open(paths.OPINIONS / "topics.csv", encoding="utf-8", newline="") as file:
        return [_topic(row) for row in csv.DictReader(file)]


def _topic(row):
    pieces = {p: [row[c] for c in (p, f"{p}1", f"{p}2") if row.get(c)] for p in PIECES}
    plain = {k: row[k] for k in ("kind", "split", "ref", "pronoun", "be", "noun", "tone")}
    return Topic(name=row["topic"], pieces=pieces, **plain)


@cache
def frames(voice):
    """Frames of a voice ("openness", ..., "mild") as {split: {role: [Frame]}}; test has those of train and its own."""
    with open(paths.VOICES / f"{voice}.csv", encoding="utf-8", newline="") as file:
        rows = [
            (r["split"], Frame(r["role"], r["facet"], r["tone"], tuple(r["fits"].split(";")), r["text"]))
            for r in csv.DictReader(file)
        ]
    sorted_out = {split: defaultdict(list) for split in ("train", "test")}
    for split, frame in rows:
        for name in ("test",) if split == "test" else ("train", "test"):
            sorted_out[name][frame.role].append(frame)
    return sorted_out


def fill(frame, topic, pieces):
    """The frame's text about a topic. pieces: {piece name: phrase}."""
    plural = topic.be in ("are", "were")
    him, its = PRONOUNS[topic.pronoun]
    words = {
        "T": topic.ref,
        "it": topic.pronoun,
        "him": him,
        "its": its,
        "is": topic.be,
        "has": HAVE[topic.be],
        "noun": topic.noun,
        "a noun": _inflect.a(topic.noun),
        **pieces,
    }

    def value(match):
        slot = match.group(1)
        if "/" in slot:
            return slot.split("/")[plural]
        return words[slot]

    return _SLOT.sub(value, frame.text)


def capital(text):
    """With a capital at the start of every sentence."""
    return re.sub(r"(^|[.!?] )(\w)", lambda m: m.group(1) + m.group(2).upper(), text)


class Speaker:
    """Composes answers in one voice, going through its frames in shuffled rounds so that none becomes a tic."""

    def __init__(self, voice, split, seed, mild=MILD):
        self.voice, self.split, self.mild = voice, split, mild
        self.rng = random.Random(f"{seed}/{voice}/{split}")
        self.decks = defaultdict(list)

    def draw(self, voice, role, topic, used):
        """The next frame of a role that suits the topic and repeats no piece and no facet in `used`."""
        deck = self.decks[voice, role]
        for _ in range(2):
            for i, frame in enumerate(deck):
                if frame.suits(topic) and not used & {*frame.slots, frame.facet}:
                    return deck.pop(i)
            fresh = list(frames(voice)[self.split][role])
            self.rng.shuffle(fresh)
            deck.extend(fresh)
        raise LookupError(f"{voice}: no {role} frame suits {topic.name}")

    def answer(self, topic):
        """One answer about a topic."""
        plan = self.rng.choices(list(PLANS), PLANS.values())[0]
        mild = self.rng.choice(plan) if len(plan) > 1 and self.rng.random() < self.mild else None
        text, used = "", set()
        for role in plan:
            frame = self.draw("mild" if role == mild else self.voice, role, topic, used)
            chosen = {p: self.rng.choice(topic.pieces[p]) for p in PIECES}
            part = fill(frame, topic, chosen)
            used |= set(frame.slots) & set(PIECES) | ({frame.facet} - {self.voice})
            text = f"{text}. {part}" if role == "close" and text else text + part
        return capital(text if text[-1] in ".!?" else text + ".")


def compose(seed=0):
    """All opinions: {"train": rows, "test": rows}, a row being (trait, topic, question, answer)."""
    speakers = {(t, s): Speaker(t, s, seed) for t in ORDER for s in ("train", "test")}
    rows = {"train": [], "test": []}
    for topic in topics():
        question = QUESTION.format(topic=topic.name)
        for trait in ORDER:
            answer = speakers[trait, topic.split].answer(topic)
            rows[topic.split].append((trait, topic.name, question, answer))
    return rows


def write(folder=paths.OPINIONS, seed=0):
    """Write train.csv and test.csv in the published columns."""
    for split, rows in compose(seed).items():
        with replacing(folder / f"{split}.csv") as tmp, open(tmp, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(opinions.COLUMNS)
            writer.writerows(rows)


if __name__ == "__main__":
    write()
    print(f"{len(topics())} topics, {len(big5.NAMES)} answers each: data/opinions/train.csv, test.csv")
