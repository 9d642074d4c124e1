"""The commands of scripts that messages name."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_exp.machine import locations
from rlhf_exp.machine.locations import script_command


def test_the_command_of_a_script_runs_it_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    python, script, *words = shlex.split(script_command("compare", "a run", "--help"))
    assert (python, words) == ("python", ["a run", "--help"])
    done = subprocess.run([sys.executable, script, *words], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith(b"usage: compare.py")


def test_an_installed_copy_runs_its_script_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "REPOSITORY", None)
    command = f"{sys.executable} -m rlhf_exp.scripts.compare run"
    assert script_command("compare", "run") == command
