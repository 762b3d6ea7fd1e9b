"""The endpoint misbehaves in every way seen in the wild; answers are kept, counted and paid for once."""

import contextlib
import email.utils
import http.server
import json
import logging
import math
import os
import pathlib
import re
import socket
import threading
import time

import numpy as np
import pytest

from gvjax.judges import cache, llm
from gvjax.judges.endpoint import (
    Account,
    Budget,
    BudgetError,
    Client,
    Endpoint,
    JudgeError,
)
from gvjax.judges.llm import Comparison, Judgement, LlmJudge, Template

KEY = "sk-secret-0123456789"
SHOWN = re.compile(r"<first>(.*)</first><second>(.*)</second>", re.DOTALL)
TEMPLATE = Template(
    (("user", "{prompt}<first>{first}</first><second>{second}</second>"),), tie="tie"
)


def reply(text, *, finish="stop", usage=(7, 3)):
    body = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
    if usage is not None:
        body["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), usage))
    return 200, {}, json.dumps(body).encode()


def longer_wins(first, second, count):
    letter = (
        "A" if len(first) > len(second) else "B" if len(second) > len(first) else "tie"
    )
    return reply(f"The longer one.\nPreferred: {letter}")


class Server:
    """A chat endpoint on 127.0.0.1 whose `behave(first, second, count)` gives (status, headers, body) or closes."""

    def __init__(self, behave):
        outer = self
        self.bodies, self.keys, self.at, self.most = [], [], [], 0
        self._in_the_air, self._lock = 0, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.bodies.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.at.append(time.monotonic())
                    count = len(outer.bodies)
                    outer._in_the_air += 1
                    outer.most = max(outer.most, outer._in_the_air)
                try:
                    assert self.path == "/v1/chat/completions"
                    first, second = SHOWN.search(
                        body["messages"][-1]["content"]
                    ).groups()
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        self._answer(behave(first, second, count))
                finally:
                    with outer._lock:
                        outer._in_the_air -= 1

            def _answer(self, answer):
                if answer == "hang up":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, headers, body = answer
                drip = headers.pop("drip", 0)
                self.send_response(status)
                self.send_header(
                    "Content-Length", headers.pop("Content-Length", len(body))
                )
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for at in range(len(body)) if drip else ():
                    self.wfile.write(body[at : at + 1])
                    time.sleep(drip)
                if not drip:
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.01}
        )

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def make(server, cache, **changes):
    endpoint = {
        "timeout": 2.0,
        "attempts": 3,
        "backoff": 0.01,
        "longest_wait": 1.0,
        **changes.pop("endpoint", {}),
    }
    changes = {"budget": Budget(calls=200), "template": TEMPLATE, **changes}
    return LlmJudge(Endpoint(server.url, "tiny", **endpoint), cache=cache, **changes)


PAIRS = [
    Comparison("p", "long one", "short"),
    Comparison("p", "x", "xyz"),
    Comparison("p", "abc", "xyz"),
    Comparison("q", "same", "same"),
]


def files(folder):
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


def test_both_orders_are_asked_and_averaged(tmp_path):
    seen = []
    with Server(longer_wins) as server:
        found = make(server, tmp_path)(PAIRS, progress=lambda *at: seen.append(at))
    np.testing.assert_array_equal(found.scores, [1.0, 0.0, 0.5, 0.5])
    assert found.judgements[3] == Judgement(0.5, 0.5, asked=False)
    assert len(server.bodies) == found.requests == found.spent.calls == 6
    assert found.spent.tokens == 6 * 10
    assert seen == [(done, 6) for done in range(1, 7)]
    assert found.failures == {}
    a_first, b_first = found.orders
    np.testing.assert_array_equal(a_first, [1.0, 0.0, 0.5])
    np.testing.assert_array_equal(b_first, [1.0, 0.0, 0.5])


def test_a_judge_that_always_takes_the_first_says_nothing(tmp_path):
    with Server(lambda *_: reply("Preferred: A")) as server:
        found = make(server, tmp_path)(PAIRS[:2])
    np.testing.assert_array_equal(found.scores, [0.5, 0.5])
    a_first, b_first = found.orders
    np.testing.assert_array_equal(a_first, [1.0, 1.0])
    np.testing.assert_array_equal(b_first, [0.0, 0.0])


