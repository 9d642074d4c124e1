"""Quick checks whether a host answers; libraries would retry for half a minute."""

import functools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from urllib.parse import urlsplit
from urllib.request import Request, build_opener

from rlhf_exp.settings import ConfigError

PATIENCE_S = 10.0  # for an answer; a connection must open within 2 s


def is_http_url(text: str) -> bool:
    """Returns True if the text is http(s)://HOST or http(s)://HOST:PORT with any path."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # invalid port or IPv6 address
        return False


def hub_url() -> str:
    """The URL of the Hugging Face hub. Raises ConfigError if HF_ENDPOINT is not a URL."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not is_http_url(url):
        raise ConfigError(
            f"HF_ENDPOINT={url} is not a URL: set it to http(s)://HOST or http(s)://HOST:PORT, or"
            " unset it"
        )
    return url


def hub_responds() -> bool:
    """True if the Hugging Face hub answers requests; False under HF_HUB_OFFLINE, without a request.
    Raises ConfigError as `hub_url` does."""
    url = hub_url()
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    return not offline and reachable(url) and responds(url)


@contextmanager
def without_hub() -> Iterator[None]:
    """Makes the hub's client raise instead of connecting."""
    from huggingface_hub import constants

    was_offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


@functools.cache
def responds(url: str) -> bool:
    """False if a request times out after 10 s or the connection is reset. True otherwise: the
    caller's library reports other failures. Cached for the process."""
    if os.environ.get("ALL_PROXY"):
        return True  # it may be SOCKS, which urllib does not support
    try:
        # Not urlopen: it keeps the proxies of its first call.
        build_opener().open(Request(url, method="HEAD"), timeout=PATIENCE_S).close()
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)  # URLError wraps the cause
        return not isinstance(reason, TimeoutError | ConnectionResetError)
    return True


@functools.cache
def reachable(url: str, *, timeout_s: float = 2.0) -> bool:
    """True if a connection to the URL's host opens within timeout_s, or if a proxy is configured,
    which only the library itself can use. Cached for the process."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    try:
        parts = urlsplit(url)
        port = parts.port or (80 if parts.scheme == "http" else 443)
        with socket.create_connection((parts.hostname or "", port), timeout=timeout_s):
            return True
    except (OSError, ValueError):  # ValueError if it is not a URL
        return False
