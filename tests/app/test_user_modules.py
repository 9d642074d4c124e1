"""A folder of the user's own, --config-dir: its options and the classes beside them are found, and
what is not found is said with where it was looked for."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.app.test_run import TINY, assert_refused, run_folder, train

CLASS = '''
from rlhf_exp.rewards.protocol import TextReward
from rlhf_exp.settings import Positive, settings


@settings
class Vowels(TextReward):
    weight: Positive = 1.0
    """Score of each vowel."""

    def score(self, text: str) -> float:
        return self.weight * sum(map(text.count, "aeiou"))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an option reward=vowels and its class, in a module of a name of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "my own"
    (folder / "reward").mkdir(parents=True)
    name = module(folder)
    (folder / f"{name}.py").write_text(CLASS)
    (folder / "reward" / "vowels.yaml").write_text(f"_target_: {name}.Vowels\nweight: 2.0\n")
    return folder


def module(folder: Path) -> str:
    """Not the same for two tests, since modules stay imported."""
    return f"rewards_{re.sub(r'[^a-z0-9]', '_', folder.parent.name)}"


def words(folder: Path) -> list[str]:
    tiny = [word for word in TINY if not word.startswith("reward")]
    return ["reward=vowels", *tiny, f"allow_targets=[{module(folder)}]", "logger=local"]


def test_a_class_beside_its_option_is_found(folder: Path, tmp_path: Path) -> None:
    outcome = train(tmp_path, "--config-dir", "my own", *words(folder))
    assert (outcome.code, outcome.raised) == (0, None), outcome.err
    assert "score" in (run_folder(tmp_path) / "samples.jsonl").read_text()
    assert sys.path[-1] == str(folder), "it would hide the modules of libraries"


def test_the_jobs_of_a_sweep_find_it_too(folder: Path, tmp_path: Path) -> None:
    sweep = ["-m", "--config-dir", str(folder), *words(folder), "reward.weight=1"]
    outcome = train(tmp_path, *sweep)
    assert (outcome.code, outcome.raised) == (0, None), outcome.out
    assert len([*tmp_path.glob("outputs/run/sweeps/*/*/result.json")]) == 1


def test_the_folders_of_a_search_path_are_looked_at(folder: Path, tmp_path: Path) -> None:
    outcome = train(tmp_path, "hydra.searchpath=['file://my own']", *words(folder), "--dry-run")
    assert (outcome.code, outcome.raised) == (0, None), outcome.err


def test_the_command_that_goes_on_names_the_folder(folder: Path, tmp_path: Path) -> None:
    run = ["--config-dir", "my own", *words(folder), "hydra.run.dir=run"]
    assert train(tmp_path, *run).code == 0
    again = train(tmp_path, *run)
    assert_refused(again, "or go on with it: python train.py --config-dir ")
    shown = shlex.split(re.search(r"python train\.py (.*)", again.out)[1])
    outcome = train(tmp_path, *shown, "stage.total_phases=3")
    assert (outcome.code, outcome.raised) == (0, None), outcome.out + outcome.err


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        ("{0}x.Vowels", CLASS, r"there is no module {0}x in .*, {1} or among the packages of"),
        ("{0}.Consonants", CLASS, r"{0} \({1}/{0}\.py\) has no Consonants$"),
        ("{0}.Vowels.x", CLASS, r"AttributeError: type object 'Vowels' has no attribute 'x'$"),
        ("{0}.Vowels", "\nimport nowhere", r"ModuleNotFoundError: .*'nowhere', at {1}/{0}\.py:2$"),
        ("{0}.Vowels", "a = 1 / 0", r"ZeroDivisionError: division by zero, at {1}/{0}\.py:1$"),
        ("{0}.Vowels", "def f(:", r"SyntaxError: invalid syntax \({0}\.py, line 1\)$"),
        ("{0}..Vowels", CLASS, r"Error loading '{0}\.\.Vowels': invalid dotstring"),
    ],
)
def test_what_cannot_be_imported_is_said_in_a_line(
    folder: Path, tmp_path: Path, target: str, source: str, message: str
) -> None:
    name = module(folder)
    (folder / f"{name}.py").write_text(source)
    target = target.format(name)
    allowed = f"allow_targets=[{name},{name}x]"
    given = [*words(folder), allowed, f"reward._target_={target}", "--dry-run"]
    outcome = train(tmp_path, "--config-dir", str(folder), *given)
    said = message.format(name, re.escape(str(folder)))
    assert_refused(outcome, rf"(?m)^error: reward\._target_={re.escape(target)}: {said}")
    assert len(outcome.lines) == 1
    assert "HYDRA_FULL_ERROR" not in outcome.out + outcome.err
