"""What W&B is told of a run, as W&B's own reader finds it in an offline run."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.runs.summary import Histogram
from rlhf_exp.tracking.wandb_logger import WandbLogger

from .wandb_runs import info, inspect, offline_runs, own_folders

HISTOGRAM = Histogram(counts=(1, 0, 2), edges=(0.0, 0.5, 1.0, 1.5))


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    """The folder of a run with two evaluations and a model, W&B's records of it, its summary."""
    path = tmp_path_factory.mktemp("run")
    (path / "model" / "adapter").mkdir(parents=True)
    for name in ("config.json", "adapter/weights"):
        (path / "model" / name).write_text(name)
    logger = WandbLogger(mode="offline", log_model=True)
    with (
        own_folders(tmp_path_factory.mktemp("wandb")),
        RunFolder(path, lambda: logger.open(info(path))) as folder,
    ):
        folder.start()
        for phase, score in ((0, 0.75), (2, 0.5)):
            folder.log(phase, {"eval/score": score, "eval/kl": phase / 8})
            rows = [{"prompt": f"p{i}", "score": score + i, "exact": i > 0} for i in range(2)]
            folder.log_samples(phase, rows)
            folder.log_histograms(phase + 1, {"ratio": HISTOGRAM})
        folder.log_samples(3, [])
        folder.log_result({"after": {"eval/score": 0.5}})
    [run] = offline_runs(path / "shared")
    [summary] = inspect(run, "--summary")
    return path, inspect(run, ""), summary["summary"]


def test_every_evaluation_has_its_table_under_one_key_with_the_same_columns(told):
    _, records, _ = told
    items = [r["history"]["item"] for r in records if r["type"] == "history"]
    logged = [item for item in items if "samples._type" in item]
    assert [item["phase"] for item in logged] == [0, 2]
    artifacts = [r["artifact"] for r in records if r["type"] == "artifact"]
    staged = [
        json.loads(Path(a["manifest"]["contents"][0]["local_path"]).read_text())
        for a in artifacts
        if a["type"] == "run_table"
    ]
    assert [table["columns"] for table in staged] == [["phase", "prompt", "score", "exact"]] * 2
    assert [table["data"] for table in staged] == [
        [[0, "p0", 0.75, False], [0, "p1", 1.75, True]],
        [[2, "p0", 0.5, False], [2, "p1", 1.5, True]],
    ]


def test_histograms_are_at_their_phase(told):
    _, records, _ = told
    items = [r["history"]["item"] for r in records if r["type"] == "history"]
    logged = [item for item in items if "histogram/ratio._type" in item]
    assert [item["phase"] for item in logged] == [1, 3]
    for item in logged:
        assert item["histogram/ratio.values"] == [1, 0, 2]
        assert item["histogram/ratio.bins"] == [0.0, 0.5, 1.0, 1.5]


def test_the_summary_has_plain_numbers_of_the_best_and_the_last(told):
    _, _, summary = told
    found = {k: v for k, v in summary.items() if k.startswith(("best/", "final/", "eval/"))}
    assert found == {
        "best/eval_score": 0.75,
        "best/phase": 0,
        "final/eval_score": 0.5,
        "final/eval_kl": 0.25,
        "eval/score": 0.5,
        "eval/kl": 0.25,
    }


def test_the_model_is_an_artifact_if_that_is_asked_for(told):
    path, records, _ = told
    [model] = [
        r["artifact"]
        for r in records
        if r["type"] == "artifact" and r["artifact"]["type"] == "model"
    ]
    files = {entry["path"]: entry["local_path"] for entry in model["manifest"]["contents"]}
    assert files == {
        name: str(path / "model" / name) for name in ("config.json", "adapter/weights")
    }
    assert json.loads(model["metadata"]) == {"after": {"eval/score": 0.5}}


def test_no_model_is_sent_unasked_or_where_there_is_none(tmp_path_factory):
    for log_model, has_model in ((False, True), (True, False)):
        path = tmp_path_factory.mktemp("run")
        if has_model:
            (path / "model").mkdir()
            (path / "model" / "weights").write_text("")
        logger = WandbLogger(mode="offline", log_model=log_model)
        with (
            own_folders(tmp_path_factory.mktemp("wandb")),
            RunFolder(path, lambda: logger.open(info(path))) as folder,  # noqa: B023
        ):
            folder.start()
            folder.log_result({})
        [run] = offline_runs(path / "shared")
        assert not [r for r in inspect(run, "") if r["type"] == "artifact"]
