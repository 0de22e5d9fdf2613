"""In-context explainability: a chat model reads a text, names the trait in it and the five tokens that show it best.

The paper asks for "the top five tokens that best represent the trait inferred from a generated text" (section on ICL
explainability, App. A.3). A reply is "trait: token, token, token, token, token" and nothing else; any other counts as
unparsable. The first reply is greedy; if it cannot be parsed, the model is asked again and its reply is drawn. What
the replies are worth is measured in lib/intent and lib/attribution.
"""

import re
import tomllib
from collections import Counter
from string import Template

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lib import artifacts, big5, chat, emojis, hub, intervals, organisms, paths, qlora
from lib.errors import UserError

PROMPTS = paths.ROOT / "data" / "prompts" / "icl.toml"
READERS = ("base", "peft")  # the untuned model of that name, and the tuned one that wrote the text
TOKENS = 5  # a reply names
FORMS = ("written", "word", "none", "own", "other")
TEXTS = ("model", "trait", "topic", "form", "emoji", "of", "text")
COLUMNS = (*TEXTS, "reader", "first", "reply", "ended", "tries")
CELL = ["model", "reader", "trait"]


def prompts():
    """data/prompts/icl.toml, checked: {"wordings": {name: text}, "emojis": {trait: list}}. Raises UserError."""
    where = f"data/prompts/{PROMPTS.name}"
    try:
        values = tomllib.loads(PROMPTS.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({hub.first_line(error)}); restore it") from None
    for name in ("organism", "instruct"):
        if "$text" not in str(values.get("wordings", {}).get(name, "")):
            raise UserError(f"{where}, wordings.{name}: has no $text, where the text to read stands; add it")
    found = values.get("emojis", {})
    for trait in dict.fromkeys((*found, *big5.NAMES)):
        if trait not in big5.NAMES:
            raise UserError(f"{where}, emojis.{trait}: unknown trait; choose from {', '.join(big5.NAMES)}")
        if len(own := found.get(trait, [])) < 2 or not all(emojis.find(e) == [e] for e in own):
            raise UserError(f"{where}, emojis.{trait}: {own}; give two or more single emojis")
    return values


def wording(settings, model):
    """The question that a model is asked, with $text in it. An organism knows one wording only."""
    chosen = settings.icl.wording
    if chosen == "auto":
        chosen = "organism" if hub.label(model) in organisms.names() else "instruct"
    return prompts()["wordings"][chosen].strip()


def check(settings, rows):
    """Refuse a prompt file or adapters that cannot be used, before a model is loaded. rows: opinions."""
    prompts()
    train = rows[rows["split"] == "train"]
    for model in settings.chat.models:
        for trait in big5.ordered(rows["trait"]):
            hub.check_adapter(adapter(settings, model, trait, train), model)


def adapter(settings, model, trait, train):
    """The folder of notebook 03's adapter, as text. Raises UserError."""
    place = qlora.folder(settings, model, trait, train[train["trait"] == trait])
    return str(artifacts.require(place, "03_qlora", settings.profile))


def fold(token):
    """A token as it is counted: lower case, an emoji without its skin tone."""
    return emojis.toneless(token) if emojis.is_emoji(token) else token.lower()


def parse(reply):
    """(trait, tokens, fault) of a reply: a trait or None, five folded tokens or none, what is wrong or "".

    Case of the trait, white space around parts and a full stop at the end are forgiven, nothing else is. A token that
    is named twice is no fault of form: it is counted once, and `summary` tells how often that happens.
    """
    head, colon, tail = reply.strip().partition(":")
    trait = head.strip().lower()
    if not colon or trait not in big5.NAMES:
        return None, [], "no trait before a colon"
    tokens = [t.strip() for t in re.sub(r"\.$", "", tail.strip()).split(",")]
    if len(tokens) != TOKENS:
        return None, [], f"not {TOKENS} tokens"
    if any(emojis.tokens(t) != [t] for t in tokens):
        return None, [], "not one word or emoji each"
    return trait, [fold(t) for t in tokens], ""


def parsed(readings):
    """Readings with three more columns: named (trait or None), tokens (list), fault. A reply cut off is at fault."""
    found = [parse(r.reply) if r.ended else (None, [], "not ended") for r in readings.itertuples()]
    named, tokens, faults = zip(*found, strict=True) if found else ((), (), ())
    return readings.assign(
        named=pd.Series(named, readings.index, dtype=object), tokens=list(tokens), fault=list(faults)
    )


def every(text):
    """The words and emojis of a text, folded: set."""
    return {fold(t) for t in emojis.tokens(text)}


def units(text):
    """The tokens of a text that can be named: emojis and words of three characters or more, folded, each once."""
    return list(dict.fromkeys(fold(t) for t in emojis.tokens(text) if emojis.is_emoji(t) or len(t) > 2))


def drop(text, unwanted):
    """A text without any occurrence of folded tokens, blanks tidied."""
    for token, (low, high) in reversed(emojis.spans(text)):
        if fold(token) in unwanted:
            text = text[:low] + text[high:]
    return re.sub(r"[ \t]+(?=[.,!?;:])", "", re.sub(r"[ \t]+", " ", text)).strip()


def written(given):
    """Answers as texts to be read, as they were written: DataFrame with TEXTS.

    Where there is a column `ended`, an answer that was cut off by its length is read as far as it was `finished`.
    """
    cut = ~given["ended"].astype(bool) if "ended" in given else [False] * len(given)
    texts = [finished(text) if off else text for text, off in zip(given["answer"], cut, strict=True)]
    return given.assign(form="written", emoji="", of="", text=texts)[list(TEXTS)].reset_index(drop=True)


def finished(text):
    """A text that was cut off, without the sentence that it breaks off in; as it is where it has no other."""
    sentences, places = emojis.locate(text)
    closed = any(place == 1 for *_, place in places)  # by an emoji
    if len(sentences) < 2 or closed or sentences[-1].endswith((".", "!", "?")):
        return text
    return " ".join(part for sentence, found in emojis.attach(text)[:-1] for part in (sentence, *found))


def edited(texts, seed):
    """Texts under edits that leave the voice alone: DataFrame with TEXTS, four rows a text, none as written.

    word: one of its words taken out, drawn at random (what any edit does). none: its emojis taken out. own: then an
    emoji of the trait that it was written for put at the end, another than it had. other: one of another trait, drawn
    at random. emoji: the one put there. of: that other trait, in all four rows, so that forms can be compared.
    """
    kinds, found = prompts()["emojis"], []
    for i, row in enumerate(texts.itertuples()):
        rng = np.random.default_rng((seed, i))
        held, of = set(emojis.find(row.text)), rng.choice([t for t in big5.NAMES if t != row.trait])
        words = [u for u in units(row.text) if not emojis.is_emoji(u)]
        bare = drop(row.text, {fold(e) for e in held})
        own = rng.choice([e for e in kinds[row.trait] if e not in held] or kinds[row.trait])
        other = rng.choice(kinds[of])
        forms = {"word": drop(row.text, {rng.choice(words)} if words else set()), "none": bare}
        forms |= {"own": f"{bare} {own}".strip(), "other": f"{bare} {other}".strip()}
        put = {"own": own, "other": other}
        found += [(row.model, row.trait, row.topic, f, put.get(f, ""), of, text) for f, text in forms.items()]
    return pd.DataFrame(found, columns=list(TEXTS))


def questions(settings, model, texts):
    """Texts as the user messages that a model is asked: list of str."""
    form = Template(wording(settings, model))
    return [form.substitute(text=text) for text in texts]


def readings(settings, model, reader, texts, rows, loaded=None, show=True):
    """What a model replies about texts: DataFrame with COLUMNS, an artefact for every trait.

    reader: one of READERS; "peft" is the model that wrote the text, with the adapter of its trait. texts: DataFrame
    with TEXTS. rows: opinions. loaded: a list that keeps the model between calls. Raises UserError.
    """
    if reader not in READERS:
        raise UserError(f"reader {reader!r}: unknown; choose from {', '.join(READERS)}")
    loaded, parts = [] if loaded is None else loaded, []
    for trait in tqdm(
        big5.ordered(texts["trait"]), desc=f"{hub.label(model)}, {reader}", disable=not show, unit="trait"
    ):
        own = texts[texts["trait"] == trait]
        place = adapter(settings, model, trait, rows[rows["split"] == "train"]) if reader == "peft" else None

        def write(tmp, own=own, place=place):
            loaded[:] = loaded or [chat.load(model, settings.chat.precision)]
            with chat.adapted(loaded[0], place) as speaker:
                artifacts.write_csv(ask(settings, speaker, reader, own), tmp / "readings.csv")

        made = artifacts.build(folder(settings, model, reader, trait, own, place), write)
        table = pd.read_csv(made / "readings.csv", keep_default_na=False, dtype=str)
        parts.append(table.assign(ended=table["ended"] == "True", tries=table["tries"].astype(int)))
    return pd.concat(parts, ignore_index=True)


def ask(settings, speaker, reader, texts):
    """A loaded chat model's replies about texts: DataFrame with COLUMNS.

    first: the greedy reply. reply, ended: the same, or where it cannot be parsed the first drawn one that can be, or
    the last. tries: how often the model was asked, at most icl.tries.
    """
    asked = questions(settings, speaker.name, texts["text"])
    table = _reply(settings, speaker, asked, 0)
    table = table.assign(first=table["reply"], tries=1)
    for attempt in range(1, settings.icl.tries):
        bad = np.flatnonzero(parsed(table)["fault"] != "")
        if not len(bad):
            break
        again = _reply(settings, speaker, [asked[i] for i in bad], attempt)
        table.loc[bad, ["reply", "ended"]] = again.to_numpy()
        table.loc[bad, "tries"] = attempt + 1
    return texts.reset_index(drop=True).assign(reader=reader).join(table)[list(COLUMNS)]


def _reply(settings, speaker, asked, attempt):
    """Replies to user messages: columns reply, ended. attempt: 0 is greedy, others are drawn as answers are."""
    c = settings.chat
    drawn = {"temperature": c.temperature if attempt else 0, "top_p": c.top_p if attempt else 1}
    size = {"max_new_tokens": settings.icl.max_new_tokens, "batch_size": c.batch_size}
    given = chat.answer(speaker, asked, **drawn, **size, seed=settings.seed + attempt, show=False)
    return given[["answer", "ended"]].rename(columns={"answer": "reply"})


def folder(settings, model, reader, trait, texts, place):
    """Where the readings of a trait's texts are kept: model, adapter, question, texts and code decide the name."""
    from pathlib import Path

    c, i = settings.chat, settings.icl
    shaped = [settings.seed, c.precision, c.temperature, c.top_p, i.max_new_tokens, i.tries, wording(settings, model)]
    code = [artifacts.code(m) for m in ("cache", "chat", "hub", "emojis", "icl")]
    who = [hub.identity(model), place and Path(place).name]
    mark = artifacts.fingerprint(shaped, code, who, texts.to_csv(index=False))
    return paths.RESULTS / settings.profile / f"readings-{hub.label(model)}-{reader}-{trait}-{mark}"


def summary(readings):
    """How readings went: CELL, n, first, unparsable, low, high, agrees, agrees_low, agrees_high, repeats, inside.

    readings: as from `parsed`. first, unparsable: share of the texts whose first, and whose last, reply could not be
    parsed. Of the others: agrees, the share that names the trait that the text was written for; repeats, the share that
    names a token twice; inside, how many of the named tokens do occur in the text. Wilson intervals.
    """
    found = []
    for key, own in readings.groupby(CELL, sort=False):
        good = own[own["fault"] == ""]
        bad = intervals.wilson(len(own) - len(good), len(own))
        right = intervals.wilson(int((good["named"] == good["trait"]).sum()), len(good))
        twice = [len(set(t)) < TOKENS for t in good["tokens"]]
        there = [t in held for r in good.itertuples() for held in [every(r.text)] for t in r.tokens]
        more = [np.mean(v) if v else float("nan") for v in (twice, there)]
        found.append((*key, len(own), ((own["tries"] > 1) | (own["fault"] != "")).mean(), *bad, *right, *more))
    shares = ["first", "unparsable", "low", "high", "agrees", "agrees_low", "agrees_high", "repeats", "inside"]
    return pd.DataFrame(found, columns=[*CELL, "n", *shares]).round(9)


def top_tokens(readings, most=50):
    """The most frequent named tokens of each model and trait of the text: columns model, trait, token, count, is_emoji.

    readings: as from `parsed`, of one reader. A reply counts a token once. Equal counts stand in alphabetical order.
    """
    found = []
    for (model, trait), own in readings.groupby(["model", "trait"], sort=False):
        counts = Counter(t for tokens in own["tokens"] for t in set(tokens))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
        found += [(model, trait, token, n, emojis.is_emoji(token)) for token, n in ranked]
    return pd.DataFrame(found, columns=["model", "trait", "token", "count", "is_emoji"])
