import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.rewards.http import HttpReward, wait_s
from rlhf_exp.rewards.protocol import RewardError
from rlhf_exp.security import redaction
from rlhf_exp.settings import ConfigError, field_problem
from tests.builders import completions
from tests.rewards.test_samples import HELLO, with_rows

CPU = torch.device("cpu")
FIRST = r"\nsamples\[0\]: prompt 'p0', completion 'a'$"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((time.monotonic(), dict(self.headers), body))
        number = len(self.server.seen) - 1
        self.server.replies[min(number, len(self.server.replies) - 1)](self)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers with each of `replies` in turn and then with the last one; `seen` are the time,
    headers and body of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply] = [lengths]
        self.seen: list[tuple[float, dict[str, str], Any]] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, *_: Any) -> None:
        """Nothing: a client that has given up is no fault."""


def answer(content: Any, status: int = 200, **headers: str) -> Reply:
    """A reply with this content, JSON unless it is bytes."""

    def reply(handler: Handler) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def lengths(handler: Handler) -> None:
    answer([len(text) for text in handler.server.seen[-1][2]["completions"]])(handler)


def hang(handler: Handler) -> None:
    handler.server.over.wait(5)


def hang_up(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def break_off(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"[1.0")


def stop(handler: Handler) -> None:
    break_off(handler)
    handler.wfile.flush()
    hang(handler)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch, tmp_path):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """What would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def reward(server: Server, **settings: Any) -> HttpReward:
    return HttpReward(**{"url": server.url, "timeout_s": 5.0, "backoff_s": 0.01} | settings)


def batch(*texts: str):
    return completions(texts, before=[f"p{i}" for i in range(len(texts))])


def score(server: Server, *texts: str, **settings: Any) -> list[float]:
    return reward(server, **settings).load(CPU)(batch(*texts)).tolist()


def refused(server: Server, reply: Reply, match: str, *texts: str, **settings: Any) -> RewardError:
    server.replies = [reply]
    with pytest.raises(RewardError, match=f"^reward.url={re.escape(server.url)}:? {match}") as e:
        score(server, *(texts or ("a", "bb")), **settings)
    return e.value


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# What is asked, and what is read.


def test_a_server_gets_prompts_completions_and_columns(server):
    server.replies = [answer([0.5, -2])]
    rows = [
        {"prompt": "one", "answer": 1},
        {"prompt": "<hello>", "messages": HELLO, "tags": ["x", None]},
    ]
    scores = reward(server).load(CPU)(with_rows(["yes", "nö\ud800"], rows))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0.5, -2.0]
    ((_, headers, body),) = server.seen
    assert body == {
        "prompts": ["one", HELLO],
        "completions": ["yes", [{"role": "assistant", "content": "nö\ud800"}]],
        "columns": {"answer": [1, None], "tags": [None, ["x", None]]},
    }
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    "content",
    [
        [1, 0.5],
        {"scores": [1, 0.5]},
        {"rewards": [1, 0.5], "other": None},
        {"rewards": [1, 0.5], "scores": [1.0, 0.5]},
        [True, 0.5],
    ],
)
def test_scores_are_a_list_or_in_an_object(server, content):
    server.replies = [answer(content)]
    assert score(server, "a", "b") == [1.0, 0.5]


@pytest.mark.parametrize(("batch_size", "sizes"), [(2, [2, 2, 1]), (5, [5]), (64, [5])])
def test_a_batch_goes_in_requests_of_batch_size_at_most(server, batch_size, sizes):
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert score(server, *texts, batch_size=batch_size) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [len(body["prompts"]) for _, _, body in server.seen] == sizes
    assert [text for _, _, body in server.seen for text in body["completions"]] == texts


# Repetitions.


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_fault_of_the_moment_is_asked_again(server, status):
    server.replies = [answer({}, status), answer({}, status), lengths]
    assert score(server, "a", "bb") == [1.0, 2.0]
    assert len(server.seen) == 3
    assert server.seen[0][2] == server.seen[2][2]


@pytest.mark.parametrize("fault", [hang, hang_up, break_off, stop])
def test_an_answer_that_does_not_come_is_asked_for_again(server, fault):
    server.replies = [fault, lengths]
    assert score(server, "a", "bb", timeout_s=0.4) == [1.0, 2.0]
    assert len(server.seen) == 2


@pytest.mark.parametrize(("max_retries", "said"), [(0, "after 1 attempt"), (2, "after 3 attempts")])
def test_a_fault_that_stays_is_told_with_what_the_server_says(server, max_retries, said):
    body = b"<h1>no\nway" + b"x" * 300 + "nö".encode()
    shown = re.escape(repr((b"<h1>no\nway" + b"x" * 190).decode()))
    refused(
        server,
        answer(body, 500),
        rf"HTTP 500 Internal Server Error \({said}\); it says {shown}" + FIRST,
        max_retries=max_retries,
    )
    assert len(server.seen) == max_retries + 1


def test_the_default_is_four_repetitions(server):
    server.replies = [answer({}, 503)] * 4 + [lengths]
    assert score(server, "a") == [1.0]
    assert len(server.seen) == 5
    server.seen.clear()
    refused(server, answer({}, 503), r"HTTP 503 Service Unavailable \(after 5 attempts\)")


def test_the_number_of_attempts_counts_all_kinds_of_faults(server):
    server.replies = [answer({}, 503), hang_up, answer(b"gone", 404)]
    with pytest.raises(
        RewardError, match=r"HTTP 404 Not Found \(after 3 attempts\); it says 'gone'"
    ):
        score(server, "a")


@pytest.mark.parametrize("status", [400, 401, 404, 422, 501])
def test_a_fault_of_the_request_is_not_asked_again(server, status):
    refused(server, answer(b"\xff why", status), rf"HTTP {status} .*\(after 1 attempt\).*'. why'")
    assert len(server.seen) == 1


def test_waits_begin_with_backoff_s_and_double(server, waits):
    server.replies = [answer({}, 500), hang_up, answer({}, 500), lengths]
    score(server, "a", backoff_s=0.5)
    assert waits == [0.5, 1.0, 2.0]


def test_a_wait_takes_its_time(server):
    server.replies = [answer({}, 500)] * 2 + [lengths]
    score(server, "a", backoff_s=0.08)
    first, second, third = (at for at, _, _ in server.seen)
    assert second - first >= 0.08
    assert third - second >= 0.16


def test_waits_end_somewhere():
    assert [wait_s(0.5, n) for n in (0, 7, 8, 9999)] == [0.5, 64.0, 120.0, 120.0]
    assert wait_s(0.0, 3) == 0.0


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(
    ("asked", "waited"), [("7", 7.0), ("99999", 120.0), ("0", 0.25), ("soon", 0.25)]
)
def test_the_server_may_say_how_long_to_wait(server, waits, status, asked, waited):
    server.replies = [answer({}, status, Retry_After=asked), lengths]
    assert score(server, "a", backoff_s=0.25) == [1.0]
    assert waits == [waited]


def test_a_timeout_names_its_seconds_and_what_to_do(server):
    start = time.monotonic()
    refused(
        server,
        hang,
        r"no answer within 0\.2 s \(after 2 attempts\); raise reward\.timeout_s, or lower"
        r" reward\.batch_size" + FIRST,
        timeout_s=0.2,
        max_retries=1,
    )
    assert 0.4 < time.monotonic() - start < 3
    assert len(server.seen) == 2


def test_a_server_that_has_gone_refuses_connections(server):
    function = reward(server, max_retries=2).load(CPU)
    function(batch("a"))
    server.socket.close()
    with pytest.raises(
        RewardError,
        match=r"connection refused \(after 3 attempts\); is the server still running\?" + FIRST,
    ):
        function(batch("a"))


def test_a_connection_that_is_cut_is_told(server):
    refused(
        server,
        hang_up,
        r"RemoteDisconnected: .*closed.*\(after 2 attempts\)" + FIRST,
        max_retries=1,
    )


def test_an_answer_that_breaks_off_is_told(server):
    said = r"the answer broke off or stopped for 0\.2 s \(after 3 attempts\)" + FIRST
    for fault in (break_off, stop):
        server.seen.clear()
        error = refused(server, fault, said, timeout_s=0.2, max_retries=2)
        assert error.__cause__ is not None
        assert len(server.seen) == 3


def test_answers_that_broke_off_count_as_attempts(server):
    server.replies = [break_off, break_off, answer(b"", 404)]
    with pytest.raises(RewardError, match=r"HTTP 404 Not Found \(after 3 attempts\)"):
        score(server, "a")
    server.seen.clear()
    server.replies = [break_off, hang_up]
    with pytest.raises(RewardError, match=r"RemoteDisconnected.*\(after 2 attempts\)"):
        score(server, "a", max_retries=1)
    assert len(server.seen) == 2


def test_the_waits_for_answers_that_broke_off_double_too(server, waits):
    server.replies = [break_off, stop, break_off, lengths]
    score(server, "a", timeout_s=0.4, backoff_s=0.5)
    assert waits == [0.5, 1.0, 2.0]


def test_a_connection_that_cannot_be_made_in_time_is_told(server):
    # Its queue of connections is full, so a further one is neither accepted nor refused.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        url = f"http://127.0.0.1:{address[1]}"
        function = reward(server, url=url, max_retries=1, timeout_s=0.2).load(CPU)
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            waiting.append(client)
        with pytest.raises(
            RewardError, match=r"no connection within 0\.2 s \(after 2 attempts\)" + FIRST
        ):
            function(batch("a"))
        with pytest.raises(ConfigError, match=r"nobody answers at .* \(timed out\)"):
            reward(server, url=url, timeout_s=0.2).load(CPU)
        for client in waiting:
            client.close()


@pytest.mark.parametrize("location", ["http://elsewhere:1/score", "/elsewhere"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_refused_and_says_where_it_points(server, location, status):
    whole = location if "://" in location else server.url.replace("/score", location)
    refused(
        server,
        answer({}, status, Location=location),
        rf"HTTP {status} .* redirects to '{re.escape(whole)}' \(after 1 attempt\); redirects are"
        r" not followed: set reward\.url to where the server answers" + FIRST,
    )
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_neither_token_nor_texts_to_another_host(server, monkeypatch, status):
    monkeypatch.setenv("SCORES_TOKEN", "s3cret-token")
    with Server() as elsewhere:
        serve = {"target": elsewhere.serve_forever, "kwargs": {"poll_interval": 0.01}}
        threading.Thread(**serve, daemon=True).start()
        # Another port is another host to a browser, and localhost another to requests.
        location = elsewhere.url.replace("127.0.0.1", "localhost")
        redirect = answer({}, status, Location=location)
        error = refused(server, redirect, "HTTP .* redirects", token_env="SCORES_TOKEN")
        elsewhere.shutdown()
        assert elsewhere.seen == []
    assert [headers["Authorization"] for _, headers, _ in server.seen] == ["Bearer s3cret-token"]
    assert "s3cret" not in str(error)


def test_a_token_that_a_server_repeats_is_known_as_a_secret(server, monkeypatch):
    monkeypatch.setattr(redaction, "_secret_texts", set())
    monkeypatch.setenv("SCORES_TOKEN", "s3cret-token")
    error = refused(server, answer(b"bad s3cret-token", 403), "HTTP 403", token_env="SCORES_TOKEN")
    assert "bad ***" in redaction.scrub(str(error))


def test_a_redirect_that_points_nowhere_is_refused(server):
    refused(server, answer(b"", 304), r"HTTP 304 Not Modified \(after 1 attempt\); it says ''")


# Answers that are no scores.


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>" + b"x" * 500, "the answer is not JSON but '<html>" + "x" * 194 + "'"),
        (b"", "the answer is not JSON but ''"),
        (b"[1.0, 2.0", r"the answer is not JSON but '\[1\.0, 2\.0'"),
        (b"\xff\xfe\xfd", "the answer is not JSON but '\ufffd+'"),
        (b"[" + b"9" * 5000 + b", 1]", r"the answer is not JSON but '\[9{199}'"),
        ({"values": [1]}, r"the answer has neither scores nor rewards, but 'values'"),
        ({}, r"the answer has neither scores nor rewards, but ''"),
        (
            {"scores": [1.0, 2.0], "rewards": [1.0, 3.0]},
            "the answer has scores and rewards that differ; give one of them",
        ),
        (None, "gave None instead of scores; .*"),
        (1.0, r"gave float 1\.0 instead of scores; .*"),
        ({"scores": "ab"}, "gave str 'ab' instead of scores; .*"),
        ([1.0], "gave 1 scores for 2 samples; .*"),
        ({"rewards": [1.0, 2.0, 3.0]}, "gave 3 scores for 2 samples; .*"),
        ([None, 1.0], r"gave None as scores\[0\] .*"),
        (b"[NaN, 1.0]", r"gave nan as scores\[0\] .*"),
        (b"[1e999, 1.0]", r"gave inf as scores\[0\] .*"),
        ([[1.0], 1.0], r"gave \[1\.0\] as scores\[0\] .*"),
    ],
)
def test_an_answer_that_has_no_scores_is_refused_with_a_sample(server, content, said):
    reply = answer(content)
    refused(server, reply, said + r"(\n.*)?" + FIRST)
    assert len(server.seen) == 1


def test_a_sample_is_named_by_its_place_in_the_whole_batch(server):
    server.replies = [answer([1.0, 2.0]), answer([3.0, None])]
    shown = r"\nsamples\[3\]: prompt 'p3', completion 'd'$"
    with pytest.raises(RewardError, match=r"None as scores\[3\] \(1 such of 2\).*" + shown):
        score(server, "a", "b", "c", "d", batch_size=2)
    server.seen.clear()
    server.replies = [answer([1.0, 2.0]), answer({}, 400)]
    with pytest.raises(RewardError, match=r"HTTP 400(.|\n)*samples\[2\]: prompt 'p2'"):
        score(server, "a", "b", "c", "d", batch_size=2)


@pytest.mark.parametrize(
    ("entry", "said"), [({1, 2}, r"\{1, 2\}.*not JSON serializable"), (float("nan"), "nan.*Out of")]
)
def test_a_column_that_json_cannot_carry_is_named(server, entry, said):
    rows = [{"prompt": "a", "n": 1, "odd": "fine"}, {"prompt": "b", "n": 2, "odd": entry}]
    function = reward(server).load(CPU)
    with pytest.raises(
        RewardError,
        match=rf"the column 'odd' of the dataset holds {said}.*remove the column or make it text\n"
        r"samples\[1\]: prompt 'b', completion 'y'$",
    ):
        function(with_rows(["x", "y"], rows))
    assert server.seen == []


# What is found before training.


def test_that_nobody_listens_is_found_when_it_is_loaded(server):
    port = closed_port()
    with pytest.raises(
        ConfigError,
        match=rf"^reward\.url=http://127\.0\.0\.1:{port}/x: nobody answers at 127\.0\.0\.1:{port}"
        r" \(.*refused\); start the server, or correct the url$",
    ):
        reward(server, url=f"http://127.0.0.1:{port}/x").load(CPU)
    with pytest.raises(ConfigError, match="nobody answers at"):
        reward(server, url="http://" + "a" * 70 + ".invalid").load(CPU)


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_the_port_is_the_schemes_unless_it_is_given(server, scheme, port):
    # An address of this machine that nobody listens at.
    with pytest.raises(ConfigError, match=rf"nobody answers at 127\.77\.0\.1:{port} "):
        reward(server, url=f"{scheme}://127.77.0.1").load(CPU)


def test_loading_sends_no_request(server):
    reward(server).load(CPU)
    time.sleep(0.05)
    assert server.seen == []


def test_a_server_that_was_started_meanwhile_is_found(server):
    port = closed_port()
    settings = reward(server, url=f"http://127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="nobody answers"):
        settings.load(CPU)
    with socket.create_server(("127.0.0.1", port)):
        settings.load(CPU)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2", "0.0.0.0"])
@pytest.mark.parametrize("lower", [False, True])
def test_proxies_of_the_environment_do_not_come_before_this_machine(
    server, monkeypatch, host, lower
):
    for name in PROXIES[:3]:
        name = name.lower() if lower else name
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NO_PROXY", "example.com")
    server.replies = [lengths]
    if host == "127.0.0.2":  # which the server does not listen at
        with pytest.raises(ConfigError, match="nobody answers"):
            score(server, "a", url=f"http://{host}:{server.server_port}/score")
        return
    assert score(server, "a", url=f"http://{host}:{server.server_port}/score") == [1.0]


def test_elsewhere_is_reached_by_the_proxy(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    assert score(server, "a", "bb", url="http://scores.invalid/x") == [1.0, 2.0]
    assert server.seen[0][1]["Host"] == "scores.invalid"
    monkeypatch.setenv("NO_PROXY", "scores.invalid")
    with pytest.raises(ConfigError, match=r"nobody answers at scores\.invalid:80"):
        reward(server, url="http://scores.invalid/x").load(CPU)


# Settings and secrets.


def test_the_token_of_the_environment_goes_along(server, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("SCORES_TOKEN", "s3cret-token")
    assert score(server, "a", "b", token_env="SCORES_TOKEN", batch_size=1) == [1.0, 1.0]
    sent = [headers["Authorization"] for _, headers, _ in server.seen]
    assert sent == ["Bearer s3cret-token"] * 2
    error = refused(server, answer({}, 401), "HTTP 401", token_env="SCORES_TOKEN")
    assert "s3cret" not in str(error)


def test_a_variable_that_holds_no_token_is_refused(server, monkeypatch):
    monkeypatch.delenv("SCORES_TOKEN", raising=False)
    settings = reward(server, token_env="SCORES_TOKEN")
    expected = r"^reward\.token_env=SCORES_TOKEN: that environment variable is not set; export"
    with pytest.raises(ConfigError, match=expected):
        settings.load(CPU)
    monkeypatch.setenv("SCORES_TOKEN", "")
    with pytest.raises(ConfigError, match=expected):
        settings.load(CPU)
    for token in ("two words", "line\n", "ümlaut"):
        monkeypatch.setenv("SCORES_TOKEN", token)
        with pytest.raises(
            ConfigError, match="variable holds blanks or characters that are not ASCII"
        ) as e:
            settings.load(CPU)
        assert token not in str(e.value)


def problem(**settings: Any) -> str:
    """What a user is told of settings that are refused."""
    with pytest.raises(ValidationError) as caught:
        HttpReward(**{"url": "http://host"} | settings)
    (detail,) = caught.value.errors()
    return field_problem("reward", detail)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/x",
        "http://",
        "http:///path",
        "http://host:port",
        "http://host:99999",
        "http://host:0",
        "http://[::1",
        "http://ho st/x",
        "http://host/x\n",
        "host",
    ],
)
def test_what_is_no_url_is_refused(url):
    expected = f"reward.url={url!r}: give http://HOST:PORT/PATH or https://HOST/PATH"
    assert problem(url=url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@host/x",
        "https://s3cret@host",
        "http://:s3cret@host",
        "http://user:s3#cret@host",
        "http://user:s3/cret@host",
    ],
)
def test_a_password_in_the_url_is_refused_and_not_repeated(url):
    told = problem(url=url)
    assert told.startswith("reward.url seems to hold a user or a password")
    assert told.endswith("reward.token_env")
    assert "s3" not in told


@pytest.mark.parametrize(
    "url", ["http://host", "https://host:8/a@b?c=d@e", "http://[::1]:8000/x", "http://10.0.0.1:1"]
)
def test_urls_are_kept_as_they_are(url):
    assert HttpReward(url=url).url == url


@pytest.mark.parametrize("token", ["sk-s3cret", "s3cret token", "3s3cret", "s3cret.x.y", "s3é"])
def test_a_token_in_place_of_a_variables_name_is_refused_and_not_repeated(token):
    told = problem(token_env=token)
    assert told.startswith("reward.token_env is not the name of an environment variable")
    assert "s3" not in told


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"timeout_s": 0}, "above 0"),
        ({"max_retries": -1}, "at least 0"),
        ({"backoff_s": -0.1}, "at least 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"token_env": ""}, "a text that is not empty"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, said):
    assert said in problem(**wrong)
