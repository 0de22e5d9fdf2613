"""How likely a chat model finds given texts, and how far a method has moved it: log-probabilities and KL by token.

Teacher forcing: prompt and answer go through the model once, and the scores at one token are read as the prediction of
the *next* one. Only tokens of the answer count, not the template's and not the end of the turn. All in nats.
"""

from contextlib import contextmanager, nullcontext

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from lib import answers, artifacts, big5, chat, hub, ike, mend, paths, qlora
from lib.errors import UserError

COLUMNS = ("m_plus_edit", "m_minus_edit", "m_plus_pre", "kl", "perplexity")
AT_ONCE = 50  # rows whose distributions are held in memory: with 32,000 tokens and 120 a text, 0.8 GB


def encode(speaker, questions, texts):
    """Token ids and labels of user messages and their answers, as `qlora.encode` has them. Raises UserError."""
    items = qlora.encode(
        speaker.tokenizer, pd.DataFrame({"question": list(questions), "answer": list(texts)}), None, False
    )
    limit = speaker.context
    for i, item in enumerate(items):
        if limit and len(item["input_ids"]) > limit:
            raise UserError(
                f"text {i + 1} of {len(items)}: question and answer have {len(item['input_ids'])} tokens, more "
                f"than the {limit} that {speaker.name} takes; shorten the prompt (fewer demonstrations) or the answer"
            )
    return items


def batches(items, tokens):
    """Lists of item numbers, items of like length together, the longest first; at most `tokens` a batch, padding too.

    A batch holds one item at least, however long.
    """
    lengths = [len(i["input_ids"]) for i in items]
    found, widest = [], 0
    for i in sorted(range(len(items)), key=lambda i: -lengths[i]):
        if found and (len(found[-1]) + 1) * widest <= tokens:
            found[-1].append(i)
        else:
            found.append([i])
            widest = max(1, lengths[i])
    return found


def forward(speaker, items):
    """Log-probabilities over the vocabulary at the answers' tokens, for one batch in its order: fp32, as `scored`."""
    with torch.no_grad():
        found, ids, counts = scored(speaker, items)
        return found.float().log_softmax(-1), ids, counts


def scored(speaker, items, at=None):
    """Scores over the vocabulary at the answers' tokens, for one batch in its order, padded on the right.

    at: embeddings that take the place of the ids, for gradients. Returns (tensor (answer tokens of all items,
    vocabulary), ids of these tokens, number of them an item).
    """
    batch = {k: v.to(speaker.model.device) for k, v in qlora.Collator(speaker.pad)(items).items()}
    labels = batch.pop("labels")
    if at is not None:
        del batch["input_ids"]
        batch["inputs_embeds"] = at
    labels[:, 0] = qlora.IGNORED  # nothing comes before the first token that could predict it
    counted = labels != qlora.IGNORED
    first = int(counted.any(0).int().argmax())
    keep = labels.shape[1] - max(first - 1, 0)  # scores further left are of no use: spares much of a long prompt
    places = torch.arange(labels.shape[1] - keep, labels.shape[1], device=labels.device)
    extra = {"logits_to_keep": places, "use_cache": False}  # a number would leave a view, which multiplies slowly
    extra = {k: v for k, v in extra.items() if k in speaker.arguments}
    scores = speaker.model(**batch, **extra).logits[:, -keep:]
    ids = labels[:, -keep:][:, 1:]  # the scores at token t predict token t + 1
    wanted = ids != qlora.IGNORED
    return scores[:, :-1][wanted], ids[wanted], counted.sum(1).tolist()


def _each(speaker, items, tokens, in_order, keep):
    """What `keep(log-probabilities, ids)` makes of every item's answer, in the items' order."""
    found = [None] * len(items)
    for chosen in [list(range(len(items)))] if in_order else batches(items, tokens):
        scores, ids, counts = forward(speaker, [items[i] for i in chosen])
        for i, own, own_ids in zip(chosen, scores.split(counts), ids.split(counts), strict=True):
            found[i] = keep(own, own_ids)
    return found


def log_probabilities(speaker, questions, texts, tokens=4096, in_order=False):
    """Log-probability of every token of each answer: list of arrays (tokens of the answer,), nats, in their order.

    questions: user messages. texts: the answers that are read. tokens: of a batch, padding included. in_order: all
    rows as one batch, in their order, for a model whose changes go by row.
    """
    items = encode(speaker, questions, texts)
    return _each(speaker, items, tokens, in_order, lambda s, ids: s.gather(1, ids[:, None])[:, 0].cpu().numpy())


def mean(*args, **more):
    """Mean token log-probability m of each answer: array (texts,); NaN where an answer has no token."""
    return np.array([p.mean() if len(p) else np.nan for p in log_probabilities(*args, **more)])


