"""A reward that requests scores from a server over HTTP.

Knows requests, retries and bad responses, not what the server computes.
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

# Statuses of temporary faults; a retry does not help with others.
RETRIED = (429, 500, 502, 503, 504)
LONGEST_WAIT_S = 120.0
CONNECT_S = 5.0


@settings
class HttpReward:
    """The scores with which a server answers a POST of {"prompts": [...], "completions": [...],
    "columns": {name: [...]}}: a list of numbers, or an object with the list under `scores` or
    `rewards`.

    Every list has one entry a sample, at most `batch_size`. `timeout_s` limits the connection and
    each part of an answer, not the whole answer. A request is retried up to max_retries times if
    there is no answer or the status is 429, 500, 502, 503 or 504; it waits `backoff_s`, doubled at
    each retry, or the server's Retry-After, at most 120 seconds. `token_env` names an environment
    variable whose value is sent as bearer token.
    """

    url: Text
    """http://HOST:PORT/PATH or https://HOST/PATH, without password."""
    timeout_s: Positive = 30.0
    """Seconds to wait for a connection, and for each part of an answer; above 0."""
    max_retries: Index = 4
    """Retries of a failed request, from 0."""
    backoff_s: NonNegative = 0.5
    """Seconds before the first retry, doubled at each further one; from 0."""
    batch_size: Count = 64
    """Samples a request."""
    token_env: Text | None = None
    """NAME of an environment variable with a bearer token, or null."""

    @field_validator("url")
    @classmethod
    def _usable(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            has_user = parts.username is not None or parts.password is not None
        except ValueError:
            is_url = has_user = False
        if "@" in url and (has_user or not is_url):
            # ConfigError, so that the message does not repeat the value.
            raise ConfigError(
                "reward.url seems to hold a user or a password, which would be written to the"
                " run's files: remove it, and name a variable with a token in reward.token_env"
            )
        if not is_url or re.search(r"\s", url):
            raise ValueError("give http://HOST:PORT/PATH or https://HOST/PATH")
        return url

    @field_validator("token_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
            # ConfigError, so that the message does not repeat what may be the token.
            raise ConfigError(
                "reward.token_env is not the name of an environment variable: export the token in a"
                " variable, and give its name here"
            )
        return name

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function. Raises ConfigError if no server listens at the url or the variable
        holds no token."""
        token = self._read_token()
        self._check_listening()
        session = self._open_session(token)

        def score(completions: Completions) -> torch.Tensor:
            samples = read_samples(completions)
            scores: list[float] = []
            for start in range(0, len(samples), self.batch_size):
                scores += self._request(session, samples.part(start, start + self.batch_size))
            return torch.tensor(scores, dtype=torch.float32, device=device)

        return score

    def _read_token(self) -> str | None:
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "")
        if not re.fullmatch(r"[!-~]+", token):
            fault = "holds blanks or characters that are not ASCII" if token else "is not set"
            raise ConfigError(
                f"reward.token_env={self.token_env}: that environment variable {fault}; export the"
                " server's token in it, or set reward.token_env=null"
            )
        remember_secret(token)  # a server may repeat it in an error message
        return token

    def _check_listening(self) -> None:
        """Raises ConfigError unless a server accepts connections. Checks nothing behind a proxy,
        where only a request can tell."""
        if self._uses_proxy():
            return
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)
        try:
            socket.create_connection((host, port), timeout=min(self.timeout_s, CONNECT_S)).close()
        except (OSError, UnicodeError) as error:  # UnicodeError for an impossible host name
            raise ConfigError(
                f"reward.url={self.url}: nobody answers at {host}:{port} ({error}); start the"
                " server, or correct the url"
            ) from error

    def _uses_proxy(self) -> bool:
        from requests.utils import get_environ_proxies, select_proxy

        proxies = get_environ_proxies(self.url, no_proxy=self._no_proxy())
        return select_proxy(self.url, proxies) is not None

    def _no_proxy(self) -> str | None:
        """The host if it is this machine, which is never behind a proxy; else None, so that the
        environment decides."""
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
            # Not a header of the session: a password for the host in ~/.netrc would replace that.
            def authorize(request: "PreparedRequest") -> "PreparedRequest":
                request.headers["Authorization"] = f"Bearer {token}"
                return request

            session.auth = authorize
        return session

    def _request(self, session: "Session", samples: Samples) -> list[float]:
        """The scores of the samples, from one request."""
        from requests import RequestException

        who = f"reward.url={self.url}"
        body = encode(samples, who=who)
        broken = 0
        while True:
            try:
                response = self._post(session, body)
                break
            except RequestException as error:
                # The adapter retries only until an answer begins; this loop retries one that broke
                # off.
                if broken == self.max_retries or not _broke_off(error):
                    cause = self._cause(error, broken)
                    raise RewardError(f"{who}: {cause}\n{samples.show(0)}") from error
                time.sleep(wait_s(self.backoff_s, broken))
                broken += 1
        if not 200 <= response.status_code < 300:
            raise RewardError(f"{who}: {self._status(response, broken)}\n{samples.show(0)}")
        return read_scores(read_answer(response, samples, who=who), samples, who=who)

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
        """Why there is no answer, and after how many attempts; `broken` answers broke off."""
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
        return f"{status} ({attempts}); it says {body_start(response)}"


def _broke_off(error: "RequestException") -> bool:
    from urllib3.exceptions import ProtocolError, ReadTimeoutError

    return bool(error.args) and isinstance(error.args[0], ProtocolError | ReadTimeoutError)


def wait_s(backoff_s: float, retries: int) -> float:
    """Seconds to wait before the next retry, after `retries` of them."""
    return min(LONGEST_WAIT_S, backoff_s * 2.0 ** min(retries, 32))


def retrying_adapter(max_retries: int, backoff_s: float) -> "HTTPAdapter":
    """An adapter that retries requests as HttpReward documents, and returns the last answer if all
    fail."""
    from requests.adapters import HTTPAdapter
    from urllib3 import BaseHTTPResponse
    from urllib3.util.retry import Retry

    class LimitedRetry(Retry):
        """Waits before the first retry, which urllib3 does not, and limits Retry-After, for which
        urllib3 waits up to six hours."""

        def get_backoff_time(self) -> float:
            return wait_s(backoff_s, len(self.history) - 1)

        def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
            seconds = super().get_retry_after(response)
            return None if seconds is None else min(LONGEST_WAIT_S, float(seconds))

    return HTTPAdapter(
        max_retries=LimitedRetry(
            total=max_retries,
            allowed_methods=None,  # POST too: scoring the same samples again does no harm
            status_forcelist=RETRIED,
            raise_on_status=False,
        )
    )


def encode(samples: Samples, *, who: str) -> bytes:
    """The body of a request. Raises RewardError naming a column that JSON cannot represent."""
    content = {"prompts": samples.prompts, "completions": samples.completions}
    try:
        return json.dumps(content | {"columns": samples.columns}, allow_nan=False).encode()
    except (TypeError, ValueError):
        for name, entries in samples.columns.items():
            for index, entry in enumerate(entries):
                _check_json(name, entry, samples.show(index), who)
        raise


def _check_json(column: str, entry: Any, sample: str, who: str) -> None:
    try:
        json.dumps(entry, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"{who}: the column {column!r} of the dataset holds {reprlib.repr(entry)}, which JSON"
            f" cannot represent ({error}); remove the column or make it text\n{sample}"
        ) from error


def read_answer(response: "Response", samples: Samples, *, who: str) -> Any:
    """The scores in an answer, not yet checked. Raises RewardError if the answer is not JSON, or an
    object without scores or with two different lists of them."""
    try:
        answer = response.json()
    except ValueError as error:
        raise RewardError(
            f"{who}: the answer is not JSON but {body_start(response)}\n{samples.show(0)}"
        ) from error
    if not isinstance(answer, dict):
        return answer
    scores = [answer[key] for key in ("scores", "rewards") if key in answer]
    if not scores:
        raise RewardError(
            f"{who}: the answer has neither scores nor rewards, but {cut(', '.join(answer))}\n"
            + samples.show(0)
        )
    if scores[0] != scores[-1]:
        raise RewardError(
            f"{who}: the answer has scores and rewards that differ; give one of them\n"
            + samples.show(0)
        )
    return scores[0]


def body_start(response: "Response") -> str:
    """The first 200 characters of an answer's body, quoted."""
    text = response.content[:1000].decode("utf-8", errors="replace")
    return repr(text[:200])


def _times(attempts: int) -> str:
    return f"after {attempts} attempt{'s' if attempts > 1 else ''}"
