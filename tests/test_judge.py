"""The judge: in range, in order, valid on unseen texts; and an endpoint that is down, slow, rude or talks nonsense."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import small_models
from transformers import LlamaConfig

from lib import artifacts, big5, chat, endpoint, judge, opinions, paths, profiles
from lib.errors import UserError

KEY = "sk-very-secret"


def reply(content):
    """A chat completion that says `content`."""
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


def rated(text):
    """The score that the test's endpoint gives to "text 17": 17 modulo 5, plus 1."""
    return int(re.search(r"\d+", text).group()) % 5 + 1


def good(text, nth):
    return reply(json.dumps({"score": rated(text)}))


class Server:
    """A chat endpoint of our own. `act(text, nth)` decides on the nth (0, 1, ...) call about a text.

    It gives (status, headers, body), or a callable that gets the request handler and does what it likes.
    """

    def __init__(self, act):
        self.calls, self.bodies, self.paths, self.keys, self.times = [], [], set(), set(), []
        self.running = self.most = 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = re.search(r"-{10}\n(.*)\n-{10}", body["messages"][-1]["content"], re.S).group(1)
                with lock:
                    nth = server.calls.count(text)
                    server.calls.append(text)
                    server.bodies.append(body)
                    server.times.append(time.monotonic())
                    server.paths.add(self.path)
                    server.keys.add(self.headers["Authorization"])
                    server.running += 1
                    server.most = max(server.most, server.running)
                try:
                    done = act(text, nth)
                finally:
                    with lock:  # before the reply is sent: once it is read, the next call may be here at once
                        server.running -= 1
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send(*done) if isinstance(done, tuple) else done(self)

            def send(self, status, headers, content):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    """Start endpoints that act as told; all are closed afterwards."""
    started = []

    def start(act=good):
        started.append(Server(act))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def configured(server, **own):
    values = {"kind": "openai", "model": "m", "base_url": getattr(server, "url", server), "key_variable": "JUDGE_KEY"}
    values |= {"timeout_s": 5.0, "retries": 2, "wait_s": 0.01, "concurrency": 3, "confirm_calls": 1000} | own
    return profiles.load("smoke", overrides={f"judge.{k}": v for k, v in values.items()})


def texts(n):
    return [f"text {i}" for i in range(n)]


def ask(settings, n, trait="openness"):
    return judge.score(settings, texts(n), [trait] * n, show=False)


def refused(settings, *words, n=3):
    """The one line that scoring n texts ends with, after checking that it holds these words."""
    with pytest.raises(UserError) as caught:
        ask(settings, n)
    line = str(caught.value)
    assert "\n" not in line
    assert KEY not in line
    for word in words:
        assert word in line, line
    return line


class TestReplies:
    @pytest.mark.parametrize(
        "said",
        [
            *("", "3", "null", "{}", "[]", None, 3, ["score"], "[" * 10**5),
            *('{"score": 0}', '{"score": 6}', '{"score": 3.5}', '{"score": 3.0}', '{"score": "3"}', '{"score": true}'),
            *(
                '{"score": NaN}',
                '{"score": [3]}',
                '{"Score": 3}',
                '{"score": 3, "why": "x"}',
                '{"score": 1, "score": 5}',
            ),
            *('[{"score": 3}]', '[["score", 3]]', '```json\n{"score": 3}\n```', 'Sure! {"score": 3}'),
            '{"score": ' + "9" * 5000 + "}",
        ],
        ids=lambda said: str(said)[:25],
    )
    def test_nothing_but_one_whole_score_is_taken(self, said):
        assert endpoint.parse(said) is None

    def test_a_score_is_taken(self):
        assert [endpoint.parse(f' {{"score": {n}}}\n') for n in range(1, 6)] == [1, 2, 3, 4, 5]


