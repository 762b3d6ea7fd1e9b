"""An OpenAI-compatible chat endpoint, what asking it costs, and how patiently that is done.

The key comes from the environment with each request, and is taken out of whatever the endpoint says.
"""

import dataclasses
import email.utils
import http.client
import json
import math
import os
import pathlib
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_REFUSED = frozenset({400, 413, 422})
_RESERVED = frozenset({"messages", "model", "n", "stream", "stream_options"})
_LONGEST_RESPONSE = 16 * 2**20
OPTIONS: Mapping[str, Any] = MappingProxyType({"temperature": 0, "max_tokens": 256})
"""What a request asks for besides the answer, unless told otherwise."""

_SHORTEST_SECRET = 8
"""Shorter keys are what local servers are given for form's sake, and may be words of an honest answer."""


class JudgeError(RuntimeError):
    """Judging stopped. Answers that had arrived are in the cache; a later call goes on from them."""


class BudgetError(JudgeError):
    """Judging stopped because its budget is spent."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where the judge is, and how patiently it is asked.

    Attributes:
      base_url: up to and without `/chat/completions`, e.g. `http://127.0.0.1:8000/v1`; no user, query or fragment.
      model: as the endpoint names it.
      key_variable: name of the environment variable that holds the key, never the key itself; None sends none. It is
        read anew for each request and kept nowhere.
      options: further fields of the request, e.g. temperature. They are part of the cache key.
      timeout: > 0, seconds without a word before a request is given up, and seconds an answer may take to be read.
      attempts: >= 1, how often one request is sent at most.
      backoff: > 0, seconds: attempt k + 1 comes after a random time in [½, 1] · backoff · 2^(k−1), and not before
        what Retry-After asks for.
      longest_wait: > 0, seconds: waits are cut to it, and an endpoint that asks for more stops the judging.
    """

    base_url: str
    model: str
    key_variable: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: OPTIONS)
    timeout: float = 60.0
    attempts: int = 6
    backoff: float = 1.0
    longest_wait: float = 60.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                "base_url is not an http or https address; write one like http://127.0.0.1:8000/v1"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:
            # Not shown: this is where keys hide.
            raise ValueError(
                "base_url carries a user, a query or a fragment; a key belongs in the environment, under the name given"
                " as key_variable"
            )
        if reserved := _RESERVED & set(self.options):
            raise ValueError(
                f"options set {sorted(reserved)}, which the judge fills in itself; leave them out"
            )
        try:
            json.dumps(dict(self.options), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"options cannot be written as JSON: {error}; give plain numbers, strings, lists and dicts"
            ) from None
        for name in ("timeout", "backoff", "longest_wait"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name} is {value}; it must be a positive number of seconds"
                )
        if self.attempts < 1:
            raise ValueError(
                f"attempts is {self.attempts}; a request must be sent at least once"
            )

    def key(self) -> str | None:
        """The key, from the environment.

        Raises:
          ValueError: the variable is not set, or what it holds cannot be sent. The message does not show it.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "")
        if not key:
            raise ValueError(
                f"the environment has no {self.key_variable!r}; key_variable is the name of the variable that holds the"
                " key: export it, or set key_variable to None for an endpoint without one"
            )
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError(
                f"what the environment variable {self.key_variable} holds has blanks, line ends or characters outside"
                " ASCII; it cannot be sent as a key"
            )
        return key


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most one judge may spend, over all its calls; None is no limit.

    Attributes:
      calls: requests sent, retries included.
      tokens: prompt and answer tokens as the endpoint reports them, looked at before each request: those in the air may
        go beyond. Where the endpoint reports none, one token per byte is charged, more than any tokenizer makes.
    """

    calls: int | None = None
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Spent:
    """What judging has cost.

    Attributes:
      calls: requests sent, retries included.
      prompt_tokens, answer_tokens: of the answers received.
      cached: requests answered from disk.
    """

    calls: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens."""
        return self.prompt_tokens + self.answer_tokens


class Account:
    """What a judge may spend and has spent; its threads share it.

    Attributes:
      spent: so far.
    """

    def __init__(
        self, budget: Budget, kept_in: pathlib.Path, ledger: pathlib.Path | None = None
    ):
        """Opens it.

        Args:
          budget: the most it may spend.
          kept_in: where answers are kept, for what an error says.
          ledger: where it is written down what was spent; accounts of one ledger, one after the other, share the budget.

        Raises:
          ValueError: the budget is negative, or the ledger is damaged.
        """
        for name, most in dataclasses.asdict(budget).items():
            if most is not None and most < 0:
                raise ValueError(
                    f"the budget allows {most} {name}; give 0 or more, or None for no limit"
                )
        self.spent = Spent()
        self._budget = budget
        self._kept_in = kept_in
        self._ledger = ledger
        self._before = Spent() if ledger is None else _read_ledger(ledger)
        self._lock = threading.Lock()

    def charge_cached(self) -> None:
        """One request was answered from disk."""
        with self._lock:
            self.spent = dataclasses.replace(self.spent, cached=self.spent.cached + 1)

    def charge_call(self) -> None:
        """One request is about to be sent.

        Raises:
          BudgetError: there is nothing left for it.
        """
        with self._lock:
            in_all = self._in_all()
            for name, most, spent in (
                ("calls", self._budget.calls, in_all.calls),
                ("tokens", self._budget.tokens, in_all.tokens),
            ):
                if most is not None and spent >= most:
                    raise BudgetError(
                        f"the budget of {most} {name} is spent ({in_all.calls} calls, {in_all.tokens} tokens). The answers"
                        f" so far are kept in {self._kept_in}; a judge with a larger budget goes on from them"
                    )
            self.spent = dataclasses.replace(self.spent, calls=self.spent.calls + 1)
            self._write_down()

    def charge_tokens(self, request: dict[str, Any], reply: dict[str, Any]) -> None:
        """What a reply says that it took."""
        prompt, answer = reply["prompt_tokens"], reply["answer_tokens"]
        if prompt is None:
            prompt = sum(
                len(message["content"].encode()) for message in request["messages"]
            )
        if answer is None:
            answer = len(reply["answer"].encode())
        with self._lock:
            self.spent = dataclasses.replace(
                self.spent,
                prompt_tokens=self.spent.prompt_tokens + prompt,
                answer_tokens=self.spent.answer_tokens + answer,
            )
            self._write_down()

    def _in_all(self) -> Spent:
        """With what accounts of the same ledger spent before."""
        return Spent(
            *(
                getattr(self._before, field.name) + getattr(self.spent, field.name)
                for field in dataclasses.fields(Spent)
            )
        )

    def _write_down(self) -> None:
        if self._ledger is None:
            return
        partial = self._ledger.with_name(self._ledger.name + ".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self._in_all())) + "\n")
        partial.replace(self._ledger)


def _read_ledger(path: pathlib.Path) -> Spent:
    if not path.exists():
        return Spent()
    try:
        return Spent(
            **{name: int(n) for name, n in json.loads(path.read_text()).items()}
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}, where it is written down what judging has cost, is damaged ({error}); write"
            ' {"calls": 0} into it, with the number that your bill shows'
        ) from None


@dataclasses.dataclass(frozen=True)
class Failure:
    """No reply that could be used: the kind, as `Judgements.failures` counts it, and an example."""

    kind: str
    message: str


class Stopped(JudgeError):
    """Another request's error ended this one."""


