"""A value whose key says that it is secret reaches who is configured with it, and nothing else."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from rlhf_exp.app import run
from rlhf_exp.security import redaction
from tests.app.test_run import TINY, Outcome, train
from tests.tracking.wandb_runs import own_folders

COMPARE = Path(run.CONF).parent / "scripts" / "compare.py"
REWARD = """
from rlhf_exp.rewards.protocol import TextReward
from rlhf_exp.settings import settings


@settings
class Judge(TextReward):
    api_key: str
    password: str
    access: dict
    auth: str = ""
    fails: bool = False

    def score(self, text):
        if self.fails:
            raise RuntimeError(f"401: {self.api_key} with {self.access!r} and {self.password}")
        lengths = map(len, (self.api_key, self.password, *self.access["hf_tokens"], self.auth))
        return float(sum(10**i * length for i, length in enumerate(lengths)))
"""
# Their lengths, which are the score, tell that they came as they were given.
SECRETS = ("ja-ni", "vier.", "drei-{", "d q2")
ACCESS = "access={hf_tokens:[drei-\\{,'d q2'],host:there}"
SCORE = 5 + 50 + 600 + 4000 + 120_000


@pytest.fixture(scope="module", autouse=True)
def wandb_folders(tmp_path_factory):
    with own_folders(tmp_path_factory.mktemp("wandb")):
        yield


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    """A command line with secrets on it, and one in the environment."""
    name = f"judge_of_{tmp_path.name}"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{name}.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("JUDGES", SECRETS[1])
    monkeypatch.setattr(redaction, "_secret_texts", set())
    return [
        *TINY, f"allow_targets=[{name}]", "~reward.character", f"reward._target_={name}.Judge",
        f"+reward.{ACCESS}", "+reward.password=${oc.env:JUDGES}",
        "+reward.auth='Bearer ${reward.api_key}'",
    ]  # fmt: skip


def assert_nowhere(folder: Path, *outcomes: Outcome) -> list[str]:
    """Returns the names of the files that were looked at."""
    told = {f"outcome {i}": (o.out + o.err).encode() for i, o in enumerate(outcomes)}
    files = [path for path in folder.rglob("*") if path.is_file() and "modules" not in path.parts]
    told |= {path.as_posix(): path.read_bytes() for path in files}
    told["names"] = "\n".join(p.relative_to(folder).as_posix() for p in folder.rglob("*")).encode()
    for name, content in told.items():
        for secret in SECRETS:
            assert secret.encode() not in content, f"{secret} is in {name}"
    return [path.name for path in files]


def assert_done_with_them(folder: Path) -> None:
    rows = [json.loads(row) for row in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["score"] for row in rows} == {SCORE}


def test_a_run_tells_no_secret(tmp_path, words, monkeypatch):
    key = f"+reward.api_key={SECRETS[0]}"
    good = train(tmp_path, *words, key, "logger.mode=offline", "hydra.run.dir=good")
    assert (good.code, good.raised) == (0, None), good.out + good.err
    assert_done_with_them(tmp_path / "good")
    shown = (tmp_path / "good" / ".hydra" / "config.yaml").read_text()
    for line in ("api_key: '***'", "- '***'", "password: ${oc.env:JUDGES}", "host: there"):
        assert line in shown
    assert f"Bearer {redaction.REDACTED}" not in shown
    broken = train(tmp_path, *words, key, "+reward.fails=true", "logger=local", "hydra.run.dir=bad")
    assert "401: ***" in json.loads((tmp_path / "bad" / "status.json").read_text())["error"]
    refused = train(tmp_path, *words, f"{key},{SECRETS[0]}")
    malformed = train(tmp_path, *words, f"+reward.api_key=[{SECRETS[0]}")
    wrong = train(tmp_path, *words, f"+reward.api_key=[{SECRETS[0]}]")
    assert [o.code for o in (refused, malformed, wrong)] == [2, 2, 2]
    assert "reward.api_key=***: should be a text" in wrong.out
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "good"), str(tmp_path / "bad")])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(COMPARE), run_name="__main__")
    names = assert_nowhere(tmp_path, good, refused, malformed, wrong)
    assert "Traceback" not in broken.out
    for name in ("README.md", "report.html", "hydra.yaml", "resolved_config.json", "train.log"):
        assert name in names
    assert any(name.endswith(".wandb") for name in names)


def test_a_sweep_tells_no_secret_and_is_completed(tmp_path, words):
    keys = f"+reward.api_key={SECRETS[0]},other"
    sweep = ["-m", *words, keys, "logger.mode=offline", "hydra.sweep.dir=sweep"]
    first = train(tmp_path, *sweep)
    assert (first.code, first.raised) == (0, None), first.out + first.err
    jobs = sorted((tmp_path / "sweep").glob("[01]_*"))
    assert len(jobs) == 2
    assert_done_with_them(jobs[0])
    again = train(tmp_path, *sweep, "skip_completed=true")
    assert "sweep: 2 jobs, 2 of them done" in again.out
    bad = train(tmp_path, *sweep, "skip_completed=true", "stage.kl_coef=-1")
    assert_nowhere(tmp_path, first, again, bad)
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [job["swept"] for job in record["jobs"]] == [["+reward.api_key=***"]] * 2
    assert (tmp_path / "sweep" / "multirun.yaml").is_file()


def test_a_search_over_secrets_is_refused(tmp_path, words):
    outcome = train(tmp_path, "-m", *words, "sweep=search", f"+reward.api_key={SECRETS[0]},other")
    assert outcome.code == 2
    assert re.search(r"reward\.api_key: a secret cannot be searched", outcome.err)


def test_what_was_kept_out_of_a_file_is_asked_for(tmp_path, words):
    outcome = train(tmp_path, *words, "+reward.api_key='***'")
    assert outcome.code == 2
    assert "reward.api_key is kept out of files: set reward.api_key=..." in outcome.out
