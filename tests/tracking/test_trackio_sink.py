"""What is in trackio's database after a run, and that nothing leaves this machine."""

import json
import socket
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.runs.summary import Histogram
from rlhf_exp.tracking.trackio_sink import TrackioLogger

from .wandb_runs import info

HISTOGRAM = Histogram(counts=(1, 0, 2), edges=(0.0, 0.5, 1.0, 1.5))
Rows = list[tuple[str, str, int, dict[str, Any]]]


@pytest.fixture(scope="module", autouse=True)
def database(tmp_path_factory) -> Path:
    """The folder of trackio's database, which it reads from the environment when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        import trackio.utils

    assert folder == trackio.utils.TRACKIO_DIR
    return folder


def log_phases(path: Path, project: str, *phases: int, run_id: str = "ab12cd34") -> None:
    """A process that logs these phases."""
    run = replace(info(path, group="sweep"), run_id=run_id)
    logger = TrackioLogger(project=project)
    with RunFolder(path, lambda: logger.open(run)) as folder:
        folder.start()
        for phase in phases:
            folder.log(phase, {"eval/score": phase / 2})


def rows_of(database: Path, project: str) -> Rows:
    with sqlite3.connect(database / f"{project}.db") as connection:
        rows = connection.execute("select run_id, run_name, step, metrics from metrics").fetchall()
    connection.close()
    return [(run, name, step, json.loads(metrics)) for run, name, step, metrics in rows]


def test_every_metric_histogram_and_sample_stands_at_its_phase(tmp_path, database, capsys):
    logger = TrackioLogger(project="all")
    with RunFolder(tmp_path, lambda: logger.open(info(tmp_path))) as folder:
        folder.start()
        folder.log(2, {"eval/score": 0.5, "eval/kl": float("nan")})
        folder.log_samples(2, [{"prompt": f"p{i}", "score": i} for i in range(40)])
        folder.log_histograms(3, {"ratio": HISTOGRAM})
        folder.log_result({"after": {"eval/score": 0.5}})
    metrics, samples, histograms = rows_of(database, "all")
    assert metrics[2:] == (2, {"eval/score": 0.5, "eval/kl": "NaN"})
    assert samples[2] == 2
    table = samples[3]["samples"]
    assert table["_type"] == "trackio.table"
    assert table["_value"] == [{"prompt": f"p{i}", "score": i} for i in range(32)]
    bins = {"_type": "trackio.histogram", "bins": [0.0, 0.5, 1.0, 1.5], "values": [1, 0, 2]}
    assert histograms[2:] == (3, {"histogram/ratio": bins})
    assert "Trackio" not in capsys.readouterr().out


def test_a_resumed_run_is_the_same_run_and_another_of_its_name_is_not(tmp_path, database):
    log_phases(tmp_path / "a", "resumed", 0, 1)
    log_phases(tmp_path / "a", "resumed", 2)
    log_phases(tmp_path / "b", "resumed", 0, run_id="ffff0000")  # the same job of another sweep
    rows = rows_of(database, "resumed")
    assert [step for _, _, step, _ in rows] == [0, 1, 2, 0]
    assert len({run for run, *_ in rows[:3]}) == 1
    assert rows[3][0] != rows[0][0]
    assert [name for _, name, _, _ in rows[2:]] == ["run-ab12cd34", "run-ffff0000"]


def test_nothing_is_looked_up_or_connected_to_though_there_be_a_token(
    tmp_path, database, monkeypatch
):
    asked: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    log_phases(tmp_path, "offline", 0, 1)
    assert len(rows_of(database, "offline")) == 2
    assert asked == []


def test_a_database_that_cannot_be_written_costs_nothing_but_itself(tmp_path, database):
    (database / "blocked.db").mkdir()
    with pytest.warns(UserWarning, match="trackio"):
        log_phases(tmp_path, "blocked", 0, 1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
