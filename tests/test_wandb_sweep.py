"""The search that a W&B agent drives: what it would start is a run that passes every check."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from rlhf_exp.app.run import ALLOWED_TARGETS, CONF, instantiate, to_container
from rlhf_exp.app.steps import read_steps
from rlhf_exp.runs.summary import summarize
from tests.app.test_run import OFFLINE, TINY
from tests.forked import Command

from .tracking.wandb_runs import inspect, offline_runs

SWEEP = yaml.safe_load((CONF.parent / "scripts" / "wandb_sweep.yaml").read_text(encoding="utf-8"))


def ends(parameter: dict[str, Any]) -> list[Any]:
    """The least and the greatest value of a parameter."""
    values = parameter.get("values") or [parameter["min"], parameter["max"]]
    assert len(values) > 1
    assert values == sorted(values)
    return [values[0], values[-1]]


def command(parameters: dict[str, Any]) -> list[str]:
    """What W&B's agent would start, by its own functions."""
    # Here, since to import them takes a second, which the processes that run other tests save.
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    given = {"args": {name: {"value": value} for name, value in parameters.items()}}
    holes = create_sweep_command_args(given)
    holes |= {"program": [SWEEP["program"]], "env": ["/usr/bin/env"]}
    words = []
    for word in create_sweep_command(SWEEP["command"]):
        words += holes[word[2:-1]] if word.startswith("${") else [word]
    return words


@pytest.mark.parametrize("end", [0, -1])
def test_the_agent_starts_a_run_that_passes_every_check(end: int) -> None:
    chosen = {name: ends(parameter)[end] for name, parameter in SWEEP["parameters"].items()}
    env, python, program, *overrides = command(chosen)
    assert (env, python) == ("/usr/bin/env", "python")
    assert (CONF.parent / program).is_file()
    assert len(overrides) == len(chosen)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", overrides=overrides)
    for name, value in chosen.items():
        assert OmegaConf.select(cfg, name) == value
    build = functools.partial(instantiate, allowed=ALLOWED_TARGETS)
    for step in read_steps(to_container(cfg)):
        step.build(build)


def test_what_it_maximizes_is_logged() -> None:
    metric = SWEEP["metric"]
    row = {"phase": 0, "eval/score": 0.5}
    assert metric["name"] in {**row, **summarize([row])}
    assert metric["goal"] == "maximize"
    assert SWEEP["method"] in ("bayes", "random", "grid")


def test_the_runs_of_a_sweep_lie_in_one_folder_and_are_told_apart(tmp_path: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment = {**kept, **OFFLINE, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    # As under an agent whose program is a sweep of Hydra: its one id cannot be that of every job.
    environment |= {"WANDB_SWEEP_ID": "sweep123", "WANDB_RUN_ID": "agent-07"}
    words = ("-m", "seed=1,2", "stage.histograms_every=1", *TINY)
    with Command(tmp_path, *words, environment=environment) as sweeping:
        assert sweeping.wait() == 0, sweeping.said()
    [sweep] = tmp_path.glob("outputs/run/sweeps/*")
    runs = offline_runs(sweep)
    assert len(runs) == len([*sweep.rglob("*.wandb")]) == 2
    summaries = [summary for run in runs for summary in inspect(run, "--summary")]
    found = {summary["config"]["seed"]: summary for summary in summaries}
    assert found.keys() == {1, 2}
    for seed, summary in found.items():
        assert (summary["name"], summary["state"]) == (f"{seed - 1}_seed={seed}", "finished")
        lines = (sweep / summary["name"] / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert summarize(rows).items() <= summary["summary"].items()
        assert summary["summary"]["phase"] == 2
        assert summary["summary"]["samples"]["nrows"] == 8
        assert sum(summary["summary"]["histogram/ratio"]["values"]) == 8 * 6
        own = (sweep / summary["name"] / "run_id.txt").read_text()
        assert summary["run_id"] == own.strip() != "agent-07"