def test_what_was_answered_is_not_asked_again(tmp_path):
    with Server(longer_wins) as server:
        first = make(server, tmp_path)(PAIRS)
        again = make(server, tmp_path)([*PAIRS, *PAIRS])
        assert len(server.bodies) == 6
        np.testing.assert_array_equal(again.scores, [*first.scores, *first.scores])
        assert (again.spent.calls, again.spent.cached, again.requests) == (0, 6, 6)
        # Another question is another entry.
        make(server, tmp_path, endpoint={"options": {"temperature": 1}})(PAIRS[:1])
        make(server, tmp_path)([Comparison("other", "long one", "short")])
        assert len(server.bodies) == 10
    assert not [path for path in files(tmp_path) if path.suffix != ".json"]


def test_results_keep_their_order_and_requests_their_bound(tmp_path):
    pairs = [Comparison("p", "x" * (1 + i % 3), f"{i:02}") for i in range(20)]

    def slow(first, second, count):
        time.sleep(0.01 * (count % 3))
        return longer_wins(first, second, count)

    with Server(slow) as server:
        found = make(server, tmp_path, workers=3)(pairs)
    assert 1 < server.most <= 3
    expected = [(np.sign(len(p.a) - len(p.b)) + 1) / 2 for p in pairs]
    np.testing.assert_array_equal(found.scores, expected)


@pytest.mark.parametrize(
    "trouble",
    [
        (500, {}, b"oh no"),
        (503, {"Retry-After": "0"}, b""),
        (429, {}, b"slow down"),
        (200, {}, b"<html>not json</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": 3}}]}'),
        (200, {}, b"[]"),
        (200, {"Content-Length": 1000}, b'{"choices"'),
        "hang up",
    ],
    ids=str,
)
def test_passing_trouble_is_tried_again(trouble, tmp_path):
    def behave(first, second, count):
        if count > 2:
            return longer_wins(first, second, count)
        return (
            trouble
            if isinstance(trouble, str)
            else (*trouble[:1], {**trouble[1]}, trouble[2])
        )

    with Server(behave) as server:
        found = make(server, tmp_path, workers=1, endpoint={"timeout": 5.0})(PAIRS[:1])
    assert found.scores == [1.0]
    assert found.spent.calls == len(server.bodies) == 4
    assert len(files(tmp_path)) == 2


def test_trouble_that_stays_is_counted_not_kept(tmp_path):
    with Server(lambda *_: (500, {}, b"oh no")) as server:
        found = make(server, tmp_path, max_failure_share=1.0)(PAIRS[:2])
        assert found.failures == {"no answer": 4}
        assert len(server.bodies) == 4 * 3
        assert np.isnan(found.scores).all()
        assert [part.size for part in found.orders] == [0, 0]
        with pytest.raises(JudgeError, match=r"no answer.*HTTP 500.*oh no.*3 attempts"):
            make(server, tmp_path)(PAIRS[:1])
    assert not files(tmp_path)


def test_silence_and_drip_feeding_end(tmp_path):
    def silent(first, second, count):
        if count == 1:
            time.sleep(1.2)
        status, headers, body = longer_wins(first, second, count)
        return status, {"drip": 0.05} if count == 2 else headers, body

    with Server(silent) as server:
        start = time.monotonic()
        found = make(server, tmp_path, workers=1, endpoint={"timeout": 0.8})(PAIRS[:1])
        assert time.monotonic() - start < 50
    assert found.scores == [1.0]
    assert len(server.bodies) == 4


def test_nobody_listens(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = Server.__new__(Server)
        server.url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match="refused"):
            make(server, tmp_path)(PAIRS[:1])


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_holds_everybody_back(as_date, tmp_path):
    def behave(first, second, count):
        if count > 1:
            return longer_wins(first, second, count)
        # A date has whole seconds, so it is the longer wait.
        after = (
            email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "0.4"
        )
        return 429, {"Retry-After": after}, b""

    with Server(behave) as server:
        found = make(server, tmp_path, workers=1, endpoint={"longest_wait": 3.0})(
            PAIRS[:2]
        )
    np.testing.assert_array_equal(found.scores, [1.0, 0.0])
    waited = server.at[1] - server.at[0]
    assert (0.9 if as_date else 0.4) <= waited < 3
    assert server.at[2] - server.at[1] < 0.3


