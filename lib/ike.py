"""Asking for a personality in the prompt: a plain persona instruction, and IKE. No weight of the model changes.

IKE (in-context knowledge editing, Zheng et al. 2023) puts demonstrations before the query; PersonalityEdit (Mao et al.
2023) gives them the fields Target Personality, Edit Topic, Question and Answer, and leaves the last answer empty.
Wordings, topics for demonstrations and personas stand in data/prompts/.
"""

import random
import tomllib
from functools import lru_cache

import numpy as np
import pandas as pd

from lib import answers, artifacts, big5, cache, chat, classifier, encoders, hub, opinions, paths, qlora
from lib.errors import UserError

PROMPTS = paths.ROOT / "data" / "prompts"
KEYS = ["model", "wording", "demonstrations", "trait"]  # of a table of sensitivity


def prompts(name):
    """A file of data/prompts as a dictionary. Raises UserError."""
    try:
        return tomllib.loads((PROMPTS / name).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"data/prompts/{name}: cannot be read ({error.strerror.lower()}); restore it") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise UserError(f"data/prompts/{name}: not TOML ({hub.first_line(error)}); mend that line") from None


def _entry(name, key, number, setting):
    """Entry `number` (from 0) of the list `key` in a file of data/prompts. Raises UserError naming the setting."""
    found = prompts(name).get(key, [])
    if not 0 <= number < len(found):
        raise UserError(f"{setting}: data/prompts/{name} has {len(found)} entries in {key}; add one, or choose another")
    return found[number]


def prompt_questions(settings, rows):
    """Each row's question behind a sentence that asks for its trait, on one line: list of str. Raises UserError."""
    n = settings.ike.persona
    lines = {t: _entry("personas.toml", t, n, f"ike.persona = {n}") for t in rows["trait"].unique()}
    return [" ".join(f"{lines[t]} {q}".split()) for t, q in zip(rows["trait"], rows["question"], strict=True)]


def ike_questions(settings, rows, train, wording=0, demonstrations=None, seed=None):
    """Each row's question as IKE puts it, on one line: list of str. Raises UserError.

    rows: trait, topic, question of what is asked. train: rows with an answer, of which those of the target trait are
    shown. wording: number in ike.toml, from 0. demonstrations: "fixed" (or "fixed-2": the second set), "random" or
    "nearest"; by default the setting's. seed: of random ones, by default the run's.
    """
    instruction = _entry("ike.toml", "wordings", wording, f"wording {wording}")
    shown = choose(
        train, rows, demonstrations or settings.ike.demonstrations, settings.ike.number, _seed(settings, seed)
    )
    asked = zip(rows.itertuples(), shown, strict=True)
    return [_one_line(instruction.replace("{trait}", r.trait).replace("{topic}", r.topic), r, d) for r, d in asked]


def _seed(settings, seed):
    return settings.seed if seed is None else seed


def _one_line(instruction, row, shown):
    """The whole prompt of a row; it ends with the label of the answer that the model is to write."""
    blocks = [_block(row.trait, d.topic, d.question, d.answer) for d in shown]
    return " ".join(" ".join([instruction, *blocks, _block(row.trait, row.topic, row.question, "")]).split())


def _block(trait, topic, question, answer):
    return f"Target Personality: {trait} Edit Topic: {topic} Question: {question} Answer: {answer}"


def choose(train, rows, kind, number, seed):
    """Demonstrations for every row: list of lists of train rows of its trait, about different topics.

    fixed: the topics of ike.toml, in their order. random: drawn for each row by (seed, trait, topic). nearest: the
    questions most like the row's, by sentence embeddings, the nearest last. Raises UserError, also on a leak.
    """
    found = [None] * len(rows)
    traits = rows["trait"].to_numpy()
    for trait in big5.ordered(traits):
        pool = train[train["trait"] == trait].drop_duplicates("topic")
        if len(pool) < number:
            raise UserError(
                f"ike.number = {number}: {trait} has train rows of {len(pool)} topics only; lower the number"
            )
        places = np.flatnonzero(traits == trait)
        records = list(pool.itertuples())
        for i, picked in zip(places, _pick(pool, rows.iloc[places], kind, number, seed), strict=True):
            found[i] = [records[j] for j in picked]
            _check_leak(rows["topic"].iloc[i], [d.topic for d in found[i]])
    return found


def _pick(pool, rows, kind, number, seed):
    """Numbers of the demonstrations in the pool of one trait, a list a row."""
    if kind == "nearest":
        like = _vectors(tuple(rows["question"])) @ _vectors(tuple(pool["question"])).T
        return np.argsort(-like, axis=1, kind="stable")[:, :number][:, ::-1].tolist()
    if kind == "random":
        draws = [random.Random(f"{seed}/{r.trait}/{r.topic}") for r in rows.itertuples()]
        return [draw.sample(range(len(pool)), number) for draw in draws]
    return [_fixed(pool, kind, number)] * len(rows)


