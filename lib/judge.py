"""A judge of texts: how well do a trait's adjectives describe a text, from 1 (not at all) to 5 (very well)?

PAE, personality adjective evaluation (Mao et al. 2023), is the score of a generated text minus that of the original.
Three judges, by `settings.judge.kind`: "embedding" needs no service, "openai" is any chat endpoint that speaks that
protocol, "local" a chat model from the hub or a folder.
"""

import hashlib
import json
import math
import os
import random
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from string import Template

import httpx
import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

from lib import artifacts, big5, encoders, hub, opinions, paths
from lib.errors import UserError

PROMPTS = paths.ROOT / "data" / "prompts" / "pae.toml"
LOWEST, HIGHEST = 1, 5
RIDGE = 1.0  # penalty on the calibration's squared weights; a hundred times more or less hardly matters
PIECE = 1024  # texts embedded between two moves of the progress bar
LONGEST_REPLY = 2**20  # bytes; a score takes some hundred
LONGEST_WAIT = 300  # seconds that an endpoint may ask us to wait
KEPT = "scores so far are kept, run it again to go on"


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
    if judge.kind == "local":
        hub.check(judge.model)
    if judge.kind == "openai":
        traits = big5.ordered(labelled["trait"])
        pairs = [*zip(given["answer"], given["trait"], strict=True)]
        pairs += [(text, trait) for text in labelled["answer"] for trait in traits]
        _key(judge)
        _confirm(judge, [messages for messages, _ in _open_calls(settings, dict.fromkeys(pairs))[2].values()])


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
    return tomllib.loads(PROMPTS.read_text("utf-8"))


def _question(prompts, text, trait):
    own = big5.TRAITS[big5.NAMES.index(trait)]
    values = {"adjectives": ", ".join(own.adjectives), "definition": own.definition, "text": text.strip()}
    return Template(prompts["question"].strip()).substitute(values)


def parse(reply):
    """The score in a reply that is {"score": 1..5} and nothing else, or None."""
    try:
        found = json.loads(reply, object_pairs_hook=list)  # pairs, so that a key given twice is seen
    except (ValueError, RecursionError, TypeError):
        return None
    if not (isinstance(found, list) and len(found) == 1 and isinstance(found[0], tuple) and found[0][0] == "score"):
        return None
    value = found[0][1]
    return value if type(value) is int and LOWEST <= value <= HIGHEST else None


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
    return LOWEST + (HIGHEST - LOWEST) * expit(z @ fitted["weights"].T + fitted["bias"])


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
    found = [parse(reply) for reply in chat.answer(loaded, questions, **options)["answer"]]
    again = [i for i, value in enumerate(found) if value is None]
    if again:
        reminded = [f"{questions[i]}\n\n{prompts['reminder']}" for i in again]
        for i, reply in zip(again, chat.answer(loaded, reminded, **options)["answer"], strict=True):
            found[i] = parse(reply)
    return [math.nan if value is None else value for value in found]


# --- any endpoint that speaks the OpenAI chat protocol


class PassingError(Exception):
    """A call that may succeed when it is made again. wait: seconds that the endpoint asks for."""

    def __init__(self, reason, wait=0):
        super().__init__(reason)
        self.wait = wait


class NonsenseError(UserError):
    """An endpoint that answers, but never with a score."""


class StoppedError(UserError):
    """A call that was not made because another one has failed for good."""


