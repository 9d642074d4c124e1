"""Whether a host answers, found out quickly: libraries retry for half a minute."""

import functools
import os
import socket
from urllib.parse import urlsplit


def hub_url() -> str:
    """Where the Hugging Face hub is."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@functools.cache
def reachable(url: str, *, timeout_s: float = 2.0) -> bool:
    """True if a connection to the URL's host opens within timeout_s, or if a proxy is configured,
    which only the library itself can try. Asked once a process for each URL."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    try:
        parts = urlsplit(url)
        port = parts.port or (80 if parts.scheme == "http" else 443)
        with socket.create_connection((parts.hostname or "", port), timeout=timeout_s):
            return True
    except (OSError, ValueError):  # the latter for what is no URL
        return False