def _fixed(pool, kind, number):
    """Numbers of the rows about the topics of a fixed set."""
    name, _, which = kind.partition("-")
    if name != "fixed" or not (which or "1").isdecimal():
        raise UserError(f"ike.demonstrations = {kind!r}: unknown; choose fixed, fixed-2, ..., random or nearest")
    topics = _entry("ike.toml", "fixed", int(which or 1) - 1, f"demonstrations {kind!r}")
    if len(topics) < number:
        raise UserError(f"data/prompts/ike.toml: {kind!r} has {len(topics)} topics for ike.number = {number}; add some")
    place = {opinions.key(t): i for i, t in enumerate(pool["topic"])}
    for topic in topics[:number]:
        if opinions.key(topic) not in place:
            raise UserError(
                f"data/prompts/ike.toml: topic {topic!r} of {kind!r} has no train row for {pool['trait'].iloc[0]}; "
                "put in a topic of yours, or choose random or nearest (ike.demonstrations, sensitivity.sets)"
            )
    return [place[opinions.key(t)] for t in topics[:number]]


@lru_cache(maxsize=8)
def _vectors(questions):
    return encoders.embed(questions)


def _check_leak(topic, shown):
    if opinions.key(topic) in map(opinions.key, shown):
        raise UserError(
            f"ike: a demonstration for topic {topic!r} is about that topic itself, which would give the answer away; "
            "keep its rows in one of the two files, or change the topics in data/prompts/ike.toml"
        )


def check(settings, rows, train):
    """Refuse settings, prompts and rows that a later step would refuse, before anything is loaded. Raises UserError.

    The nearest demonstrations are left out, for finding them takes an encoder; with no topic in both they cannot leak.
    """
    prompt_questions(settings, rows)
    tested = {opinions.key(t) for t in rows["topic"]}
    for topic in train["topic"].unique():
        if opinions.key(topic) in tested:
            raise UserError(f"opinions: topic {topic!r} is in train and test; keep its rows in one of the two files")
    s, there = settings.sensitivity, big5.ordered(rows["trait"])
    if not set(s.traits) & set(there):
        raise UserError(f"sensitivity.traits: no test rows for {', '.join(s.traits)}; choose from {', '.join(there)}")
    for wording in {settings.ike.wording, *range(s.wordings)}:
        ike_questions(settings, rows, train, wording, "random")
    for kind in {settings.ike.demonstrations, *s.sets} - {"nearest"}:
        ike_questions(settings, rows, train, settings.ike.wording, kind)


def answer(settings, model, method, rows, train, show=True):
    """A model's answers to test questions: DataFrame with `answers.COLUMNS`, an artefact for every trait.

    method: "prompt" or "ike". rows: test opinions; train: the rows that demonstrations come from. The `question` of an
    answer is the row's own, without what was put before it. The model is loaded only where needed. Raises UserError.
    """
    check(settings, rows, train)
    loaded, parts = [], []
    for trait in big5.ordered(rows["trait"]):
        own = rows[rows["trait"] == trait]

        def make(own=own):
            put = questions(settings, method, own, train)
            loaded[:] = loaded or [chat.load(model, settings.chat.precision)]
            return ask(settings, loaded[0], method, own, put, show)

        parts.append(answers.build(settings, model, method, trait, make))
    return pd.concat(parts, ignore_index=True)


def questions(settings, method, rows, train):
    """What the model is asked for each row by a method, "prompt" or "ike", under the run's settings: list of str."""
    if method == "prompt":
        return prompt_questions(settings, rows)
    return ike_questions(settings, rows, train, settings.ike.wording)


def ask(settings, loaded, method, rows, put, show=True, **how):
    """A loaded chat model's answers to the messages `put`, kept beside the questions of `rows`. how: as `qlora.ask`."""
    given = qlora.ask(settings, loaded, method, rows.assign(question=put), show, share=True, **how)
    return given.assign(question=list(rows["question"]))


def limited(settings, rows, traits=None):
    """The rows about `sensitivity.topics` topics, a draw that is the same for every seed.

    traits: of which; None for all.
    """
    topics = rows["topic"].drop_duplicates()
    few = topics.sample(min(settings.sensitivity.topics, len(topics)), random_state=0)
    kept = rows["topic"].isin(few) & rows["trait"].isin(big5.NAMES if traits is None else traits)
    return rows[kept].reset_index(drop=True)


def varied(settings):
    """The models whose prompts and seeds are varied: the first `sensitivity.models` of the run's, 0 = all."""
    return settings.chat.models[: settings.sensitivity.models or None]


