"""Scores from a server that is asked over HTTP.

It knows the request, its repetitions and what may be wrong with an answer; what the server computes
is not its concern.
"""

import ipaddress
import json
import os
import re
import reprlib
import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import torch
from pydantic import field_validator

from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rewards.samples import Samples, cut, read_samples, read_scores
from rlhf_exp.security.redaction import remember_secret
from rlhf_exp.settings import ConfigError, Count, Index, NonNegative, Positive, Text, settings
from rlhf_exp.types import Completions

if TYPE_CHECKING:
    from requests import PreparedRequest, RequestException, Response, Session
    from requests.adapters import HTTPAdapter

# Faults of the moment; others will not go away by asking again.
RETRIED = (429, 500, 502, 503, 504)
LONGEST_WAIT_S = 120.0
CONNECT_S = 5.0


@settings
class HttpReward:
    """What a server answers to a POST of {"prompts": [...], "completions": [...], "columns":
    {name: [...]}}: a list of numbers, or an object with such `scores` or `rewards`.

    `timeout_s` holds for the connection and for each part of an answer, not for a slow whole.
    Lists have an entry for each sample, `batch_size` of them at most. A request is repeated up to
    max_retries times if nobody answers or the status is 429, 500, 502, 503 or 504, after
    `backoff_s`, twice that and so on, or after what the server says in Retry-After, 120 seconds at
    most. `token_env` names an environment variable whose value goes along as bearer token.
    """

    url: Text
    """http://HOST:PORT/PATH or https://HOST/PATH, without password."""
    timeout_s: Positive = 30.0
    """Seconds to wait for a connection, and for each part of an answer; above 0."""
    max_retries: Index = 4
    """Repetitions of a failed request, from 0."""
    backoff_s: NonNegative = 0.5
    """Seconds before the first repetition, doubling; from 0."""
    batch_size: Count = 64
    """Samples a request."""
    token_env: Text | None = None
    """NAME of an environment variable with a bearer token, or null."""

    @field_validator("url")
    @classmethod
    def _usable(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            named = parts.username is not None or parts.password is not None
        except ValueError:
            known = named = False
        if "@" in url and (named or not known):
            # ConfigError, so that the value is not repeated.
            raise ConfigError(
                "reward.url seems to hold a user or a password, which would be written to the"
                " run's files: leave it out, and name a variable with a token in reward.token_env"
            )
        if not known or re.search(r"\s", url):
            raise ValueError("give http://HOST:PORT/PATH or https://HOST/PATH")
        return url

    @field_validator("token_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
            # ConfigError, so that what may be the token itself is not repeated.
            raise ConfigError(
                "reward.token_env is no name of an environment variable: export the token as one,"
                " and give its name here"
            )
        return name

    def load(self, device: torch.device) -> RewardFunction:
        """The function. Raises ConfigError if nobody listens at the url, and if there is no token
        in the variable."""
        token = self._read_token()
        self._check_listening()
        session = self._open_session(token)

        def score(completions: Completions) -> torch.Tensor:
            samples = read_samples(completions)
            scores: list[float] = []
            for start in range(0, len(samples), self.batch_size):
                scores += self._ask(session, samples.part(start, start + self.batch_size))
            return torch.tensor(scores, dtype=torch.float32, device=device)

        return score

    def _read_token(self) -> str | None:
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "")
        if not re.fullmatch(r"[!-~]+", token):
            fault = "holds blanks or other than ASCII characters" if token else "is not set"
            raise ConfigError(
                f"reward.token_env={self.token_env}: that environment variable {fault}; export the"
                " server's token in it, or set reward.token_env=null"
            )
        remember_secret(token)  # a server may repeat it in an error
        return token

    def _check_listening(self) -> None:
        """Raises ConfigError unless somebody accepts connections; behind a proxy only a request
        can tell."""
        if self._uses_proxy():
            return
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)
        try:
            socket.create_connection((host, port), timeout=min(self.timeout_s, CONNECT_S)).close()
        except (OSError, UnicodeError) as error:  # the latter from names that no host can have
            raise ConfigError(
                f"reward.url={self.url}: nobody answers at {host}:{port} ({error}); start the"
                " server, or correct the url"
            ) from error

    def _uses_proxy(self) -> bool:
        from requests.utils import get_environ_proxies, select_proxy

        proxies = get_environ_proxies(self.url, no_proxy=self._no_proxy())
        return select_proxy(self.url, proxies) is not None

    def _no_proxy(self) -> str | None:
        """The host if it is this machine, which no proxy can reach; else None, and the environment
        decides."""
        host = urlsplit(self.url).hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return host
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return None
        return host if address.is_loopback or address.is_unspecified else None

    def _open_session(self, token: str | None) -> "Session":
        from requests import Session

        session = Session()
        adapter = retrying_adapter(self.max_retries, self.backoff_s)
        for scheme in ("http://", "https://"):
            session.mount(scheme, adapter)
        if token is not None:
            # Not as a header of the session: a password of the host in ~/.netrc would replace it.
            def authorize(request: "PreparedRequest") -> "PreparedRequest":
                request.headers["Authorization"] = f"Bearer {token}"
                return request

            session.auth = authorize
        return session

    def _ask(self, session: "Session", samples: Samples) -> list[float]:
        """The scores of samples that go in one request."""
        from requests import RequestException

        who = f"reward.url={self.url}"
        body = encode(samples, who=who)
        broken = 0
        while True:
            try:
                response = self._post(session, body)
                break
            except RequestException as error:
                # The adapter hands an answer on before it is read, and so asks again only if none
                # has begun.
                if broken == self.max_retries or not _broke_off(error):
                    cause = self._cause(error, broken)
                    raise RewardError(f"{who}: {cause}\n{samples.show(0)}") from error
                time.sleep(wait_s(self.backoff_s, broken))
                broken += 1
        if not 200 <= response.status_code < 300:
            raise RewardError(f"{who}: {self._status(response, broken)}\n{samples.show(0)}")
        return read_scores(answered(response, samples, who=who), samples, who=who)

    def _post(self, session: "Session", body: bytes) -> "Response":
        host = self._no_proxy()
        return session.post(
            self.url,
            data=body,
            headers={"Content-Type": "application/json", "Accept": "application/json"},
            timeout=self.timeout_s,
            allow_redirects=False,
            proxies=None if host is None else {"no_proxy": host},
        )

    def _cause(self, error: "RequestException", broken: int) -> str:
        """Why there is no answer, and how often one was asked for; `broken` times one had begun."""
        from urllib3.exceptions import MaxRetryError, ReadTimeoutError

        cause: Any = error.args[0] if error.args else error
        attempts = _times(broken + 1)
        if isinstance(cause, MaxRetryError):
            attempts = _times(broken + 1 + self.max_retries)
            cause = cause.reason or cause
        elif _broke_off(error):
            return f"the answer broke off or stopped for {self.timeout_s:g} s ({attempts})"
        if isinstance(cause, ReadTimeoutError):
            return (
                f"no answer within {self.timeout_s:g} s ({attempts}); raise reward.timeout_s, or"
                " lower reward.batch_size"
            )
        root = cause.__cause__ if isinstance(cause, Exception) and cause.__cause__ else cause
        if isinstance(root, TimeoutError):
            return f"no connection within {self.timeout_s:g} s ({attempts})"
        if isinstance(root, ConnectionRefusedError):
            return f"connection refused ({attempts}); is the server still running?"
        return f"{type(root).__name__}: {' '.join(str(root).split())[:200]} ({attempts})"

    def _status(self, response: "Response", broken: int) -> str:
        attempts = _times(broken + 1 + len(response.raw.retries.history))
        status = f"HTTP {response.status_code} {response.reason or ''}".rstrip()
        location = response.headers.get("Location")
        if 300 <= response.status_code < 400 and location:
            return (
                f"{status} redirects to {cut(urljoin(self.url, location), 200)} ({attempts});"
                " redirects are not followed: set reward.url to where the server answers"
            )
        return f"{status} ({attempts}); it says {beginning(response)}"


