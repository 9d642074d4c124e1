"""docs/sweeps.md: its commands compose, and what it names is there."""

import re
import shlex
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from rlhf_exp.app import run

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0]
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S)
    for line in block.splitlines()
]
IN_TABLES = [
    word
    for line in PAGE.splitlines()
    if line.startswith("|")
    for word in re.findall("`(.+?)`", line)
]


def compose(*words: str) -> None:
    with hydra.initialize_config_dir(str(run.CONF), version_base="1.3"):
        config = hydra.compose("config", overrides=list(words), return_hydra_config=True)
    target = config.hydra.sweeper["_target_"].rpartition(".")[2]
    assert target == ("SearchSweeper" if "sweep=search" in words else "GridSweeper")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_a_command_of_train_composes(command):
    words = shlex.split(command)[2:]
    assert words[0] == "-m"
    compose(*(word for word in words if not word.startswith("-")))


def test_every_command_is_of_a_program_that_is_there():
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        program, first = shlex.split(command)[:2]
        assert program in (".venv/bin/python", ".venv/bin/wandb")
        if program == ".venv/bin/python":
            assert (ROOT / first).is_file()
    scripts = re.findall(r"`(scripts/compare\.py [^`]*)`", PAGE)
    options = {w for s in scripts for w in shlex.split(s) if w.startswith("--")}
    source = (ROOT / "scripts" / "compare.py").read_text(encoding="utf-8")
    assert all(f'"{option}"' in source for option in options)


@pytest.mark.parametrize(
    "words",
    [w for w in IN_TABLES if w.startswith(("sweep=", "hydra/launcher=")) and "ray" not in w],
)
def test_what_a_table_names_can_be_chosen(words):
    compose(*shlex.split(words))


def test_keys_and_files_that_the_page_names_are_there():
    with hydra.initialize_config_dir(str(run.CONF), version_base="1.3"):
        config = hydra.compose("config", return_hydra_config=True)
        search = hydra.compose("config", overrides=["sweep=search"], return_hydra_config=True)
        slurm, joblib = (
            hydra.compose("config", overrides=[launcher], return_hydra_config=True)
            for launcher in ("hydra/launcher=slurm", "hydra/launcher=joblib")
        )
        best_of_n = hydra.compose("config", overrides=["stage=best_of_n"])
    keys = set(re.findall(r"`((?:hydra|stage|logger|optimizer)\.[\w.]+)(?:=[^`]*)?`", PAGE))
    assert len(keys) >= 8
    for key in keys:
        configs = (config, search, slurm, joblib, best_of_n)
        assert any(OmegaConf.select(c, key, default="?") != "?" for c in configs), key
    for file in re.findall(r"`(conf/[\w/.]+)`", PAGE):
        assert (ROOT / file).exists()
    [picture] = re.findall(r"!\[.*\]\((\S+)\)", PAGE)
    assert (ROOT / "docs" / picture).read_bytes()[:4] == b"\x89PNG"
