"""The wheel in an environment of its own: the console script runs an experiment with
a reward of the user's own, and no clone is near."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.app.test_run import OFFLINE, TINY
from tests.app.test_user_modules import CLASS

ROOT = Path(__file__).resolve().parents[1]


def call(*command: object, cwd: Path) -> str:
    """What the command prints; it must succeed."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**own, **OFFLINE, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*words: object) -> None:
    """Pip of this environment, which asks no index."""
    quiet = ("--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", *quiet, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel; it borrows this one's libraries."""
    folder = tmp_path_factory.mktemp("installed")
    offline = ("--no-deps", "--no-index")
    pip("wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, ROOT)
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    pip("--python", python, "install", *offline, wheel)
    [own] = [p for p in (folder / "venv").rglob("site-packages") if (p / "rlhf_exp").is_dir()]
    # A folder that is named in a .pth file comes last, and its own .pth files, such as that of an
    # editable install of a clone, are not read.
    libraries = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (own / "libraries.pth").write_text("\n".join(libraries))
    return scripts


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_an_installed_copy_has_every_file_of_the_package(scripts: Path) -> None:
    [own] = [p for p in scripts.parent.rglob("site-packages") if (p / "rlhf_exp").is_dir()]
    package = files(ROOT / "rlhf_exp")
    for name in ("conf", "scripts"):
        package |= {f"{name}/{file}" for file in files(ROOT / name)}
    assert files(own / "rlhf_exp") == package
    assert files(own / "hydra_plugins") == files(ROOT / "hydra_plugins")


@pytest.fixture
def script(scripts: Path, tmp_path: Path) -> tuple[Path | str, ...]:
    """The console script with a folder of options that holds a reward of the user's own."""
    (tmp_path / "mine" / "reward").mkdir(parents=True)
    (tmp_path / "mine" / "my_vowels.py").write_text(CLASS)
    (tmp_path / "mine" / "reward" / "vowels.yaml").write_text(
        "_target_: my_vowels.Vowels\nweight: 1.0\n"
    )
    (tmp_path / "here").mkdir()
    return scripts / "rlhf-exp", "--config-dir", "../mine"


WORDS = ["reward=vowels", "allow_targets=[my_vowels]", *TINY, "logger=local"]


def test_an_installed_copy_runs_a_reward_of_the_users_own(
    script: tuple[Path | str, ...], tmp_path: Path
) -> None:
    here = tmp_path / "here"
    call(*script, *WORDS, cwd=here)
    assert [path.name for path in here.iterdir()] == ["outputs"]
    [run] = here.glob("outputs/run/*")
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert rows[0]["score"] == sum(map((rows[0]["prompt"] + rows[0]["completion"]).count, "aeiou"))
    commit, code = (run / "environment.txt").read_text().splitlines()[:2]
    assert commit == "commit none"
    assert re.fullmatch("code [0-9a-f]{12} of rlhf_exp .*, installed without its repository", code)


@pytest.mark.soak
def test_an_installed_copy_sweeps_and_compares(
    script: tuple[Path | str, ...], scripts: Path, tmp_path: Path
) -> None:
    """Hydra finds the sweepers by their place, and the jobs are checked with the user's class."""
    here = tmp_path / "here"
    plan = call(*script, "-m", *WORDS, "reward.weight=1,2", "--dry-run", cwd=here)
    assert "weight=2" in plan
    call(*script, *WORDS, cwd=here)
    [run] = here.glob("outputs/run/*")
    compare = call(scripts / "python", "-m", "rlhf_exp.scripts.compare", run, cwd=here)
    assert "report.html" in compare


def test_an_installed_copy_speaks_of_the_console_script(scripts: Path, tmp_path: Path) -> None:
    text = call(scripts / "rlhf-exp", "--help", cwd=tmp_path)
    assert "rlhf-exp -m stage.kl_coef=" in text
    assert "train.py" not in text
    assert "experiment: a whole run" in text