def test_too_long_a_wait_is_refused(tmp_path):
    with (
        Server(lambda *_: (429, {"Retry-After": "3600"}, b"")) as server,
        pytest.raises(JudgeError, match=r"3600 s.*longest_wait"),
    ):
        make(server, tmp_path)(PAIRS)


def test_waits_grow_and_are_random():
    waits = []

    class Stop:
        def wait(self, seconds):
            waits.append(seconds)

    endpoint = Endpoint("http://127.0.0.1/v1", "m", backoff=1.0, longest_wait=4.0)
    client = Client(endpoint, Account(Budget(), pathlib.Path("cache")))
    for attempt in (1, 2, 3, 4, 5):
        client._pause(attempt, None, Stop())
    for wait, longest in zip(waits, (1, 2, 4, 4, 4)):
        assert longest / 2 <= wait <= longest
    assert waits[3] != waits[4]


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_turned_down_key_or_address_stops_at_once(status, tmp_path):
    headers = {"Location": "http://127.0.0.1:9/elsewhere"} if status == 302 else {}
    with (
        Server(lambda *_: (status, {**headers}, b"no")) as server,
        pytest.raises(JudgeError, match=f"HTTP {status}.*key_variable"),
    ):
        make(server, tmp_path, workers=1)(PAIRS)
    assert len(server.bodies) == 1


def test_once_stopped_nobody_tries_again(tmp_path):
    def behave(first, second, count):
        if first == "short":
            return 401, {}, b"no"
        return 500, {}, b""

    with Server(behave) as server:
        patient = {"backoff": 0.5, "attempts": 8}
        with pytest.raises(JudgeError, match="HTTP 401"):
            make(server, tmp_path, workers=2, endpoint=patient)(PAIRS[:1])
        assert len(server.bodies) <= 4


def test_a_refused_request_is_counted_without_asking_again(tmp_path):
    with Server(lambda *_: (400, {}, b"too long")) as server:
        found = make(server, tmp_path, max_failure_share=1.0)(PAIRS[:1])
    assert found.failures == {"refused": 2}
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "said",
    [
        "",
        "A",
        "Preferred: C",
        "Preferred: a",
        "Preferred: A.",
        "Preferred: **A**",
        "Preferred: A or B",
        "preferred: A",
        "Preferred: A\nPreferred: B",
        "Preferred: A\nPreferred: A",
        "Preferred: A\nI hope this helps.",
        "I think Preferred: A",
        None,
    ],
    ids=repr,
)
def test_other_answers_are_counted_not_guessed(said, tmp_path):
    with Server(lambda *_: reply(said)) as server:
        judge = make(server, tmp_path, max_failure_share=1.0)
        found = judge(PAIRS[:1])
        assert found.failures == {"unreadable": 2}
        assert np.isnan(found.scores).all()
        # It was paid for, and asking again would say it again.
        assert judge(PAIRS[:1]).failures == {"unreadable": 2}
        assert len(server.bodies) == 2


def test_a_truncated_answer_is_a_failure_whatever_it_says(tmp_path):
    with Server(lambda *_: reply("Preferred: A", finish="length")) as server:
        found = make(server, tmp_path, max_failure_share=1.0)(PAIRS[:1])
    assert found.failures == {"truncated": 2}


def test_a_failed_order_leaves_the_pair_out(tmp_path):
    def behave(first, second, count):
        return reply("Preferred: A" if first == "x" else "both are nice")

    with Server(behave) as server:
        found = make(server, tmp_path, max_failure_share=0.5)(PAIRS[1:2])
        assert found.judgements == (Judgement(1.0, None),)
        assert math.isnan(found.scores[0])
        with pytest.raises(
            JudgeError, match=r"1 of 2 .*49.0% allowed: 1 unreadable.*nice"
        ):
            make(server, tmp_path, max_failure_share=0.49)(PAIRS[1:2])


def test_too_many_failures_stop_early(tmp_path):
    pairs = [Comparison("p", f"{i}", "none") for i in range(50)]
    with (
        Server(lambda *_: reply("what?")) as server,
        pytest.raises(JudgeError, match="of 100 requests"),
    ):
        make(server, tmp_path, workers=2)(pairs)
    assert 6 <= len(server.bodies) < 20