class TestEndpoint:
    def test_scores_come_in_the_order_of_the_texts(self, places, serve):
        def slow_first(text, nth):
            time.sleep(0.05 if rated(text) == 1 else 0)
            return good(text, nth)

        server = serve(slow_first)
        found = ask(configured(server), 23)
        assert found.tolist() == [rated(t) for t in texts(23)]
        assert found.dtype == float
        assert 1 < server.most <= 3  # at once, but no more than allowed
        assert server.paths == {"/v1/chat/completions"}
        assert server.keys == {f"Bearer {KEY}"}

    def test_what_is_asked(self, places, serve):
        server = serve()
        wily = 'Braces {x} and $cash 5 and "quotes" 😄 \ud800'
        judge.score(configured(server), [wily], ["neuroticism"], show=False)
        body = server.bodies[0]
        assert body["model"] == "m"
        assert body["temperature"] == 0
        assert server.calls == [wily.replace("\ud800", "?")]
        asked = body["messages"][-1]["content"]
        assert all(word in asked for word in big5.TRAITS[-1].adjectives)
        assert "neuroticism" not in json.dumps(body).lower()  # adjectives are judged, not a trait's name

    def test_one_call_for_a_text_that_comes_twice_but_one_for_each_trait(self, places, serve):
        server = serve()
        settings = configured(server)
        found = judge.score(settings, ["text 1"] * 4, ["openness", "neuroticism"] * 2, show=False)
        assert found.tolist() == [2, 2, 2, 2]
        assert len(server.calls) == 2
        assert judge.score(settings, [], [], show=False).shape == (0,)

    def test_a_second_run_makes_no_call(self, places, serve, monkeypatch):
        server = serve()
        first = ask(configured(server), 7)
        monkeypatch.delenv("JUDGE_KEY")  # nor does it need a key or leave to call
        assert np.array_equal(ask(configured(server, confirm_calls=0), 7), first)
        assert len(server.calls) == 7
        refused(configured(server, model="other"), "JUDGE_KEY")  # another model's scores are others

    def test_it_goes_on_from_whole_lines_of_a_torn_cache(self, places, serve):
        server = serve()
        settings = configured(server)
        first = ask(settings, 6)
        path = endpoint.cache(settings)
        whole = path.read_bytes()
        odd = b'{"id": 3}\n[]\nnull\n{"id": [], "score": 2}\n\xff\xfe\n'
        path.write_bytes(odd + whole[: whole.rindex(b"score")])  # cut in the last line
        assert np.array_equal(ask(settings, 6), first)
        assert len(server.calls) == 7
        assert np.array_equal(ask(settings, 6), first)
        assert len(server.calls) == 7  # the line after the torn one is whole

    @pytest.mark.parametrize(
        "trouble",
        [
            (500, {}, "oops"),
            (503, {"Retry-After": "0"}, '{"error": {"message": "busy"}}'),
            (429, {"Retry-After": "soon"}, "{}"),
            (200, {}, '{"choices": [{"mess'),
            (200, {}, '{"choices": []}'),
            (200, {}, "<html>welcome</html>"),
            (200, {"Content-Encoding": "gzip"}, "this is no gzip"),
            reply('{"score": 9}'),
            reply("I would say 4 out of 5."),
            reply(None),
            lambda handler: handler.connection.close(),
            lambda handler: time.sleep(0.6),
        ],
    )
    def test_a_passing_trouble_is_tried_again(self, places, serve, trouble):
        server = serve(lambda text, nth: trouble if nth == 0 and rated(text) == 2 else good(text, nth))
        assert ask(configured(server, timeout_s=0.3), 5).tolist() == [1, 2, 3, 4, 5]
        assert len(server.calls) == 6

    def test_a_rate_limit_holds_all_calls_for_as_long_as_it_says(self, places, serve):
        server = serve(lambda text, nth: (429, {"Retry-After": "1"}, "{}") if nth == 0 else good(text, nth))
        assert ask(configured(server, concurrency=2), 2).tolist() == [1, 2]
        assert server.times[2] - server.times[0] >= 0.99

    def test_a_rate_limit_may_name_a_date(self):
        assert endpoint.seconds("7") == 7
        assert 55 < endpoint.seconds(formatdate(time.time() + 60, usegmt=True)) <= 60
        assert [endpoint.seconds(v) for v in (None, "", "x", "-5", formatdate(0, usegmt=True))] == [0] * 5

    def test_waits_double(self, places, serve):
        server = serve(lambda text, nth: (500, {}, "") if nth < 3 else good(text, nth))
        ask(configured(server, retries=3, wait_s=0.1), 1)
        waits = np.diff(server.times)
        assert np.all(waits >= 0.75 * 0.1 * 2.0 ** np.arange(3))


