import socket
import time

import pytest

from rlhf_exp.network import reachable


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    reachable.cache_clear()
    yield
    reachable.cache_clear()


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