def _broke_off(error: "RequestException") -> bool:
    from urllib3.exceptions import ProtocolError, ReadTimeoutError

    return bool(error.args) and isinstance(error.args[0], ProtocolError | ReadTimeoutError)


def wait_s(backoff_s: float, repetitions: int) -> float:
    """Seconds to wait after so many repetitions."""
    return min(LONGEST_WAIT_S, backoff_s * 2.0 ** min(repetitions, 32))


def retrying_adapter(max_retries: int, backoff_s: float) -> "HTTPAdapter":
    """An adapter that repeats requests as HttpReward says, and gives the last answer if none was
    better."""
    from requests.adapters import HTTPAdapter
    from urllib3 import BaseHTTPResponse
    from urllib3.util.retry import Retry

    class Patient(Retry):
        """urllib3 itself does not wait before the first repetition, and up to six hours if a server
        asks for that."""

        def get_backoff_time(self) -> float:
            return wait_s(backoff_s, len(self.history) - 1)

        def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
            asked = super().get_retry_after(response)
            return None if asked is None else min(LONGEST_WAIT_S, float(asked))

    return HTTPAdapter(
        max_retries=Patient(
            total=max_retries,
            allowed_methods=None,  # any, POST too: the same samples get the same scores
            status_forcelist=RETRIED,
            raise_on_status=False,
        )
    )


def encode(samples: Samples, *, who: str) -> bytes:
    """The body of a request. Raises RewardError naming a column that JSON cannot carry."""
    content = {"prompts": samples.prompts, "completions": samples.completions}
    try:
        return json.dumps(content | {"columns": samples.columns}, allow_nan=False).encode()
    except (TypeError, ValueError):
        for name, entries in samples.columns.items():
            for index, entry in enumerate(entries):
                _check_json(name, entry, samples.show(index), who)
        raise


def _check_json(column: str, entry: Any, shown: str, who: str) -> None:
    try:
        json.dumps(entry, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"{who}: the column {column!r} of the dataset holds {reprlib.repr(entry)}, which JSON"
            f" cannot carry ({error}); remove the column or make it text\n{shown}"
        ) from error


def answered(response: "Response", samples: Samples, *, who: str) -> Any:
    """What the server gave as scores. Raises RewardError if the answer is not JSON or an object
    that has none, or two different ones."""
    try:
        answer = response.json()
    except ValueError as error:
        raise RewardError(
            f"{who}: the answer is not JSON but {beginning(response)}\n{samples.show(0)}"
        ) from error
    if not isinstance(answer, dict):
        return answer
    found = [answer[key] for key in ("scores", "rewards") if key in answer]
    if not found:
        raise RewardError(
            f"{who}: the answer has neither scores nor rewards, but {cut(', '.join(answer))}\n"
            + samples.show(0)
        )
    if found[0] != found[-1]:
        raise RewardError(
            f"{who}: the answer has scores and rewards that differ; give one of them\n"
            + samples.show(0)
        )
    return found[0]


def beginning(response: "Response") -> str:
    """The first 200 characters of an answer's body, quoted."""
    text = response.content[:1000].decode("utf-8", errors="replace")
    return repr(text[:200])


def _times(attempts: int) -> str:
    return f"after {attempts} attempt{'s' if attempts > 1 else ''}"
