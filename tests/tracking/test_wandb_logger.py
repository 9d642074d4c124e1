"""W&B is run for real, offline: nothing here reaches further than this machine."""

import gzip
import json
import logging
import os
import pwd
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from pydantic import ValidationError

from rlhf_exp.machine.network import reachable
from rlhf_exp.runs.folder import RunFolder, Sink
from rlhf_exp.settings import ConfigError
from rlhf_exp.tracking import wandb_logger, wandb_thread
from rlhf_exp.tracking.protocol import LocalLogger, Logger
from rlhf_exp.tracking.wandb_logger import WandbLogger

from .wandb_runs import info, inspect, offline_runs, own_folders

KEY = "a" * 40
SOAK = pytest.mark.soak
ROW = {"prompt": "a", "completion": "[b]", "score": 0.5}


@pytest.fixture(scope="module", autouse=True)
def wandb_folders(tmp_path_factory):
    with own_folders(tmp_path_factory.mktemp("wandb")):
        yield


@pytest.fixture(autouse=True)
def no_key_and_no_mode(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="rlhf_exp")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the logger sets
        monkeypatch.delenv(name)
    reachable.cache_clear()
    yield
    reachable.cache_clear()


@pytest.fixture
def server(monkeypatch) -> Iterator[list[str]]:
    """A server that W&B is sent to and that refuses everything; the paths it was asked for."""
    asked: list[str] = []

    def refuse(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        answer(request, 401, b"")

    with serving(refuse) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        wandb.teardown()
        yield asked
        wandb.teardown()


@contextmanager
def serving(respond: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The URL of a server that responds to every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            respond(self)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def reset(request: BaseHTTPRequestHandler) -> None:
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.close_connection = True


def opens(logger: WandbLogger, folder: Path) -> str:
    """Whether the logger runs W&B offline, or nothing."""
    with logger.open(info(folder)) as sinks:
        if not sinks:
            assert not (folder / "shared").exists()
            return "disabled"
    assert len(offline_runs(folder / "shared")) == 1
    return "offline"


def test_the_local_logger_adds_nothing(tmp_path):
    assert isinstance(LocalLogger(), Logger)
    with LocalLogger().open(info(tmp_path)) as sinks:
        assert sinks == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", "disabled", "disabled"),
        ("auto", "offline", "offline"),
        ("auto", None, "offline"),
        ("disabled", "offline", "disabled"),
        ("offline", "disabled", "offline"),
    ],
)
def test_without_a_key_the_mode_is_what_is_asked_for_or_offline(
    tmp_path, monkeypatch, mode, environment, expected
):
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert opens(WandbLogger(mode=mode), tmp_path) == expected


def test_a_resumed_run_is_the_same_run(tmp_path):
    for _ in range(2):
        given = replace(info(tmp_path), run_id="ab12cd34")
        with WandbLogger(mode="offline").connect(given) as run:
            assert run is not None
            assert run._run.id == "ab12cd34"
    names = [run.name for run in offline_runs(tmp_path / "shared")]
    assert names, "wandb sync puts those of one id together"
    assert all("ab12cd34" in name for name in names), names


def test_an_agents_id_does_not_send_a_resumed_run_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "another1")
    wandb.teardown()
    given = replace(info(tmp_path), run_id="ab12cd34")
    with WandbLogger(mode="offline").connect(given) as run:
        assert run is not None
        assert run._run.id == "ab12cd34"
        assert run._run.sweep_id == "sweep123"
    assert os.environ["WANDB_RUN_ID"] == "another1"
    wandb.teardown()


def test_a_key_in_the_netrc_counts_if_it_is_the_servers(tmp_path, monkeypatch, server, caplog):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine github.com\n login wandb\n password {KEY}\n")
    assert opens(WandbLogger(), tmp_path / "a") == "offline"
    assert server == []
    assert "cannot start" not in caplog.text
    host = os.environ["WANDB_BASE_URL"].removeprefix("http://")
    netrc.write_text(f"machine {host}\n login user\n password {KEY}\n")
    assert opens(WandbLogger(), tmp_path / "b") == "offline"
    assert server != []


def test_a_server_out_of_reach_is_given_up_at_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    assert opens(WandbLogger(), tmp_path) == "offline"
    assert time.monotonic() - start < 5
    assert "W&B: http://127.0.0.1:9 is out of reach, logging offline" in caplog.messages