class TestEndpointThatCannotBeUsed:
    def test_it_tells_how_many_calls_before_making_one(self, places, serve):
        server = serve()
        refused(configured(server, confirm_calls=9), "10 calls", "tokens", "judge.confirm_calls = 9", n=10)
        assert not server.calls
        ask(configured(server, confirm_calls=9), 9)
        ask(configured(server, confirm_calls=1), 10)  # one is missing
        assert len(server.calls) == 10

    def test_a_check_before_all_work_counts_the_calls_of_answers_and_labelled_texts(self, places, serve):
        server = serve()
        given = pd.DataFrame({"answer": ["a", "b", "a"], "trait": ["openness", "openness", "openness"]})
        labelled = pd.DataFrame({"answer": ["c", "d"], "trait": ["openness", "neuroticism"]})
        with pytest.raises(UserError, match=r"^judge: 6 calls"):  # "a" and "b", and two texts for two traits
            judge.check(configured(server, confirm_calls=5), given, labelled)
        judge.check(configured(server, confirm_calls=6), given, labelled)
        assert not server.calls

    def test_no_key(self, places, serve, monkeypatch):
        server = serve()
        monkeypatch.setenv("JUDGE_KEY", " \n")
        refused(configured(server), "no key", "JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "sk-ключ")
        refused(configured(server), "JUDGE_KEY", "odd characters")
        assert not server.calls

    @pytest.mark.parametrize("address", ["api.host.org/v1", "ftp://host/v1", "http://", "http://[::1", ""])
    def test_no_address(self, places, address):
        refused(configured(address), "judge.base_url")

    def test_down(self, places, serve):
        server = serve()
        server.close()
        # a wrong address is not tried again and again: with such waits the test would never end
        refused(configured(server, retries=9, wait_s=300.0), "cannot be reached", server.url, "judge.base_url")

    @pytest.mark.parametrize(("status", "word"), [(401, "JUDGE_KEY"), (403, "may not use m"), (404, "judge.base_url")])
    def test_a_refusal_is_not_repeated_and_does_not_show_the_key(self, places, serve, status, word):
        body = json.dumps({"error": {"message": f"bad key\n{KEY}\x1b[31m"}})
        server = serve(lambda text, nth: (status, {}, body))
        line = refused(configured(server), str(status), word, "bad key ***")
        assert line.isprintable()
        assert len(server.calls) <= 3

    @pytest.mark.parametrize("status", [302, 400, 418])
    def test_other_refusals(self, places, serve, status):
        server = serve(lambda text, nth: (status, {"Location": "http://127.0.0.1:1/"}, '{"error": "no"}'))
        refused(configured(server), str(status), "judge.request")

    def test_errors_without_end(self, places, serve):
        server = serve(lambda text, nth: (502, {}, "bad gateway"))
        refused(configured(server, concurrency=1), "502", "3 tries")
        assert len(server.calls) == 3

    def test_nonsense_without_end_keeps_what_was_scored(self, places, serve):
        server = serve(lambda text, nth: reply("banana") if text == "text 4" else good(text, nth))
        settings = configured(server, concurrency=1)
        refused(settings, "3 tries", "judge.model", "kept", n=6)
        kept = [json.loads(line)["score"] for line in endpoint.cache(settings).read_text().splitlines()]
        assert kept[:4] == [1, 2, 3, 4]

    def test_one_declined_text_in_a_hundred_is_left_out_and_reported(self, places, serve, capsys):
        server = serve(lambda text, nth: reply("I decline.") if text == "text 7" else good(text, nth))
        settings = configured(server, concurrency=8, retries=1)
        found = ask(settings, 100)
        assert np.flatnonzero(np.isnan(found)).tolist() == [7]
        assert "1 of 100" in capsys.readouterr().out

    def test_a_wait_of_hours_is_not_waited_for(self, places, serve):
        server = serve(lambda text, nth: (429, {"Retry-After": "7200"}, '{"error": {"message": "quota"}}'))
        refused(configured(server), "7200 s", "quota", "kept")

    def test_a_reply_that_drips_or_never_ends(self, places, serve):
        def pour(piece, seconds):
            def act(handler):
                handler.send_response(200)
                handler.end_headers()
                for _ in range(300):
                    handler.wfile.write(piece)
                    time.sleep(seconds)

            return act

        drips = serve(lambda text, nth: pour(b" ", 0.02))
        refused(configured(drips, timeout_s=0.2, retries=1), "judge.timeout_s", n=1)
        pours = serve(lambda text, nth: pour(b" " * 2**16, 0))
        refused(configured(pours, retries=0), "without end", n=1)

    def test_a_failed_run_stops_calling(self, places, serve):
        server = serve(lambda text, nth: (401, {}, "{}") if text == "text 3" else good(text, nth))
        refused(configured(server, concurrency=1), "401", n=200)
        assert len(server.calls) < 20


class TestInterrupted:
    def test_ctrl_c_keeps_every_score_that_came(self, places, serve):
        struck = threading.Event()

        def stop(text, nth):
            if text == "text 5" and nth == 0:
                os.kill(os.getpid(), signal.SIGINT)
                struck.set()
            if struck.is_set():  # a slow machine takes its time to notice
                time.sleep(0.3)
            return good(text, nth)

        server = serve(stop)
        settings = configured(server, concurrency=2)
        with pytest.raises(KeyboardInterrupt):
            ask(settings, 50)
        struck.clear()
        made = len(server.calls)
        assert 5 < made < 50
        assert len(endpoint.cache(settings).read_text().splitlines()) == made
        assert ask(settings, 50).tolist() == [rated(t) for t in texts(50)]
        assert len(server.calls) == 50

    def test_killed_without_warning(self, places, serve):
        """Kept is what was answered to the process before it was killed, and only the rest is asked again."""
        sixth = threading.Event()

        def hang(text, nth):
            if text == "text 6" and nth == 0:
                sixth.set()
                time.sleep(1)
            return good(text, nth)

        server = serve(hang)
        settings = configured(server, concurrency=1)
        code = (
            "import sys; from pathlib import Path; from lib import judge, paths, profiles; import json;"
            "paths.RESULTS = Path(sys.argv[1]); s = profiles.load('smoke', overrides=json.loads(sys.argv[2]));"
            "judge.score(s, [f'text {i}' for i in range(9)], ['openness'] * 9, show=False)"
        )
        arguments = [sys.executable, "-c", code, str(paths.RESULTS), json.dumps(settings.overrides)]
        with subprocess.Popen(arguments, cwd=paths.ROOT, env=os.environ | {"PYTHONPATH": str(paths.ROOT)}) as run:
            assert sixth.wait(60)
            run.kill()
        assert len(endpoint.kept(endpoint.cache(settings))) == 6
        assert ask(settings, 9).tolist() == [rated(t) for t in texts(9)]
        assert len(server.calls) == 10


class TestLocal:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory):
        """A random Llama with room for the question."""
        tokenizer = small_models.byte_level_tokenizer()
        config = LlamaConfig(vocab_size=len(tokenizer), **small_models.SMALL | {"max_position_embeddings": 2048})
        return str(small_models.write_model(tmp_path_factory.mktemp("judge") / "random", config, tokenizer))

    @pytest.fixture
    def settings(self, places, model):
        own = {"judge.kind": "local", "judge.model": model, "judge.max_new_tokens": 4, "chat.precision": "fp32"}
        return profiles.load("smoke", overrides=own)

    def test_a_model_that_gives_no_score_leaves_gaps_and_says_so(self, settings, capsys):
        assert np.isnan(ask(settings, 2)).all()
        assert "2 of 2 texts have no score" in capsys.readouterr().out

    def test_a_reply_without_score_is_asked_for_once_more(self, settings, monkeypatch):
        asked = []

        def answer(loaded, questions, **options):
            asked.append((questions, options))
            first = ['{"score": 4}', "Gladly!", "Four."]
            return pd.DataFrame({"answer": first if len(asked) == 1 else ['{"score": 2}', "Four, I said."]})

        monkeypatch.setattr(chat, "answer", answer)
        found = ask(settings, 3)
        assert found[:2].tolist() == [4, 2]
        assert np.isnan(found[2])
        assert [len(q) for q, _ in asked] == [3, 2]
        assert "JSON object alone" in asked[1][0][0]
        assert asked[1][0][0].startswith(asked[0][0][1])
        assert all(o["temperature"] == 0 for _, o in asked)

    def test_a_model_that_is_not_there(self, settings, tmp_path):
        nowhere = settings.overrides | {"judge.model": str(tmp_path / "none")}
        refused(profiles.load("smoke", overrides=nowhere), "no such folder")