def perplexity(*args, **more):
    """exp(-m) of each answer, one number a text, at least 1 (Jelinek et al. 1977); NaN for an empty answer."""
    return np.exp(-mean(*args, **more))


def distributions(speaker, questions, texts, tokens=4096, in_order=False):
    """(log-probabilities over the vocabulary, ids) at the tokens of each answer: list of tensor pairs on the CPU."""
    items = encode(speaker, questions, texts)
    return _each(speaker, items, tokens, in_order, lambda s, ids: (s.cpu(), ids.cpu()))


def divergence(pre, edited):
    """Mean token KL(pre || edited) of each text: array (texts,), nats, 0 for the same model (Kullback & Leibler 1951).

    pre, edited: as `distributions` gives them for the same texts. KL at a token is the sum over the vocabulary of
    p_pre (log p_pre - log p_edited), the two models having read the same text so far, each behind its own prompt.
    """
    found = []
    for (p, ids), (q, other) in zip(pre, edited, strict=True):
        if not torch.equal(ids, other):
            raise UserError("the same text has other tokens behind another prompt; end the prompt without a blank")
        found.append((p.exp() * (p - q)).sum(-1).mean().item() if len(ids) else float("nan"))
    return np.array(found)


def references(test, given):
    """Answers of one trait with the reference texts that they are scored by; an index of 0, 1, 2 ...

    test: test opinions (trait, topic, question, answer). given: answers of one model and method to them. New columns:
    plus: the target trait's text on the topic; minus: another trait's on the same topic, the other traits taking
    turns row by row, empty where there is none; next_topic, next_question, next_text: the following topic's, the
    first after the last. Raises UserError.
    """
    trait = given["trait"].iloc[0]
    own = test[test["trait"] == trait].drop_duplicates("topic").set_index("topic")
    if unknown := [t for t in given["topic"] if t not in own.index]:
        raise UserError(f"answers for {trait}: no test opinion about {unknown[0]!r}; make the answers again (--fresh)")
    if len(own) < 2:
        raise UserError(f"opinions: {trait} has one test topic only; drawdown needs another one, add it")
    after = dict(zip(own.index, [*own.index[1:], own.index[0]], strict=True))
    other = {topic: list(rows["answer"]) for topic, rows in test[test["trait"] != trait].groupby("topic", sort=False)}
    turns = [other.get(topic, [""]) for topic in given["topic"]]
    following = given["topic"].map(after)
    return given.reset_index(drop=True).assign(
        plus=list(own.loc[given["topic"], "answer"]),
        minus=[texts[i % len(texts)] for i, texts in enumerate(turns)],
        next_topic=list(following),
        next_question=list(own.loc[following, "question"]),
        next_text=list(own.loc[following, "answer"]),
    )


def _following(rows):
    """Rows that ask about the next topic instead of their own, for a method's prompt."""
    return rows.assign(topic=rows["next_topic"], question=rows["next_question"])[["trait", "topic", "question"]]


def scores(plain, rows, ask=None, turned=None, group=None, before=None, reader=None, first=0, tokens=4096):
    """What ES, DD and the perplexity are made of: DataFrame with topic and COLUMNS, a row an answer, in their order.

    plain: the untouched base `Chat`. rows: as from `references`. ask: rows (trait, topic, question) -> the method's own
    user messages; without it the plain questions. turned: rows -> context manager of the `Chat` that answers them;
    without it the base. group: how many rows `turned` takes at once, where its changes go by row; the texts then come
    in the rows' order. before: m_plus_pre, where it is known. reader: the `Chat` by which the answers' perplexity is
    measured, `plain` if not given. first: so many rows have ES and DD, 0 = all; the others have NaN there, but a
    perplexity. tokens: of a batch.

    The other topic's text is read behind the method's own prompt for that topic, with the change made for this one.
    """
    read = rows.head(first or len(rows))
    if before is None:
        before = mean(plain, read["question"], read["plus"], tokens)
    if ask is None and turned is None:
        plus, minus = before, mean(plain, read["question"], read["minus"], tokens)
        kl = np.zeros(len(read))  # of the base to itself
    else:
        plus, minus, kl = _moved(plain, read, ask, turned, group, tokens)
    found = pd.DataFrame({"topic": list(rows["topic"])} | dict.fromkeys(COLUMNS, np.nan))
    found.loc[found.index[: len(read)], list(COLUMNS[:4])] = np.column_stack([plus, minus, before[: len(read)], kl])
    return found.assign(perplexity=perplexity(reader or plain, rows["question"], rows["answer"], tokens))


