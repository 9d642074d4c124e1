import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from rlhf_exp.machine import network
from rlhf_exp.machine.network import hub_responds, hub_url, reachable, responds
from rlhf_exp.settings import ConfigError


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(network, "PATIENCE_S", 0.3)
    reachable.cache_clear()
    responds.cache_clear()
    yield
    reachable.cache_clear()
    responds.cache_clear()


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_listening_host_is_reachable(port):
    assert reachable(f"http://127.0.0.1:{port}")
    assert reachable(f"https://127.0.0.1:{port}/some/path")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}",
        "",
        "http://:{port}",
        "http://h:99999",
        "http://h:a",
        "http://[::1",
    ],
)
def test_what_does_not_answer_is_found_out_quickly(url):
    start = time.monotonic()
    assert not reachable(url.format(port=closed_port()))
    assert time.monotonic() - start < 5


def test_a_silent_host_is_given_up_after_the_timeout():
    # Its queue of connections is full, so a further one is neither accepted nor refused.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            waiting.append(client)
        start = time.monotonic()
        assert not reachable(f"http://127.0.0.1:{address[1]}", timeout_s=0.3)
        assert 0.25 < time.monotonic() - start < 5
        for client in waiting:
            client.close()


def test_an_answer_is_asked_for_once_a_process():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert reachable(url)
    assert reachable(url)
    reachable.cache_clear()
    assert not reachable(url)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_behind_a_proxy_only_the_library_can_tell(monkeypatch, name):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert reachable("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("url", "port"), [("http://h", 80), ("https://h", 443), ("https://h:8", 8)]
)
def test_the_port_is_the_schemes_unless_it_is_given(monkeypatch, url, port):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    assert not reachable(url)
    assert asked == [("h", port)]


def test_the_hub_is_where_the_environment_says(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub_url() == "https://huggingface.co"
    for url in ("http://127.0.0.1:8080", "https://mirror.example/hub", "http://[::1]:80"):
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert hub_url() == url


@pytest.mark.parametrize(
    "url", ["hub.example", "hub.example:80", "http://h:bad", "http://h:99999", "http://[::1",
            "https://", "ftp://hub.example", ""],
)  # fmt: skip
def test_an_address_of_the_hub_that_is_no_url_is_refused(monkeypatch, url):
    monkeypatch.setenv("HF_ENDPOINT", url)
    expected = rf"^HF_ENDPOINT={re.escape(url)} is not a URL: set it to http\(s\)://HOST"
    for call in (hub_url, hub_responds):
        with pytest.raises(ConfigError, match=expected):
            call()


def listening(answer: bytes | None) -> Iterator[str]:
    """The URL of a server that gives this answer to each connection, or none at all."""

    def serve(server: socket.socket, open_connections: list[socket.socket]) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = server.accept()
                open_connections.append(connection)
                if answer is not None:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                    connection.close()

    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server, connections), daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", True),
        (b"no HTTP\r\n", True),
        (b"", False),
        (None, False),
    ],
)
def test_only_a_host_that_says_nothing_does_not_respond(monkeypatch, scheme, answer, expected):
    for address in listening(answer):
        monkeypatch.setenv("HF_ENDPOINT", f"{scheme}://{address}")
        start = time.monotonic()
        assert reachable(hub_url())
        # Of TLS an empty answer is an error that the library describes.
        assert hub_responds() == (expected or (scheme == "https" and answer == b""))
        assert time.monotonic() - start < 5


def test_a_proxy_that_says_nothing_is_found_out(monkeypatch):
    for address in listening(None):
        monkeypatch.setenv("HTTPS_PROXY", f"http://{address}")
        monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
        assert not hub_responds()


def test_offline_the_hub_is_not_asked(monkeypatch):
    for address in listening(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
        monkeypatch.setenv("HF_ENDPOINT", f"http://{address}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_responds()
        assert reachable.cache_info().misses == 0
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        assert hub_responds()