class TestEmbedding:
    @pytest.fixture(scope="class")
    def settings(self, tmp_path_factory):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paths, "RESULTS", tmp_path_factory.mktemp("results"))
            yield profiles.load("smoke", overrides={"judge.kind": "embedding", "judge.calibration_topics": 60})

    @pytest.fixture(scope="class")
    def held_out(self):
        """200 bundled test rows: 40 topics that no train row is about."""
        rows = opinions.read_csv(paths.OPINIONS / "test.csv")
        return rows[rows["topic"].isin(rows["topic"].unique()[:40])].reset_index(drop=True)

    def test_own_texts_score_higher_on_topics_not_seen(self, settings, held_out):
        table = judge.validity(settings, held_out, show=False).set_index("trait")
        assert list(table.index) == [*big5.NAMES, "all"]
        assert table.loc["all", "n"] == 1000
        assert table.loc["all", "rho"] > 0.4
        assert table["rho"].min() > 0.2
        assert table["auc"].min() > 0.65
        assert (table["own"] > table["other"]).all()

    def test_validity_on_published_texts(self, settings, real):
        rows = opinions.read_csv(real / "personalityedit_dev.csv").head(180)
        table = judge.validity(settings, rows, show=False).set_index("trait")
        assert list(table.index) == ["extraversion", "agreeableness", "neuroticism", "all"]
        assert table["rho"].min() > 0.4

    def test_scores_are_in_range_the_same_again_and_independent_of_order(self, settings, held_out):
        strange = ["", " ", "😄", "a", "word " * 999, "\ud800", "anxious", "No."]
        some = [*strange, *held_out["answer"][:40]]
        own = [big5.NAMES[i % 5] for i in range(len(some))]
        found = judge.score(settings, some, own, show=False)
        assert np.isfinite(found).all()
        assert found.min() >= 1
        assert found.max() <= 5
        assert np.array_equal(judge.score(settings, some, own, show=False), found)
        order = np.random.default_rng(0).permutation(len(some))
        mixed = judge.score(settings, [some[i] for i in order], [own[i] for i in order], show=False)
        np.testing.assert_allclose(mixed, found[order], atol=1e-3)
        alone = judge.score(settings, some[-1:], own[-1:], show=False)
        np.testing.assert_allclose(alone, found[-1:], atol=1e-3)

    def test_closer_to_the_adjectives_never_scores_lower(self, settings):
        fitted = judge.calibrated(settings)
        own = judge._anchors(judge._prompts())[1]
        rng = np.random.default_rng(0)
        cosine = rng.uniform(-0.2, 0.6, (50, own.shape[1]))
        before = judge.expected(cosine, fitted)
        for i in range(len(big5.NAMES)):
            nearer = judge.expected(cosine + own[i] * rng.uniform(0, 0.2, cosine.shape), fitted)
            assert (nearer[:, i] >= before[:, i] - 1e-9).all()
            assert nearer[:, i].mean() > before[:, i].mean()
            assert (np.delete(nearer, i, 1) <= np.delete(before, i, 1) + 1e-9).all()

    def test_the_more_of_a_text_is_in_a_traits_voice_the_higher(self, settings, held_out):
        by_trait = {t: list(held_out.loc[held_out["trait"] == t, "answer"]) for t in big5.NAMES}
        for one, other in zip(big5.NAMES, [*big5.NAMES[1:], big5.NAMES[0]], strict=True):
            mixes = [[o + " " + o2, o + " " + p, p + " " + p2] for o, o2, p, p2 in self.fours(by_trait, one, other)]
            scores = [
                judge.score(settings, list(c), [one] * len(c), show=False).mean() for c in zip(*mixes, strict=True)
            ]
            assert scores[0] < scores[1] < scores[2]

    @staticmethod
    def fours(by_trait, one, other):
        return zip(by_trait[other][::2], by_trait[other][1::2], by_trait[one][::2], by_trait[one][1::2], strict=True)

    def test_the_fit_finds_a_planted_rule(self):
        rng = np.random.default_rng(0)
        own = np.eye(5, dtype=bool).repeat(2, axis=1)
        labels = np.eye(5, dtype=bool)[rng.integers(5, size=500)]
        cosine = 0.2 + 0.1 * (labels @ own) + rng.normal(0, 0.02, (500, 10))
        fitted = judge.fit(cosine, labels, own)
        assert (judge.expected(cosine, fitted).argmax(1) == labels.argmax(1)).all()
        assert (fitted["weights"][own] >= 0).all()
        assert (fitted["weights"][~own] <= 0).all()

    def test_the_calibration_is_kept_and_rests_on_train_rows(self, settings, monkeypatch):
        read = []
        real = opinions.read_csv
        monkeypatch.setattr(judge.opinions, "read_csv", lambda path: read.append(path.name) or real(path))
        monkeypatch.setattr(judge.paths, "RESULTS", paths.RESULTS / "again")
        few = profiles.load("smoke", overrides=settings.overrides | {"judge.calibration_topics": 10})
        first = judge.calibrated(few)
        assert read == ["train.csv"]
        assert artifacts.intact(next((paths.RESULTS / "smoke").glob("judge-*")))
        again = judge.calibrated(few)
        assert read == ["train.csv"]
        assert all(np.array_equal(first[k], again[k]) for k in first)

    def test_fifteen_texts(self, settings, held_out):
        table = judge.sensitivity(settings, held_out, show=False)
        assert table["trait"].value_counts().to_dict() == dict.fromkeys(big5.NAMES, 3)
        assert set(table["answer"]) <= set(held_out["answer"])
        row = table.iloc[4]
        others = [row[t] for t in big5.NAMES if t != row["trait"]]
        assert row["gap"] == pytest.approx(row[row["trait"]] - np.mean(others))
        assert table["gap"].mean() > 0.3
        pd.testing.assert_frame_equal(table, judge.sensitivity(settings, held_out, show=False))


def test_a_validity_table_of_one_trait_or_of_equal_scores_has_gaps(monkeypatch):
    rows = pd.DataFrame({"trait": ["openness", "neuroticism"] * 3, "answer": list("abcdef")})
    monkeypatch.setattr(judge, "against", lambda s, texts, traits, show: np.full((len(texts), len(traits)), 3.0))
    equal = judge.validity(None, rows)
    assert equal["rho"].isna().all()
    assert equal["auc"].eq(0.5).all()
    assert judge.validity(None, rows[::2])["auc"].isna().all()


@pytest.mark.parametrize(
    ("text", "words"),
    [("question = [", "cannot be read"), ('system = "x"', "has no question"), (None, "cannot be read")],
)
def test_damaged_prompts_are_one_line(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(judge, "PROMPTS", tmp_path / "pae.toml")
    if text is not None:
        judge.PROMPTS.write_text(text, "utf-8")
    with pytest.raises(UserError, match=f"^data/prompts/pae.toml: {words}.*restore") as caught:
        judge.check(profiles.load("smoke"), pd.DataFrame(), pd.DataFrame())
    assert "\n" not in str(caught.value)