NO_ANSWER = "no usable answer within 2 s"


@pytest.mark.parametrize(
    ("respond", "reason"),
    [
        pytest.param(lambda r: answer(r, 401, b"who are you?"), ".*returned error 401.*", id="401"),
        pytest.param(
            lambda r: answer(r, 403, b"no"), ".*returned error 403.*", id="403", marks=SOAK
        ),
        pytest.param(lambda r: answer(r, 500, b"{}"), NO_ANSWER, id="500", marks=SOAK),
        pytest.param(
            lambda r: answer(r, 200, b"<html>Log in</html>"),
            "the server's answer is not W&B's.*",
            id="html",
        ),
        pytest.param(reset, NO_ANSWER, id="reset", marks=SOAK),
        pytest.param(lambda _: time.sleep(20), NO_ANSWER, id="hang"),
    ],
)
def test_a_server_that_refuses_has_the_run_offline(tmp_path, monkeypatch, caplog, respond, reason):
    monkeypatch.setattr(wandb_logger, "INIT_S", 2)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving(respond) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        wandb.teardown()
        start = time.monotonic()
        assert opens(WandbLogger(), tmp_path) == "offline"
    assert time.monotonic() - start < 15
    assert_one_warning(caplog, rf"W&B cannot start online \({reason}\); logging offline")


def assert_one_warning(caplog, pattern: str) -> None:
    [warning] = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert re.fullmatch(pattern, warning), warning


