"""A judge of texts: how well do a trait's adjectives describe a text, from 1 (not at all) to 5 (very well)?

PAE, personality adjective evaluation (Mao et al. 2023), is the score of a generated text minus that of the original.
Three judges, by `settings.judge.kind`: "embedding" needs no service, "openai" is any chat endpoint that speaks that
protocol, "local" a chat model from the hub or a folder.
"""

import math
import tomllib
from string import Template

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

from lib import artifacts, big5, encoders, endpoint, hub, opinions, paths
from lib.errors import UserError

PROMPTS = paths.ROOT / "data" / "prompts" / "pae.toml"
PARTS = ("system", "question", "reminder", "sentences", "person")
RIDGE = 1.0  # penalty on the calibration's squared weights; a hundred times more or less hardly matters
PIECE = 1024  # texts embedded between two moves of the progress bar


def score(settings, texts, traits, show=True):
    """How well each text fits the adjectives of the trait beside it: array (n,), 1 to 5. Raises UserError.

    texts, traits: of one length; the same text may stand beside several traits. NaN where a model gave no score,
    which is reported in a line. show: a progress bar.
    """
    # half a surrogate pair cannot be sent or hashed
    pairs = [(str(text).encode("utf-8", "replace").decode(), trait) for text, trait in zip(texts, traits, strict=True)]
    unique = list(dict.fromkeys(pairs))
    judge = {"embedding": _by_embedding, "openai": _by_endpoint, "local": _by_model}[settings.judge.kind]
    found = dict(zip(unique, judge(settings, unique, show), strict=True)) if unique else {}
    scores = np.array([found[pair] for pair in pairs], dtype=float)
    if missing := int(np.isnan(scores).sum()):
        print(f"judge: {missing} of {len(scores)} texts have no score, {settings.judge.model} gave none; left out")
    return scores


def check(settings, given, labelled):
    """Refuse a judge that could not be asked about answers and labelled texts, before any work. Raises UserError.

    given: answers, each for its own trait; labelled: rows for `validity` and `sensitivity`, each for every trait.
    """
    judge = settings.judge
    _prompts()
    if judge.kind == "local":
        hub.check(judge.model)
    if judge.kind == "openai":
        traits = big5.ordered(labelled["trait"])
        pairs = [*zip(given["answer"], given["trait"], strict=True)]
        pairs += [(text, trait) for text in labelled["answer"] for trait in traits]
        endpoint.key(judge)
        endpoint.confirm(judge, [messages for messages, _ in _open_calls(settings, dict.fromkeys(pairs))[2].values()])


def against(settings, texts, traits, show=True):
    """Scores of every text against every trait: array (texts, traits)."""
    texts, traits = list(texts), list(traits)
    every = score(settings, [t for t in texts for _ in traits], traits * len(texts), show)
    return every.reshape(len(texts), len(traits))


def validity(settings, rows, show=True):
    """Does the judge see the trait a text was written for? Columns trait, n, rho, auc, own, other.

    rows: DataFrame with trait and answer, not of the calibration's topics. Every text is scored against every trait
    in rows. rho: Spearman's rank correlation of score and label (1 own trait, 0 another). With one own text in k a
    perfect judge reaches sqrt(3 (k - 1)) / k, .69 for five traits, since the labels are tied. auc: how often an own
    text scores above another trait's. own, other: mean scores. n: scored pairs. The last row pools all traits.
    """
    traits = big5.ordered(rows["trait"])
    scores = against(settings, rows["answer"], traits, show)
    labels = rows["trait"].to_numpy(str)[:, None] == np.array(traits)
    columns = [(t, scores[:, i], labels[:, i]) for i, t in enumerate(traits)]
    found = []
    for name, values, own in [*columns, ("all", scores.ravel(), labels.ravel())]:
        values, own = values[~np.isnan(values)], own[~np.isnan(values)]
        both = 0 < own.sum() < len(own)
        rho = spearmanr(values, own)[0] if both and np.ptp(values) > 0 else math.nan
        auc = roc_auc_score(own, values) if both else math.nan
        means = [values[part].mean() if part.any() else math.nan for part in (own, ~own)]
        found.append((name, len(values), float(rho), auc, *means))
    return pd.DataFrame(found, columns=["trait", "n", "rho", "auc", "own", "other"])