def test_a_budget_of_calls_is_kept_exactly_and_what_was_paid_for_stays(tmp_path):
    pairs = [Comparison("p", f"{i}", "longer") for i in range(10)]
    with Server(longer_wins) as server:
        for budget in (7, 7):
            with pytest.raises(BudgetError, match="budget of 7 calls is spent"):
                make(server, tmp_path, budget=Budget(calls=budget), workers=4)(pairs)
        assert len(server.bodies) == len(files(tmp_path)) == 14
        found = make(server, tmp_path, budget=Budget(calls=6), workers=4)(pairs)
        assert (found.spent.calls, found.spent.cached) == (6, 14)
        np.testing.assert_array_equal(found.scores, np.zeros(10))


def test_a_budget_outlives_the_process_where_it_is_written_down(tmp_path):
    pairs = [Comparison("?", "a" * i, "b" * i) for i in range(1, 11)]
    ledger = tmp_path / "ledger.json"
    with Server(longer_wins) as server:

        def judge(calls):
            (tmp_path / "cache").mkdir(exist_ok=True)
            budget = Budget(calls=calls)
            return make(
                server, tmp_path / "cache", budget=budget, workers=1, ledger=ledger
            )

        for _ in range(3):
            with pytest.raises(BudgetError, match=r"budget of 7 calls is spent \(7"):
                judge(7)(pairs)
            assert len(server.bodies) == 7
        more = judge(20)
        more(pairs)
        assert len(server.bodies) == 20 and more.spent.calls == 13
    ledger.write_text("{")
    with pytest.raises(ValueError, match="what judging has cost, is damaged"):
        judge(20)


def test_retries_are_calls(tmp_path):
    with (
        Server(lambda *_: (500, {}, b"")) as server,
        pytest.raises(BudgetError),
    ):
        make(server, tmp_path, budget=Budget(calls=2), workers=1)(PAIRS)
    assert len(server.bodies) == 2


@pytest.mark.parametrize("usage", [(7, 3), None])
def test_a_budget_of_tokens(usage, tmp_path):
    with Server(lambda *_: reply("Preferred: A", usage=usage)) as server:
        judge = make(server, tmp_path, budget=Budget(tokens=15), workers=1)
        with pytest.raises(BudgetError, match="budget of 15 tokens"):
            judge(PAIRS)
        assert len(server.bodies) == (2 if usage else 1)
        prompt = len(server.bodies[0]["messages"][0]["content"].encode())
        assert judge.spent.tokens == (20 if usage else prompt + len("Preferred: A"))


def test_the_budget_spans_calls_of_the_judge(tmp_path):
    with Server(longer_wins) as server:
        judge = make(server, tmp_path, budget=Budget(calls=4), workers=1)
        judge(PAIRS[:1])
        judge(PAIRS[:1])
        second = judge(PAIRS[1:2])
        assert second.spent.calls == 2 and judge.spent.calls == 4
        with pytest.raises(BudgetError):
            judge(PAIRS[2:3])