@SOAK
def test_a_proxy_that_is_dead_has_the_run_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_logger, "INIT_S", 2)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    wandb.teardown()
    assert opens(WandbLogger(), tmp_path) == "offline"
    assert_one_warning(caplog, rf"W&B cannot start online \({NO_ANSWER}\); logging offline")


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WANDB_BASE_URL", "http://127.0.0.1:99999", "invalid port number"),
        ("WANDB_BASE_URL", "http://127.0.0.1:port", "invalid port number"),
        ("WANDB_BASE_URL", "http://[::1", "invalid IPv6 address"),
        ("WANDB_BASE_URL", "nowhere", "relative URL without a base"),
        ("WANDB_TAGS", "a" * 65, "Tag 'a.*' is 65 characters.*"),
    ],
)
def test_a_variable_that_wandb_cannot_read_has_the_run_offline_without_it(
    tmp_path, monkeypatch, caplog, key, name, value, reason
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", key or "")
    monkeypatch.setenv(name, value)
    wandb.teardown()
    assert opens(WandbLogger(), tmp_path) == "offline"
    [*before, last] = [r.message for r in caplog.records if r.levelname == "WARNING"]
    url = os.environ["WANDB_BASE_URL"]
    assert before == ([f"W&B: {url} is out of reach, logging offline"] if key else [])
    assert re.fullmatch(
        rf"W&B cannot start offline \(.*{reason}\); trying again without the WANDB_\* variables",
        last,
    )


def test_a_user_without_a_home_has_the_run_offline(tmp_path, monkeypatch, caplog):
    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    with WandbLogger().open(info(tmp_path)) as [sink]:
        sink.log_samples(1, [ROW])
    assert len(offline_runs(tmp_path / "shared")) == 1
    assert any(file.is_file() for file in (tmp_path / "shared" / "wandb" / "data").rglob("*"))
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == []
    assert "HOME" not in os.environ


def test_a_netrc_that_cannot_be_read_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NETRC", "/proc/self/mem")  # which is refused even to root
    assert opens(WandbLogger(), tmp_path) == "offline"
    assert_one_warning(caplog, r"W&B: no key can be read \(.*Input/output error.*\)")


@pytest.mark.parametrize(("mode", "environment"), [("online", None), ("auto", "online")])
def test_a_server_that_refuses_is_an_error_where_online_is_asked_for(
    tmp_path, monkeypatch, server, mode, environment
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    with (
        pytest.raises(ConfigError, match=r"logger\.mode=online: W&B cannot start online \(.*401"),
        WandbLogger(mode=mode).open(info(tmp_path)),
    ):
        pass
    assert server != []


def test_runs_of_one_process_stay_apart_and_hold_what_they_were_given(tmp_path, caplog, capfd):
    logger = WandbLogger(mode="offline", project="films", tags=("first",), notes="why")
    # The second begins before the first is over, as after a job that could not end its run.
    with pytest.raises(KeyboardInterrupt), logger.open(info(tmp_path, "job 0")) as sinks:  # noqa: PT012
        sinks[0].log(1, {"eval/score": 0.125})
        with logger.open(info(tmp_path, "job 1", group="sweep")) as [sink]:
            assert isinstance(sink, Sink)
            sink.log(1, {"eval/score": 0.25})
            sink.log(2, {"eval/score": 0.75, "lr/base": 1e-4})
            sink.log_samples(2, [{**ROW, "score": i} for i in range(40)])
        raise KeyboardInterrupt
    assert "Traceback" not in capfd.readouterr().err
    # Both began within the same second, so their names do not tell them apart.
    [run] = {path.parents[3] for path in (tmp_path / "shared").rglob("*.table.json")}
    [failed] = {*offline_runs(tmp_path / "shared")} - {run}
    assert any(f"wandb sync {run}" in message for message in caplog.messages)
    with ThreadPoolExecutor() as pool:
        first, second, records = pool.map(
            inspect, (failed, run, run), ("--summary", "--summary", "")
        )

    [first], [second] = first, second
    assert (first["name"], first["state"], first["exit_code"]) == ("job 0", "failed", 1)
    assert first["summary"]["eval/score"] == 0.125
    assert (second["name"], second["state"], second["exit_code"]) == ("job 1", "finished", 0)
    assert (second["project"], second["tags"], second["notes"]) == ("films", ["first"], "why")
    assert second["config"] == {"run": "job 1", "stage": {"kl_coef": 0.25}, "seed": 1}
    assert second["summary"]["eval/score"] == 0.75

    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [(row["phase"], row.get("eval/score")) for row in history] == [
        (1, 0.25),
        (2, 0.75),
        (2, None),
    ]
    described = next(r["run"] for r in records if r["type"] == "run")
    assert (described["run_group"], described["job_type"]) == ("sweep", "ppo")
    metrics = [r["metric"] for r in records if r["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m["step_metric"] == "phase" for m in metrics)
    [table] = [json.loads(path.read_text()) for path in run.rglob("*.table.json")]
    assert table["columns"] == ["phase", "prompt", "completion", "score"]
    assert table["data"] == [[2, "a", "[b]", i] for i in range(32)]


# In a process of its own, where nothing is left without W&B's processes, and whose end is seen.
SIGNALLED = """
import logging, psutil, signal, sys, time
from pathlib import Path
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.tracking.protocol import RunInfo
from rlhf_exp.tracking.wandb_logger import WandbLogger

logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
path, name = Path(sys.argv[1]), sys.argv[2]
info = RunInfo(name="run", group=None, job_type="ppo", config={}, shared_folder=path)
with RunFolder(path, lambda: WandbLogger(mode="offline", finish_s=15).open(info)) as folder:
    folder.start()
    folder.log(1, {"a": 1.0})
    folder.log_samples(1, [{"prompt": "a"}])
    own = [p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core"]
    assert own
    if name != "none":
        own[0].send_signal(getattr(signal, name))
    if name == "SIGKILL":
        psutil.wait_procs(own, timeout=10)
    start = time.monotonic()
    for phase in (2, 3, 4):
        folder.log(phase, {"a": 1.0})
        time.sleep(0.1)
    folder.log_samples(4, [{"prompt": "a"}])
    took = time.monotonic() - start
print(took < 1, [row["phase"] for row in folder.rows()], own[0].pid)
"""


@pytest.mark.parametrize(
    ("signal", "warning"),
    [
        pytest.param("none", None, marks=SOAK),
        pytest.param("SIGKILL", "W&B failed (", marks=SOAK),  # as in test_faults.py
        pytest.param(
            "SIGSTOP", "W&B failed (not finished after 1 s; later: wandb sync ", marks=SOAK
        ),
    ],
)
def test_a_run_goes_on_and_ends_when_wandbs_service_dies_or_stops(tmp_path, signal, warning):
    script = SIGNALLED.replace("finish_s=15", "finish_s=1") if signal == "SIGSTOP" else SIGNALLED
    home, path = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    # Without the address of this process's W&B, which it would join, and W&B's folders.
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**own, "HOME": str(home), "WANDB_ERROR_REPORTING": "false"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), signal], env=environment, capture_output=True,
        text=True, timeout=100, check=True,
    )  # fmt: skip
    assert time.monotonic() - start < 60
    *said, last = done.stdout.splitlines()
    words, _, pid = last.rpartition(" ")
    assert words == "True [1, 2, 3, 4]"
    assert len(said) == (warning is not None), said
    assert all(line.startswith(warning) for line in said), said
    assert done.stderr == ""
    assert not psutil.pid_exists(int(pid))
    assert [*home.iterdir()] == []
    staged = [*(path / "wandb" / "data").rglob("*")]
    assert any(file.is_file() for file in staged)


class Serves(BaseHTTPRequestHandler):
    """As much of W&B's server as lets a run begin, go on and send its rows."""

    def do_POST(self) -> None:
        self.server.wait()
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        asked = json.loads(body or b"{}")
        if "files" in asked:
            self.keep(**asked["files"].get("wandb-history.jsonl", {"offset": 0, "content": []}))
        answer(self, 200, json.dumps(self.reply(**asked)).encode())

    do_GET = do_POST

    def keep(self, offset: int, content: list[str]) -> None:
        self.server.history |= enumerate(map(json.loads, content), offset)

    def reply(self, query: str = "", variables: Any = None, **_: Any) -> dict[str, Any]:
        rows, name = self.server.history, (variables or {}).get("name")
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
        bucket |= {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
        if "upsertBucket" in query:
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": not rows}}}
        if "RunResumeStatus" in query and rows:
            last = json.dumps({key: rows[len(rows) - 1][key] for key in ("_step", "_runtime")})
            bucket |= {"historyTail": json.dumps([last]), "summaryMetrics": last}
            bucket |= {"eventsTail": "[]", "tags": [], "wandbConfig": '{"t": {"1": [1]}}'}
            return {"data": {"model": {**project, "bucket": bucket}}}
        if "createRunFiles" in query:
            return {"errors": [{"message": "files are not kept"}]}
        return {"data": {}}

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """It answers, until it `dies` or `hangs`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Serves)
        self.history: dict[int, dict[str, Any]] = {}
        self.answers = threading.Event()
        self.answers.set()
        self.wait: Callable[[], bool] = self.answers.wait
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def dies(self) -> None:
        self.shutdown()
        self.server_close()

    def hangs(self) -> None:
        self.answers.clear()


def test_the_offline_parts_of_a_resumed_run_are_one_after_sync(tmp_path, monkeypatch):
    parts = ([1, 2, 3, 4], [5, 6, 7])
    for phases in parts:
        given = replace(info(tmp_path), run_id="ab12cd34")
        with WandbLogger(mode="offline").open(given) as [sink]:
            for phase in phases:
                sink.log(phase, {"eval/score": phase / 8})
        time.sleep(1)  # W&B sorts them by their names, which have seconds
    server = Server()
    command = [sys.executable, "-m", "wandb", "sync", *map(str, offline_runs(tmp_path / "shared"))]
    url = f"http://127.0.0.1:{server.server_port}"
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment = {**own, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
    subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=True
    )
    server.dies()
    rows = [server.history[i] for i in range(len(server.history))]
    assert [row["phase"] for row in rows] == [*parts[0], *parts[1]]
    assert [row["_step"] for row in rows] == [*range(7)]


@pytest.mark.parametrize("how", [pytest.param("dies", marks=SOAK), "hangs"])
def test_a_server_that_goes_away_holds_nothing_up(tmp_path, monkeypatch, caplog, how):
    monkeypatch.setattr(wandb_thread, "SERVICE_S", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    wandb.teardown()
    logger = WandbLogger(mode="online", finish_s=1)
    with RunFolder(tmp_path, lambda: logger.open(info(tmp_path))) as folder:
        folder.start()
        folder.log(1, {"eval/score": 0.5})
        time.sleep(0.5)
        getattr(server, how)()
        start = time.monotonic()
        for phase in range(2, 50):
            folder.log(phase, {"eval/score": 0.25})
        assert time.monotonic() - start < 1
    assert time.monotonic() - start < 10
    server.answers.set()
    assert [row["phase"] for row in folder.rows()] == [*range(1, 50)]
    [warning] = [message for message in caplog.messages if message.startswith("W&B failed")]
    [run] = (tmp_path / "shared" / "wandb").glob("run-*")
    assert f"later: wandb sync {run})" in warning
    [kept] = inspect(run, "--summary")
    assert kept["summary"]["best/eval_score"] == 0.5
    assert not [p for p in psutil.Process().children() if p.name().startswith("wandb-")]

    server.dies()
    monkeypatch.delenv("WANDB_BASE_URL")
    assert opens(WandbLogger(mode="offline"), tmp_path / "next") == "offline"


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "wandb").write_text("a file")
    with RunFolder(tmp_path, lambda: WandbLogger(mode="offline").open(info(tmp_path))) as folder:
        folder.start()
        folder.log(1, {"a": 1.0})
    [warning] = [message for message in caplog.messages if message.startswith("W&B")]
    assert re.fullmatch(
        r"W&B cannot start \(.*File exists: .*wandb'\); going on without it", warning
    )
    assert [row["phase"] for row in folder.rows()] == [1]


BETWEEN = """
import logging, psutil, sys
from pathlib import Path
from rlhf_exp.tracking.protocol import RunInfo
from rlhf_exp.tracking.wandb_logger import WandbLogger

logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
path = Path(sys.argv[1])
for name in "abc":
    info = RunInfo(name=name, group=None, job_type="ppo", config={}, shared_folder=path / name)
    with WandbLogger(mode="offline").open(info) as sinks:
        print(name, len(sinks))
    if name == "a":
        [service] = [p for p in psutil.Process().children() if p.name() == "wandb-core"]
        service.kill()
        service.wait()
"""


def test_a_service_that_died_between_two_runs_costs_neither(tmp_path):
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN, str(tmp_path)],
        env={**own, "WANDB_ERROR_REPORTING": "false"},
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    first, warning, second, third = done.stdout.splitlines()
    assert (first, second, third) == ("a 1", "b 1", "c 1")
    assert re.fullmatch(r"W&B cannot start offline \(.+\); trying again without.*", warning)
    assert done.stderr == ""


def test_what_wandb_would_put_into_the_home_is_the_users_to_place(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "theirs"))
    monkeypatch.delenv("WANDB_CACHE_DIR")
    with WandbLogger(mode="offline").open(info(tmp_path)):
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "theirs")
        assert os.environ["WANDB_CACHE_DIR"] == str(tmp_path / "shared" / "wandb" / "cache")
    assert "WANDB_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"project": "me/films"}, r"W&B takes no / in this name"),
        ({"project": "a?b:c"}, r"W&B takes no : \? in this name"),
        ({"project": "a" * 129}, r"129 characters; W&B takes 128"),
        ({"entity": "me/films"}, r"W&B takes no / in this name"),
        ({"entity": ""}, r"at least 1 character"),
        ({"tags": ("a", "b" * 65)}, r"W&B takes tags of 1 to 64 characters, which 'b+' is not"),
        ({"tags": ("a", "")}, r"W&B takes tags of 1 to 64 characters, which '' is not"),
        ({"tags": ("a", "b", "a")}, r"W&B takes each tag once, and 'a' is repeated"),
    ],
)
def test_what_wandb_would_refuse_later_is_refused_at_once(field, message):
    with pytest.raises(ValidationError, match=message):
        WandbLogger(**field)


def test_names_as_long_as_wandb_takes_them_are_fine():
    logger = WandbLogger(project="a" * 128, entity="b" * 128, tags=("c" * 64, "d"))
    assert logger.problems(name="n" * 128, group="g" * 128) == []


def test_folders_whose_names_wandb_would_refuse_later_are_refused_at_once(monkeypatch):
    name, group = "n" * 129, "g" * 130
    [of_run, of_sweep] = WandbLogger().problems(name=name, group=group)
    assert of_run.startswith("the name of the run's folder has 129 characters, and W&B takes 128")
    assert of_sweep.startswith("the name of the sweep's folder has 130 characters, and W&B takes")
    assert WandbLogger(mode="disabled").problems(name=name, group=group) == []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbLogger().problems(name=name, group=group) == []
    assert LocalLogger().problems(name=name, group=group) == []


@pytest.mark.parametrize(
    "field", [{"mode": "onlin"}, {"project": ""}, {"tags": "abc"}, {"finish_s": 0}, {"key": 1}]
)
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(ValidationError, match="1 validation error"):
        WandbLogger(**field)
