"""W&B is run for real, offline: nothing here reaches further than this machine."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from pydantic import ValidationError

from rlhf_exp.network import reachable
from rlhf_exp.settings import ConfigError
from rlhf_exp.training.folder import Sink
from rlhf_exp.training.loggers import LocalLogger, Logger, RunInfo, WandbLogger

KEY = "a" * 40
ROW = {"prompt": "a", "completion": "[b]", "score": 0.5}


@pytest.fixture(scope="module", autouse=True)
def wandb_folders(tmp_path_factory):
    """W&B's own folders, which it reads once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(tmp_path_factory.mktemp("wandb")))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        wandb.teardown()
        yield
        wandb.teardown()


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

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{http.server_port}")
        wandb.teardown()
        yield asked
        wandb.teardown()
        http.shutdown()


def info(folder: Path, name: str = "run", group: str | None = None) -> RunInfo:
    return RunInfo(
        name=name,
        group=group,
        job_type="ppo",
        config={"stage": {"kl_coef": 0.25}, "seed": 1},
        shared_folder=folder / "shared",
    )


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "shared" / "wandb").glob("offline-run-*"))


def inspect(run: Path, option: str) -> list[dict[str, Any]]:
    """What W&B's own reader finds in a run's directory: its records, or with --summary one."""
    options = ["--json", *filter(None, [option])]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return (
        json.loads(f"[{done.stdout}]")
        if option
        else [*map(json.loads, done.stdout.split("\n")[:-1])]
    )


def opens(logger: WandbLogger, folder: Path) -> str:
    """Whether the logger runs W&B offline, or nothing."""
    with logger.open(info(folder)) as sinks:
        if not sinks:
            assert not (folder / "shared").exists()
            return "disabled"
    assert len(offline_runs(folder)) == 1
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


def test_a_key_in_the_netrc_counts_if_it_is_the_servers(tmp_path, monkeypatch, server, caplog):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine github.com\n login wandb\n password {KEY}\n")
    assert opens(WandbLogger(), tmp_path / "a") == "offline"
    assert server == []
    assert "refuses" not in caplog.text
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


def test_a_server_that_refuses_is_given_up_with_a_warning(tmp_path, monkeypatch, server, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert opens(WandbLogger(), tmp_path) == "offline"
    assert server != []
    assert any("the server refuses" in message for message in caplog.messages)


@pytest.mark.parametrize(("mode", "environment"), [("online", None), ("auto", "online")])
def test_a_server_that_refuses_is_an_error_where_online_is_asked_for(
    tmp_path, monkeypatch, server, mode, environment
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    with (
        pytest.raises(ConfigError, match=r"logger\.mode=online: W&B refuses"),
        WandbLogger(mode=mode).open(info(tmp_path)),
    ):
        pass
    assert server != []


def test_runs_of_one_process_stay_apart_and_hold_what_they_were_given(tmp_path, caplog, capfd):
    logger = WandbLogger(mode="offline", project="films", tags=("first",))
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
    [failed] = {*offline_runs(tmp_path)} - {run}
    assert any(f"wandb sync {run}" in message for message in caplog.messages)
    with ThreadPoolExecutor() as pool:
        first, second, records = pool.map(
            inspect, (failed, run, run), ("--summary", "--summary", "")
        )

    [first], [second] = first, second
    assert (first["name"], first["state"], first["exit_code"]) == ("job 0", "failed", 1)
    assert first["summary"]["eval/score"] == 0.125
    assert (second["name"], second["state"], second["exit_code"]) == ("job 1", "finished", 0)
    assert (second["project"], second["tags"]) == ("films", ["first"])
    assert second["config"]["stage"]["kl_coef"] == 0.25
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
    assert table["columns"] == ["prompt", "completion", "score"]
    assert table["data"] == [["a", "[b]", i] for i in range(32)]


# W&B's processes are killed in a process of their own, where nothing else is left without them.
DIES = """
import logging, psutil, sys
from pathlib import Path
from rlhf_exp.training.folder import RunFolder
from rlhf_exp.training.loggers import RunInfo, WandbLogger

logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
logging.getLogger("wandb").disabled = True
path = Path(sys.argv[1])
info = RunInfo(name="run", group=None, job_type="ppo", config={}, shared_folder=path)
with RunFolder(path, lambda: WandbLogger(mode="offline").open(info)) as folder:
    folder.start()
    folder.log(1, {"a": 1.0})
    killed = [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]
    for process in killed:
        process.kill()
    psutil.wait_procs(killed, timeout=10)
    for phase in (2, 3, 4):
        folder.log(phase, {"a": 1.0})
    folder.log_samples(4, [{"prompt": "a"}])
print(len(killed) > 0, [row["phase"] for row in folder.rows()])
"""


def test_a_run_goes_on_without_wandb_when_its_process_dies(tmp_path):
    command = [sys.executable, "-c", DIES, str(tmp_path)]
    # Without the address of this process's W&B, which it would join.
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "True [1, 2, 3, 4]"
    warned = [line.partition(" (")[0] for line in lines if line.startswith("W&B")]
    assert warned == ["W&B failed", "W&B could not finish its run"]


@pytest.mark.parametrize("field", [{"mode": "onlin"}, {"project": ""}, {"tags": "abc"}, {"key": 1}])
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(ValidationError, match="1 validation error"):
        WandbLogger(**field)