def _moved(plain, rows, ask, turned, group, tokens):
    """m_plus_edit, m_minus_edit and kl of rows, for `scores`: array (3, rows)."""
    ask = ask or (lambda part: list(part["question"]))
    turned = turned or (lambda part: nullcontext(plain))
    rows = rows.assign(asked=ask(rows[["trait", "topic", "question"]]), asked_next=ask(_following(rows)))
    found, same = [], {"tokens": tokens, "in_order": group is not None}
    for low in range(0, len(rows), AT_ONCE):
        part = rows.iloc[low : low + AT_ONCE]
        pre = distributions(plain, part["next_question"], part["next_text"], tokens)
        for at in range(0, len(part), group or AT_ONCE):
            chosen = slice(at, at + (group or AT_ONCE))
            own = part.iloc[chosen]
            with turned(own) as speaker:
                plus, minus = (mean(speaker, own["asked"], own[column], **same) for column in ("plus", "minus"))
                after = distributions(speaker, own["asked_next"], own["next_text"], **same)
            found.append(np.stack([plus, minus, divergence(pre[chosen], after)]))
    return np.concatenate(found, axis=1)


def of_answers(settings, model, given, frame, show=True):
    """Answers with the columns that `scores` gives, an artefact for every method and trait.

    given: answers of one model, by any methods. frame: opinions with a column split. Models are loaded only where
    something is missing. Raises UserError.
    """
    test, train = (frame[frame["split"] == s] for s in ("test", "train"))
    there, loaded, parts, before = set(given["method"]), {}, [], {}
    bar = [(m, t) for m in answers.METHODS if m in there for t in big5.ordered(given["trait"])]
    for method, trait in tqdm(bar, disable=not show, unit="method and trait"):
        own = given[(given["method"] == method) & (given["trait"] == trait)]
        rows = references(test, own)

        def make(method=method, trait=trait, rows=rows):
            a, how = settings.alignment, _turn(settings, model, method, trait, frame, train, loaded)
            topics, known = before.get(trait, (None, None))
            if how["plain"] is how["reader"] and topics == list(rows["topic"]):
                how["before"] = known
            return scores(**how, rows=rows, first=a.topics, tokens=a.batch_tokens)

        part = build(settings, model, method, trait, rows, make)
        if method == "base":
            before[trait] = list(part["topic"]), part["m_plus_pre"].to_numpy()
        parts.append(own.assign(**{c: part[c].to_numpy() for c in COLUMNS}))
    return pd.concat(parts).loc[given.index]


def _turn(settings, model, method, trait, frame, train, loaded):
    """The arguments of `scores` that say how a method turns a model. loaded: {precision: Chat}, filled where needed."""
    place = mend.folder(settings, model, frame) if method == "mend" else None
    if method == "peft":
        place = qlora.folder(settings, model, trait, train[train["trait"] == trait])
    if place is not None:
        artifacts.require(place, answers.MAKERS[method][0], settings.profile)

    def speaker(precision):
        if precision not in loaded:
            loaded[precision] = chat.load(model, precision)
        return loaded[precision]

    base = speaker(settings.chat.precision)
    how = {"plain": base, "reader": base}
    if method in ("prompt", "ike"):
        return how | {"ask": lambda part: ike.questions(settings, method, part, train)}
    if method == "peft":
        return how | {"turned": lambda part: chat.adapted(base, str(place))}
    if method == "mend":  # its weights are not in 4 bits, so neither are those that it is compared with
        twin = speaker(settings.mend.precision)
        if place not in loaded:
            loaded[place] = mend.load(place, twin)
        how |= {"plain": twin, "group": settings.mend.batch_size}
        return how | {"turned": lambda part: edited(loaded[place], part)}
    return how


@contextmanager
def edited(editor, rows):
    """The chat model with every row of a batch edited by MEND towards its own `plus`; a batch holds rows in order."""
    items = mend.encode(editor.loaded.tokenizer, rows.assign(answer=rows["plus"]), None)
    with mend.applied(editor.layers, editor.edits(items)):
        yield editor.loaded


def folder(settings, model, method, trait, rows):
    """Where the scores of a model's answers are kept: settings, texts, weights and code decide about the name."""
    from lib import likelihood

    base, own = (answers.folder(settings, model, m, trait).name for m in ("base", method))
    digest = artifacts.fingerprint(rows.to_csv(index=False))
    values = [settings.alignment.topics, settings.chat.precision, settings.mend.precision]
    mark = artifacts.fingerprint(base, own, digest, values, likelihood, qlora, chat, mend)
    return paths.RESULTS / settings.profile / f"scores-{hub.label(model)}-{method}-{trait}-{mark}"


def build(settings, model, method, trait, rows, make):
    """The artefact's scores, or those that `make()` returns, kept: columns topic and COLUMNS. rows: as `scores`."""

    def write(tmp):
        make().to_csv(tmp / "scores.csv", index=False)

    place = artifacts.build(folder(settings, model, method, trait, rows), write)
    return pd.read_csv(
        place / "scores.csv", dtype={"topic": str}, keep_default_na=False, na_values=dict.fromkeys(COLUMNS, "")
    )