def sensitivity(settings, model, wording, rows, train, judge, show=True):
    """Answers under one wording with every demonstration set: DataFrame with KEYS, item, hit. Raises UserError.

    hit: whether the classifier `judge` assigns an answer to its target trait; `shares` makes TA of it. item: which of
    the `limited` rows of the trait was answered. The answers under a wording are asked together and are an artefact: an
    interruption loses those of one wording. Every prompt is asked with the same random draws.
    """
    check(settings, rows, train)
    rows, parts = limited(settings, rows, settings.sensitivity.traits), []
    for kind in settings.sensitivity.sets:
        parts.append(rows.assign(put=ike_questions(settings, rows, train, wording, kind), demonstrations=kind))
    asked = pd.concat(parts, ignore_index=True)

    def make():
        loaded = chat.load(model, settings.chat.precision)
        return ask(settings, loaded, "ike", asked, asked["put"], show, within=("trait", "demonstrations"))

    given = _keep(settings, model, [hub.identity(model), list(asked["put"])], make)
    return _hits(given.assign(wording=wording, demonstrations=asked["demonstrations"]), judge, KEYS)


def seeds(settings, model, rows, train, judge, show=True):
    """Answers of adapters that differ in their seed only: DataFrame with model, seed, trait, item, hit.

    The counterpart of `sensitivity`, on the same rows: each seed trains an adapter a trait (those of the run's own seed
    are notebook 03's) and samples its answers.
    """
    rows, first = limited(settings, rows, settings.sensitivity.traits), settings.seed
    loaded, parts, identity = [], [], hub.identity(model)
    for seed in range(first, first + settings.sensitivity.seeds):
        own = settings.model_copy(update={"seed": seed})
        for trait in big5.ordered(rows["trait"]):
            some = rows[rows["trait"] == trait]
            adapter = qlora.train(own, model, trait, train[train["trait"] == trait], show)

            def make(own=own, some=some, adapter=adapter):
                loaded[:] = loaded or [chat.load(model, settings.chat.precision)]
                with chat.adapted(loaded[0], str(adapter)) as tuned:
                    return qlora.ask(own, tuned, "peft", some, show=False)

            given = _keep(own, model, [identity, adapter.name, list(some["question"])], make)
            parts.append(given.assign(seed=seed))
    return _hits(pd.concat(parts), judge, ["model", "seed", "trait"])


def _keep(settings, model, what, make):
    """The answers that `make()` gives, or those kept earlier. what: all that shapes them beside chat and seed."""
    shaped = settings.chat.model_dump(mode="json", exclude={"models"})
    mark = artifacts.fingerprint(what, shaped, settings.seed, cache, chat, hub, qlora)
    place = paths.RESULTS / settings.profile / f"sensitivity-{hub.label(model)}-{mark}"
    return answers.load(artifacts.build(place, lambda tmp: artifacts.write_csv(make(), tmp / "answers.csv")))


def _hits(given, judge, keys):
    found = classifier.predict(judge, given.reset_index(drop=True))
    return found[keys].assign(item=found.groupby(keys).cumcount(), hit=found["predicted"] == found["trait"])


def shares(hits):
    """TA of every prompt or seed: a row each, with the keys of hits (of `sensitivity` or `seeds`), n, ta, noise.

    noise: what chance adds to the variance of TA over the runs of a model and trait: the mean square that is left of
    runs x items when both means are taken away, over n (two-way analysis of variance). All runs answer the same items,
    so it is less than p (1 - p) / n. NaN for one run or one item.
    """
    of, keys = ["model", "trait"], [c for c in hits if c not in ("item", "hit")]
    y = hits.assign(y=hits["hit"].astype(float))
    run, item, every = (y.groupby(by)["y"].transform("mean") for by in (keys, [*of, "item"], of))
    left = ((y["y"] - run - item + every) ** 2).groupby([y[k] for k in of]).sum()
    table = y.groupby(keys, sort=False)["y"].agg(n="size", ta="mean").reset_index()
    runs, n = (table.groupby(of)["n"].agg(what) for what in ("size", "first"))
    noise = left / ((runs - 1) * (n - 1) * n).replace(0, np.nan)
    return table.join(noise.rename("noise"), on=of)


def spread(table):
    """Spread of TA over prompts or seeds: DataFrame with model, trait, runs, mean, sd, least, most, chance.

    table: of `shares`. runs: how many prompts or seeds. sd: standard deviation over them. chance: the one to expect if
    all were equally good, because answers are few: the root of `noise`.
    """
    groups = table.groupby(["model", "trait"], sort=False)
    found = groups["ta"].agg(runs="size", mean="mean", sd="std", least="min", most="max")
    return found.assign(chance=np.sqrt(groups["noise"].first())).reset_index()