def test_the_key_is_sent_and_seen_nowhere(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def echo(first, second, count):
        if count > 2:
            return 401, {}, f"Incorrect API key provided: {KEY}".encode()
        return reply(f"You are {KEY}.\nPreferred: A")

    with Server(echo) as server:
        judge = make(
            server, tmp_path, workers=1, endpoint={"key_variable": "JUDGE_KEY"}
        )
        judge(PAIRS[:1])
        with pytest.raises(
            JudgeError, match=r"Incorrect API key provided: \[key\]"
        ) as raised:
            judge(PAIRS[1:2])
    assert server.keys == [f"Bearer {KEY}"] * len(server.keys)
    entries = files(tmp_path)
    assert len(entries) == 2
    for path in entries:
        assert KEY not in path.read_text()
        assert "uthorization" not in path.read_text()
    parts = [judge, judge._endpoint, judge._client, judge._account]
    shown = [str(raised.value), *map(repr, parts)]
    shown += [repr(vars(part)) for part in parts]
    assert not [
        text for text in [*shown, caplog.text, *capfd.readouterr()] if KEY in text
    ]


def test_a_key_that_cannot_be_sent_is_refused_unseen(tmp_path, monkeypatch):
    for bad in ("", f"{KEY}\n", f"{KEY} x", f"{KEY}é"):
        monkeypatch.setenv("JUDGE_KEY", bad)
        endpoint = Endpoint("http://127.0.0.1/v1", "m", key_variable="JUDGE_KEY")
        with pytest.raises(ValueError, match="JUDGE_KEY") as raised:
            LlmJudge(endpoint, cache=tmp_path, budget=Budget())
        assert KEY not in str(raised.value)


def test_an_address_with_a_secret_is_refused_unseen():
    for url in (f"https://{KEY}@host/v1", f"https://host/v1?api-key={KEY}", f"{KEY}"):
        with pytest.raises(ValueError, match="base_url") as raised:
            Endpoint(url, "m")
        assert KEY not in str(raised.value)


def test_no_key_no_header(tmp_path):
    with Server(longer_wins) as server:
        make(server, tmp_path)(PAIRS[:1])
    assert server.keys == [None, None]


def test_a_damaged_entry_is_named(tmp_path):
    with Server(longer_wins) as server:
        make(server, tmp_path)(PAIRS[:1])
        for text in ("", "{}", "[1]", '{"answer": 3, "finish_reason": null}'):
            files(tmp_path)[0].write_text(text)
            with pytest.raises(ValueError, match="damaged; delete the file"):
                make(server, tmp_path)(PAIRS[:1])


@pytest.mark.parametrize("links", [True, False])
def test_the_first_process_to_write_wins(links, tmp_path, monkeypatch):
    if not links:

        def no_links(*_):
            raise OSError("not here")

        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "ab" / "abc.json"
    path.parent.mkdir()
    one = {"answer": "one", "finish_reason": "stop"}
    two = {"answer": "two", "finish_reason": "stop"}
    assert cache.keep(path, one) == one
    kept = cache.keep(path, two)
    assert kept == cache.read(path) == (one if links else two)
    assert files(tmp_path) == [path]


def test_two_judges_at_once_agree(tmp_path):
    def behave(first, second, count):
        return reply(f"Preferred: {'AB'[count % 2]}")

    pairs = [Comparison("p", f"{i}", "x") for i in range(10)]
    found = {}
    with Server(behave) as server:
        judges = [make(server, tmp_path, workers=4) for _ in range(2)]
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: judges[i](pairs)}))
            for i in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(found[0].scores, found[1].scores)


def test_texts_are_filled_in_once_and_as_they_are():
    texts = {"prompt": "{second} {x}", "first": "{prompt} \\1", "second": "{{first}}"}
    (message,) = TEMPLATE.fill(**texts)
    assert message == {
        "role": "user",
        "content": "{second} {x}<first>{prompt} \\1</first><second>{{first}}</second>",
    }


def test_the_answer_line():
    assert TEMPLATE.read("Both fine.\n\n Preferred: A \n") == 1.0
    assert TEMPLATE.read("Preferred:B") == 0.0
    assert TEMPLATE.read("Preferred: tie") == 0.5
    assert llm.HELPFULNESS.read("Preferred: tie") is None
    assert llm.HELPFULNESS.read("One is longer.\nPreferred: B") == 0.0


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Template((("user", "{prompt} {first}"),)), "never shows second"),
        (lambda: Template(TEMPLATE.messages, second="A"), "answers"),
        (lambda: Template(TEMPLATE.messages, tie=" "), "answers"),
        (lambda: Template(TEMPLATE.messages, marker=" "), "marker"),
        (lambda: Endpoint("ftp://x/v1", "m"), "base_url"),
        (lambda: Endpoint("http://x", "m", options={"n": 2}), r"\['n'\]"),
        (lambda: Endpoint("http://x", "m", options={"a": {1}}), "JSON"),
        (lambda: Endpoint("http://x", "m", timeout=0.0), "timeout"),
        (lambda: Endpoint("http://x", "m", backoff=math.inf), "backoff"),
        (lambda: Endpoint("http://x", "m", longest_wait=-1.0), "longest_wait"),
        (lambda: Endpoint("http://x", "m", attempts=0), "attempts"),
    ],
)
def test_impossible_settings(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_impossible_judges(tmp_path):
    endpoint = Endpoint("http://127.0.0.1/v1", "m")
    for changes, message in (
        ({"max_failure_share": 1.5}, "max_failure_share"),
        ({"workers": 0}, "workers"),
        ({"budget": Budget(calls=-1)}, "calls"),
    ):
        with pytest.raises(ValueError, match=message):
            LlmJudge(endpoint, cache=tmp_path, **{"budget": Budget(), **changes})