class Endpoint:
    """Asks for scores, several at once if threads share it, and makes failed calls again.

    Shared by the threads: when the endpoint wants calls again after a rate limit, whether it ever answered, and
    whether to stop.
    """

    def __init__(self, judge, key):
        self.judge, self.key = judge, key
        self.url = judge.base_url.rstrip("/") + "/chat/completions"
        self.client = httpx.Client(timeout=judge.timeout_s, headers={"Authorization": f"Bearer {key}"})
        self.stopped, self.reached, self.free_at = threading.Event(), False, 0.0

    def ask(self, messages):
        """The score in the reply to chat messages: 1 to 5. Raises UserError when all tries have failed."""
        for tried in range(self.judge.retries + 1):
            self.rest(self.free_at - time.monotonic())
            try:
                value = parse(self._reply(messages))
            except PassingError as error:
                failure, wait = error, error.wait
            else:
                if value is not None:
                    return value
                failure, wait = None, 0
            if tried < self.judge.retries:
                backoff = min(self.judge.wait_s * 2**tried, LONGEST_WAIT) * random.uniform(0.75, 1.25)
                self.rest(max(wait, backoff))
        times = f"{self.judge.retries + 1} tries"
        if failure is None:
            raise NonsenseError(
                f'judge: {self.judge.model} at {self.url} gave no {{"score": 1 to 5}} in {times}; '
                f"choose another judge.model; {KEPT}"
            )
        raise UserError(f"judge: {self.url} fails ({failure}; {times}); see that it is up; {KEPT}")

    def rest(self, seconds):
        """Wait, unless all is to stop."""
        if self.stopped.wait(max(0, seconds)):
            raise StoppedError(f"judge: stopped; {KEPT}")

    def _reply(self, messages):
        """What the model says. Raises PassingError, or UserError where another try cannot help."""
        body = {**self.judge.request, "model": self.judge.model, "messages": messages}
        try:
            status, headers, raw = self._post(body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if not self.reached:
                reason = self._clean(error) or "no reply"
                raise UserError(
                    f"judge: {self.url} cannot be reached ({reason}); start it or correct judge.base_url; {KEPT}"
                ) from None
            raise PassingError("connection refused") from None
        except httpx.TimeoutException:
            raise PassingError(f"no reply within judge.timeout_s = {self.judge.timeout_s:g}") from None
        except httpx.HTTPError as error:
            raise PassingError(self._clean(error) or type(error).__name__) from None
        self.reached = True
        if status != 200:
            self._refused(status, headers, raw)
        try:
            return json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            return None

    def _post(self, body):
        """Status, headers and body of the reply, of limited size and within the time for all of it."""
        began, raw = time.monotonic(), bytearray()
        with self.client.stream("POST", self.url, json=body) as reply:
            for part in reply.iter_bytes():
                raw += part
                if len(raw) > LONGEST_REPLY:
                    raise PassingError("a reply without end")
                if time.monotonic() - began > self.judge.timeout_s:
                    raise httpx.ReadTimeout("too slow")
        return reply.status_code, reply.headers, bytes(raw)

    def _refused(self, status, headers, raw):
        """Raise what a status other than 200 means."""
        said = f"{status} {self._said(raw)}".strip()
        if status in (408, 425, 429) or status >= 500:
            wait = _seconds(headers.get("retry-after"))
            if wait > LONGEST_WAIT:
                raise UserError(f"judge: {self.url} wants no calls for {wait:.0f} s ({said}); wait; {KEPT}")
            if status == 429:
                self.free_at = max(self.free_at, time.monotonic() + wait)  # for all threads
            raise PassingError(said, wait)
        remedy = {
            401: f"it does not take the key in {self.judge.key_variable}; set a valid one",
            403: f"the key in {self.judge.key_variable} may not use {self.judge.model}; choose another",
            404: "no such address or model; correct judge.base_url (it often ends in /v1) or judge.model",
        }.get(status, "correct judge.base_url, judge.model or judge.request")
        raise UserError(f"judge: {self.url} answers {said}; {remedy}; {KEPT}")

    def _said(self, raw):
        try:
            return self._clean(json.loads(raw)["error"]["message"])
        except (ValueError, RecursionError, LookupError, TypeError):
            return ""

    def _clean(self, message):
        """One printable line of someone else's message, without the key."""
        line = "".join(c if c.isprintable() else " " for c in str(message)).replace(self.key, "***")
        return " ".join(line.split())[:160]


def _seconds(value):
    """Seconds that a Retry-After header asks for, whether a number or a date; 0 without one."""
    try:
        if value.strip().isdigit():
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (AttributeError, ValueError, TypeError, OverflowError):
        return 0


def cache(settings):
    """The file that keeps an endpoint's scores, a JSON line each. --fresh leaves it: its lines may have cost money."""
    return paths.RESULTS / settings.profile / "judge.jsonl"


def _kept(path):
    """{id of the call: score} of the whole lines of a cache; what a killed run left half written is passed over."""
    found = {}
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            if type(row["score"]) is int and LOWEST <= row["score"] <= HIGHEST:
                found[row["id"]] = row["score"]
        except (ValueError, LookupError, TypeError):
            continue
    return found


def _identity(judge, messages):
    """Id of a call: whatever decides about its reply."""
    parts = [judge.base_url.rstrip("/"), judge.model, judge.request, messages]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _by_endpoint(settings, pairs, show):
    ids, found, new = _open_calls(settings, pairs)
    if new:
        _confirm(settings.judge, [messages for messages, _ in new.values()])
        found |= _ask_all(Endpoint(settings.judge, _key(settings.judge)), new, cache(settings), show)
    return [found.get(i, math.nan) for i in ids]


def _open_calls(settings, pairs):
    """Ids of all calls, scores that are kept by id, and the calls still to make: {id: (messages, trait)}."""
    prompts = _prompts()
    head = {"role": "system", "content": prompts["system"]}
    asked = [[head, {"role": "user", "content": _question(prompts, text, trait)}] for text, trait in pairs]
    ids = [_identity(settings.judge, messages) for messages in asked]
    found = _kept(cache(settings))
    new = {i: (m, trait) for i, m, (_, trait) in zip(ids, asked, pairs, strict=True) if i not in found}
    return ids, found, new


def _confirm(judge, asked):
    """Refuse to start calls that the settings do not allow, and say how many they are."""
    if judge.confirm_calls < len(asked):
        tokens = sum(len(m["content"]) for messages in asked for m in messages) // 4  # about 4 characters a token
        raise UserError(
            f"judge: {len(asked):,} calls to {judge.model} at {judge.base_url} are needed (about {tokens:,} tokens in, "
            f"{10 * len(asked):,} out) and judge.confirm_calls = {judge.confirm_calls}; set it to {len(asked)} to start"
        )


def _key(judge):
    """The endpoint's key, from the environment. Raises UserError, also for an address that cannot be one."""
    try:
        address = httpx.URL(judge.base_url)
    except httpx.InvalidURL:
        address = httpx.URL("")
    if address.scheme not in ("http", "https") or not address.host:
        raise UserError(f"judge.base_url = {judge.base_url!r}: not an address; give one such as https://host/v1")
    key = os.environ.get(judge.key_variable, "").strip()
    if not key:
        raise UserError(
            f"judge: no key in the environment; export {judge.key_variable}=... (any word if the endpoint wants none), "
            "or set judge.key_variable"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"judge: the key in {judge.key_variable} holds odd characters; copy it again")
    return key


def _ask_all(endpoint, new, path, show):
    """Scores of new calls by id, each written to the cache at `path` as it comes. Raises UserError.

    new: {id: (messages, trait)}. Up to 1 % of the texts may stay without a score (services decline some texts). On an
    error or Ctrl-C no further call starts; replies under way are waited for and kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found, lost, lock = {}, 0, threading.Lock()
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with endpoint.client, open(path, "a", encoding="utf-8") as file:
        file.write("\n" if torn else "")

        def one(i):
            messages, trait = new[i]
            try:
                value = endpoint.ask(messages)
            except UserError as error:
                if not isinstance(error, NonsenseError):
                    endpoint.stopped.set()  # before this thread takes the next call
                raise
            line = json.dumps({"id": i, "model": endpoint.judge.model, "trait": trait, "score": value})
            with lock:
                file.write(f"{line}\n")
                file.flush()
            return i, value

        pool = ThreadPoolExecutor(endpoint.judge.concurrency)
        try:
            bar = tqdm(as_completed([pool.submit(one, i) for i in new]), total=len(new), disable=not show, unit="text")
            for done in bar:
                try:
                    found.update([done.result()])
                except StoppedError:
                    continue  # the call that failed is among them and says why
                except NonsenseError:
                    lost += 1
                    if lost > len(new) // 100:
                        raise
        finally:
            endpoint.stopped.set()
            pool.shutdown(cancel_futures=True)
    return found
