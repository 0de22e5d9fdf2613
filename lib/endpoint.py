"""Any chat endpoint that speaks the OpenAI protocol, asked for scores: failed calls are made again, replies are kept.

A score that has come is written to a file at once, so that an interrupted scoring goes on where it stopped.
"""

import hashlib
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from tqdm.auto import tqdm

from lib import paths
from lib.errors import UserError

LOWEST, HIGHEST = 1, 5
LONGEST_REPLY = 2**20  # bytes; a score takes some hundred
LONGEST_WAIT = 300  # seconds that an endpoint may ask us to wait
KEPT = "scores so far are kept, run it again to go on"


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
            wait = seconds(headers.get("retry-after"))
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


def seconds(value):
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


def kept(path):
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


def identity(judge, messages):
    """Id of a call: whatever decides about its reply."""
    parts = [judge.base_url.rstrip("/"), judge.model, judge.request, messages]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def confirm(judge, asked):
    """Refuse to start calls that the settings do not allow, and say how many they are."""
    if judge.confirm_calls < len(asked):
        tokens = sum(len(m["content"]) for messages in asked for m in messages) // 4  # about 4 characters a token
        raise UserError(
            f"judge: {len(asked):,} calls to {judge.model} at {judge.base_url} are needed (about {tokens:,} tokens in, "
            f"{10 * len(asked):,} out) and judge.confirm_calls = {judge.confirm_calls}; set it to {len(asked)} to start"
        )


def key(judge):
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


def ask_all(endpoint, new, path, show):
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
