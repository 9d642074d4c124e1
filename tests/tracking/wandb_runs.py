"""W&B run for real, offline or towards a server of this machine, and read back."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb

from rlhf_exp.tracking.protocol import RunInfo


@contextmanager
def own_folders(path: Path) -> Iterator[None]:
    """W&B's own folders, which it reads once, in there."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(path))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        wandb.teardown()
        yield
        wandb.teardown()


def info(folder: Path, name: str = "run", group: str | None = None) -> RunInfo:
    return RunInfo(
        name=name,
        group=group,
        job_type="ppo",
        config={"stage": {"kl_coef": 0.25}, "seed": 1},
        shared_folder=folder / "shared",
    )


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


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