class Client:
    """Asks an endpoint, patiently, from as many threads as like; one limit of its holds for all of them."""

    def __init__(self, endpoint: Endpoint, account: Account):
        """Args: whom to ask, and who pays.

        Raises:
          ValueError: the key is not in the environment.
        """
        endpoint.key()
        self._endpoint = endpoint
        self._account = account
        self._lock = threading.Lock()
        self._quiet_until = 0.0
        self._opener = urllib.request.build_opener(_NoRedirect)

    def reply(
        self, request: dict[str, Any], stop: threading.Event
    ) -> dict[str, Any] | Failure:
        """What to keep of the endpoint's reply, or how it failed to give one.

        Args:
          request: its body, exactly as sent.
          stop: set by whoever wants no further request sent.

        Raises:
          BudgetError: the budget is spent.
          Stopped: `stop` was set.
          JudgeError: the endpoint turns the key or the address down, or asks for too long a wait.
        """
        problem = ""
        for attempt in range(1, self._endpoint.attempts + 1):
            self._wait_until_allowed(stop)
            self._account.charge_call()
            status, retry_after, body = self._post(request)
            if status == 200:
                reply = _parsed(body)
                if reply is not None:
                    self._account.charge_tokens(request, reply)
                    return reply
                problem = f"malformed response: {short(body)}"
            else:
                problem = (f"HTTP {status}: " if status else "") + short(body)
            if status in _REFUSED:
                return Failure("refused", problem)
            if status and status != 200 and status not in _RETRIED:
                raise JudgeError(
                    f"{self._endpoint.base_url} answers {problem}. Check the address, the model {self._endpoint.model!r}"
                    f" and the key (key_variable: {self._endpoint.key_variable})"
                )
            if attempt < self._endpoint.attempts:
                self._pause(attempt, retry_after, stop)
        return Failure(
            "no answer", f"{problem}, after {self._endpoint.attempts} attempts"
        )

    def _post(self, request: dict[str, Any]) -> tuple[int, float | None, str]:
        """(HTTP status or 0 without one, seconds of Retry-After, text with the key taken out)."""
        key = self._endpoint.key()
        post = urllib.request.Request(
            self._endpoint.base_url.rstrip("/") + "/chat/completions",
            data=json.dumps(request).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        if key is not None:
            post.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            response: Any
            try:
                response = self._opener.open(post, timeout=self._endpoint.timeout)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                status = response.status
                retry_after = _seconds(response.headers.get("Retry-After"))
                text = self._read(response)
        except (OSError, http.client.HTTPException) as error:
            # URLError and timeouts are OSErrors; a reply cut short is an HTTPException.
            status, retry_after = 0, None
            text = f"{type(error).__name__}: {error}"
        if key is not None and len(key) >= _SHORTEST_SECRET:
            # Endpoints quote the key when they turn it down, and errors and the cache show what they say.
            text = text.replace(key, "[key]")
        return status, retry_after, text

    def _read(self, response: Any) -> str:
        end = time.monotonic() + self._endpoint.timeout
        read = b""
        while chunk := response.read1(65536):
            read += chunk
            if time.monotonic() > end:
                # A byte now and then keeps a socket's own timeout from firing.
                raise TimeoutError(
                    f"the answer was not complete after {self._endpoint.timeout:g} s"
                )
            if len(read) > _LONGEST_RESPONSE:
                raise OSError(f"the response is longer than {_LONGEST_RESPONSE} bytes")
        return read.decode(errors="replace")

    def _pause(
        self, attempt: int, retry_after: float | None, stop: threading.Event
    ) -> None:
        longest = self._endpoint.longest_wait
        if retry_after is not None and retry_after > longest:
            raise JudgeError(
                f"{self._endpoint.base_url} asks to wait {retry_after:g} s, more than longest_wait ({longest:g} s); come"
                f" back later (the answers so far are kept), or raise longest_wait"
            )
        if retry_after is not None:
            with self._lock:
                # The limit is the account's, not this request's: everybody waits.
                self._quiet_until = max(
                    self._quiet_until, time.monotonic() + retry_after
                )
        backoff = min(longest, self._endpoint.backoff * 2.0 ** (attempt - 1))
        stop.wait(backoff * random.uniform(0.5, 1.0))

    def _wait_until_allowed(self, stop: threading.Event) -> None:
        while (left := self._quiet_until - time.monotonic()) > 0:
            if stop.wait(left):
                break
        if stop.is_set():
            raise Stopped("judging was stopped")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: a key is for the address it was given for."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _parsed(body: str) -> dict[str, Any] | None:
    """What to keep of a reply, or None if it is none."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        content = choice["message"]["content"]
        usage = reply.get("usage") or {}
        prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
        model = reply.get("model")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if content is None:
        # A refusal or a tool call: an answer that was paid for and says nothing.
        content = ""
    if not isinstance(content, str):
        return None
    return {
        "answer": content,
        "finish_reason": choice.get("finish_reason"),
        "prompt_tokens": prompt if isinstance(prompt, int) else None,
        "answer_tokens": answer if isinstance(answer, int) else None,
        "answered_by": model if isinstance(model, str) else None,
    }


def _seconds(retry_after: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            at = email.utils.parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        seconds = at.timestamp() - time.time()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def short(text: str, most: int = 200) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")
