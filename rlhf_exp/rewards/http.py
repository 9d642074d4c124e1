"""A reward that requests scores from a server over HTTP.

Knows requests, retries and bad responses, not what the server computes. urllib3's retries are not
used: they stop once a response starts, ignore a truncated one, and wait up to six hours.
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

from rlhf_exp.machine.network import is_http_url
from rlhf_exp.rewards.protocol import RewardError, RewardFunction
from rlhf_exp.rewards.samples import Samples, cut, read_scores, to_samples
from rlhf_exp.security.redaction import remember_secret
from rlhf_exp.settings import ConfigError, Count, Index, NonNegative, Positive, Text, settings
from rlhf_exp.types import Completions

if TYPE_CHECKING:
    from requests import PreparedRequest, RequestException, Response, Session

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
        is_url = is_http_url(url)
        if "@" in url and (not is_url or urlsplit(url).username is not None):
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
            samples = to_samples(completions)
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
        from requests.utils import get_environ_proxies, select_proxy

        proxies = get_environ_proxies(self.url, no_proxy=self._no_proxy())
        if select_proxy(self.url, proxies) is not None:
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
        if token is not None:
            # Not a header of the session: a password for the host in ~/.netrc would replace that.
            def authorize(request: "PreparedRequest") -> "PreparedRequest":
                request.headers["Authorization"] = f"Bearer {token}"
                return request

            session.auth = authorize
        return session

    def _request(self, session: "Session", samples: Samples) -> list[float]:
        """The scores of the samples, from one request and its retries."""
        from requests import ConnectionError, RequestException, Timeout
        from requests.exceptions import ChunkedEncodingError

        who = f"reward.url={self.url}"
        body = encode(samples, who=who)
        for retries in range(self.max_retries + 1):
            seconds = wait_s(self.backoff_s, retries)
            try:
                response = self._post(session, body)
            except RequestException as error:
                may_pass = isinstance(error, ConnectionError | Timeout | ChunkedEncodingError)
                if retries == self.max_retries or not may_pass:
                    cause = self._cause(error, _times(retries + 1))
                    raise RewardError(f"{who}: {cause}\n{samples.show(0)}") from error
            else:
                if retries == self.max_retries or response.status_code not in RETRIED:
                    break
                seconds = retry_after_s(response) or seconds
            time.sleep(seconds)
        if not 200 <= response.status_code < 300:
            status = self._status(response, _times(retries + 1))
            raise RewardError(f"{who}: {status}\n{samples.show(0)}")
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

    def _cause(self, error: "RequestException", attempts: str) -> str:
        """The reason that there is no answer."""
        from requests import ConnectTimeout, ReadTimeout
        from requests.exceptions import ChunkedEncodingError
        from urllib3.exceptions import ReadTimeoutError

        if isinstance(error, ConnectTimeout):
            return f"no connection within {self.timeout_s:g} s ({attempts})"
        if isinstance(error, ReadTimeout):
            return (
                f"no answer within {self.timeout_s:g} s ({attempts}); raise reward.timeout_s, or"
                " lower reward.batch_size"
            )
        stopped = any(isinstance(cause, ReadTimeoutError) for cause in error.args)
        if stopped or isinstance(error, ChunkedEncodingError):
            return f"the answer broke off or stopped for {self.timeout_s:g} s ({attempts})"
        root: BaseException = error
        while inner := root.__cause__ or root.__context__:
            root = inner
        if isinstance(root, ConnectionRefusedError):
            return f"connection refused ({attempts}); is the server still running?"
        return f"{type(root).__name__}: {' '.join(str(root).split())[:200]} ({attempts})"

    def _status(self, response: "Response", attempts: str) -> str:
        status = f"HTTP {response.status_code} {response.reason or ''}".rstrip()
        location = response.headers.get("Location")
        if 300 <= response.status_code < 400 and location:
            return (
                f"{status} redirects to {cut(urljoin(self.url, location), 200)} ({attempts});"
                " redirects are not followed: set reward.url to where the server answers"
            )
        return f"{status} ({attempts}); it says {body_start(response)}"


def wait_s(backoff_s: float, retries: int) -> float:
    """Seconds to wait before the next retry, after `retries` of them."""
    return min(LONGEST_WAIT_S, backoff_s * 2.0 ** min(retries, 32))


def retry_after_s(response: "Response") -> float:
    """Seconds that the server asks to wait, at most 120; 0 if it does not say."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util.retry import Retry

    try:
        return min(LONGEST_WAIT_S, float(Retry().get_retry_after(response.raw) or 0))
    except InvalidHeader:
        return 0.0


def encode(samples: Samples, *, who: str) -> bytes:
    """The body of a request. Raises RewardError naming a column that JSON cannot represent."""
    for name, entries in samples.columns.items():
        for index, entry in enumerate(entries):
            try:
                json.dumps(entry, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise RewardError(
                    f"{who}: the column {name!r} of the dataset holds {reprlib.repr(entry)}, which"
                    f" JSON cannot represent ({error}); remove the column or make it text\n"
                    + samples.show(index)
                ) from error
    content = {"prompts": samples.prompts, "completions": samples.completions}
    return json.dumps(content | {"columns": samples.columns}).encode()


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