def sensitivity(settings, rows, each=3, show=True):
    """The paper's test on 15 texts: does a text score higher for its own trait than for the others?

    rows: DataFrame of test rows with trait and answer, of which `each` a trait are drawn with the run's seed.
    Returns columns trait, answer, a score for every trait, and gap: own minus the mean of the others.
    """
    traits = big5.ordered(rows["trait"])
    drawn = [rows[rows["trait"] == t] for t in traits]
    drawn = pd.concat([part.sample(min(each, len(part)), random_state=settings.seed) for part in drawn])
    scores = against(settings, drawn["answer"], traits, show)
    own = drawn["trait"].to_numpy(str)[:, None] == np.array(traits)
    gap = scores[own] - np.where(own, 0, scores).sum(1) / max(1, len(traits) - 1)
    table = drawn[["trait", "answer"]].reset_index(drop=True)
    return table.assign(**dict(zip(traits, scores.T, strict=True)), gap=gap)


def _prompts():
    """data/prompts/pae.toml as a dictionary. Raises UserError."""
    where = f"data/prompts/{PROMPTS.name}"
    with hub.refusal(f"{where}: cannot be read", "mend that line, or restore the file"):
        found = tomllib.loads(PROMPTS.read_text("utf-8"))
    if missing := [name for name in PARTS if name not in found]:
        raise UserError(f"{where}: has no {missing[0]}; restore it")
    return found


def _question(prompts, text, trait):
    own = big5.TRAITS[big5.NAMES.index(trait)]
    values = {"adjectives": ", ".join(own.adjectives), "definition": own.definition, "text": text.strip()}
    return Template(prompts["question"].strip()).substitute(values)


# --- without a service: sentence embeddings


def calibrated(settings):
    """The embedding judge's fitted numbers by name, made once and kept as an artefact.

    anchors (k, d): embeddings of sentences about each trait's adjectives and definition. mean, sd (k,): of the
    anchors' cosine with the calibration texts. weights (traits, k), bias (traits,): logistic, see `fit`.
    Calibrated on the bundled train rows alone, `judge.calibration_topics` of them evenly spaced, whatever opinions
    a run is about: the instrument stays the same over runs and seeds.
    """
    from lib import judge

    source, count, prompts = paths.OPINIONS / "train.csv", settings.judge.calibration_topics, _prompts()
    spoken = [prompts["sentences"], prompts["person"]]
    mark = artifacts.fingerprint("embedding", source, count, spoken, judge, big5, encoders)

    def make(tmp):
        rows = opinions.read_csv(source)
        topics = rows["topic"].unique()
        chosen = topics[np.linspace(0, len(topics) - 1, min(count, len(topics))).astype(int)]
        rows = rows[rows["topic"].isin(chosen)]
        sentences, own = _anchors(prompts)
        anchors = encoders.embed(sentences)
        cosine = encoders.embed(rows["answer"]) @ anchors.T
        labels = rows["trait"].to_numpy(str)[:, None] == np.array(big5.NAMES)
        np.savez(tmp / "judge.npz", anchors=anchors, **fit(cosine, labels, own))

    folder = artifacts.build(paths.RESULTS / settings.profile / f"judge-{mark}", make)
    with np.load(folder / "judge.npz", allow_pickle=False) as kept:
        return dict(kept)


def _anchors(prompts):
    """Sentences about the traits, and for each trait which of them are its own: list (k,), booleans (traits, k)."""
    found = []
    for trait in big5.TRAITS:
        found += [
            (Template(s).substitute(adjective=a), trait.name) for s in prompts["sentences"] for a in trait.adjectives
        ]
        found.append((Template(prompts["person"]).substitute(definition=trait.definition), trait.name))
    return [s for s, _ in found], np.array([[name == owner for _, owner in found] for name in big5.NAMES])


def fit(cosine, labels, own):
    """Logistic regression for each trait, own (5) against other (1), with the signs of its weights given.

    cosine: (texts, anchors). labels: (texts, traits), whether the text is of the trait. own: (traits, anchors).
    A trait's own anchors weigh 0 or more, the others' 0 or less: a text that comes closer to the adjectives, all else
    equal, never scores lower. Without that bound it would be one more trait classifier, as TA already has one.
    """
    mean, sd = cosine.mean(0), cosine.std(0) + 1e-9
    z = (cosine - mean) / sd
    signs = np.where(own, 1.0, -1.0)
    solved = [_logistic(z * s, y) for s, y in zip(signs, labels.T, strict=True)]
    weights = signs * np.stack([x[:-1] for x in solved])
    return {"mean": mean, "sd": sd, "weights": weights, "bias": np.array([x[-1] for x in solved])}


def _logistic(x, labels):
    """Weights, none negative, then the bias of a logistic regression: (features + 1,)."""
    y = np.where(labels, 1.0, -1.0)

    def loss(w):
        margin = y * (x @ w[:-1] + w[-1])
        slope = -y * expit(-margin)
        value = np.logaddexp(0, -margin).sum() + RIDGE / 2 * (w[:-1] ** 2).sum()
        return value, np.append(slope @ x + RIDGE * w[:-1], slope.sum())

    bounds = [(0, None)] * x.shape[1] + [(None, None)]
    return minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", bounds=bounds).x


def expected(cosine, fitted):
    """Expected score on a scale where own is 5 and other is 1: (texts, anchors) -> (texts, traits in usual order)."""
    z = (cosine - fitted["mean"]) / fitted["sd"]
    return endpoint.LOWEST + (endpoint.HIGHEST - endpoint.LOWEST) * expit(z @ fitted["weights"].T + fitted["bias"])


def _by_embedding(settings, pairs, show):
    fitted = calibrated(settings)
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for text, _ in pairs))}
    vectors, listed = [], list(texts)
    with tqdm(total=len(listed), disable=not show, unit="text") as bar:
        for start in range(0, len(listed), PIECE):
            vectors.append(encoders.embed(listed[start : start + PIECE]))
            bar.update(len(vectors[-1]))
    scores = expected(np.concatenate(vectors) @ fitted["anchors"].T, fitted)
    return [scores[texts[text], big5.NAMES.index(trait)] for text, trait in pairs]


# --- a chat model from the hub or a folder


def _by_model(settings, pairs, show):
    """Greedy replies; a reply without a score is asked for once more with a reminder, then NaN."""
    from lib import chat

    prompts, judge = _prompts(), settings.judge
    loaded = chat.load(judge.model, settings.chat.precision)
    options = {"temperature": 0, "top_p": 1, "seed": settings.seed, "batch_size": settings.chat.batch_size}
    options |= {"max_new_tokens": judge.max_new_tokens, "system": prompts["system"], "show": show}
    questions = [_question(prompts, text, trait) for text, trait in pairs]
    found = [endpoint.parse(reply) for reply in chat.answer(loaded, questions, **options)["answer"]]
    again = [i for i, value in enumerate(found) if value is None]
    if again:
        reminded = [f"{questions[i]}\n\n{prompts['reminder']}" for i in again]
        for i, reply in zip(again, chat.answer(loaded, reminded, **options)["answer"], strict=True):
            found[i] = endpoint.parse(reply)
    return [math.nan if value is None else value for value in found]


def _by_endpoint(settings, pairs, show):
    ids, found, new = _open_calls(settings, pairs)
    if new:
        endpoint.confirm(settings.judge, [messages for messages, _ in new.values()])
        found |= endpoint.ask_all(
            endpoint.Endpoint(settings.judge, endpoint.key(settings.judge)), new, endpoint.cache(settings), show
        )
    return [found.get(i, math.nan) for i in ids]


def _open_calls(settings, pairs):
    """Ids of all calls, scores that are kept by id, and the calls still to make: {id: (messages, trait)}."""
    prompts = _prompts()
    head = {"role": "system", "content": prompts["system"]}
    asked = [[head, {"role": "user", "content": _question(prompts, text, trait)}] for text, trait in pairs]
    ids = [endpoint.identity(settings.judge, messages) for messages in asked]
    found = endpoint.kept(endpoint.cache(settings))
    new = {i: (m, trait) for i, m, (_, trait) in zip(ids, asked, pairs, strict=True) if i not in found}
    return ids, found, new
