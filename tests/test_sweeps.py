"""Sweeps: checked before they start, watched while they run, completed after some jobs failed."""

import itertools
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rlhf_exp.runs.lock import is_locked, locked
from tests.app.test_run import TINY, assert_refused, train, written
from tests.forked import Command
from tests.test_cli import environment

SMALL = [*TINY, "logger=local", "hydra.sweep.dir=sweep"]
TWO_AT_A_TIME = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
# Of the functions f3 raises, f5 is killed and f7 gives NaN, each in the phase after its first
# checkpoint, until the file "mended" is there.
REWARDS = """
import os, signal, time
from pathlib import Path

HERE = Path(__file__).parent

def make(job):
    calls = 0
    def reward(completions, **_):
        nonlocal calls
        calls += 1
        if calls == 4 and not (HERE / "mended").exists():
            if job == 3:
                raise RuntimeError("the judge is out of order")
            if job == 5:  # once the checkpoint, which a thread writes, is whole
                while not [*HERE.glob("sweep/*f5*/checkpoints/phase-*")]:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            if job == 7:
                return [float("nan")] * len(completions)
        return [float(len(text)) for text in completions]
    return reward

for number in range(12):
    globals()[f"f{number}"] = make(number)
"""


def begin(folder: Path, *words: str, ignore: Sequence[signal.Signals] = ()) -> Command:
    """`python train.py -m WORDS`, not waited for."""
    variables = environment(folder / "of wandb")
    return Command(folder, "-m", *words, environment=variables, ignore=ignore)


def states(folder: Path) -> dict[int, dict[str, Any]]:
    """status.json by job number."""
    return {
        int(path.parent.name.partition("_")[0]): json.loads(path.read_text())
        for path in (folder / "sweep").glob("*/status.json")
    }


def phases(job: Path) -> list[int]:
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    return [row["phase"] for row in rows if "eval/score" not in row]


def test_one_bad_job_and_none_starts(tmp_path):
    outcome = train(tmp_path, "-m", *SMALL, "stage.kl_coef=0.1,-1", "sampler.gen_len=6,-2,4")
    assert (outcome.code, outcome.raised, outcome.out) == (2, None, "")
    assert "4 of 6 jobs cannot run, so nothing was started" in outcome.err
    assert re.search(
        r"stage\.kl_coef=-1: .*\n  in job 1 \(gen_len=6,kl_coef=-1\), job 3 .*, job 5 ", outcome.err
    )
    assert re.search(r"sampler\.gen_len=-2: .*\n  in job 2 \(.*\), job 3 \(", outcome.err)
    assert written(tmp_path) == []


def test_a_dry_run_shows_the_jobs_and_starts_none(tmp_path):
    outcome = train(tmp_path, "-m", *SMALL, "stage.kl_coef=0.1,1", "seed=1,2", "--dry-run")
    assert (outcome.code, outcome.raised) == (0, None)
    for line in ("0  kl_coef=0.1, seed=1  0_kl_coef=0.1,seed=1  to run", "4 of 4 jobs to run"):
        assert line in outcome.out
    assert "no finished run of this shape" in outcome.out
    assert written(tmp_path) == []


def test_settings_of_a_variant_change_together(tmp_path):
    sweeps = tmp_path / "configs" / "sweep"
    sweeps.mkdir(parents=True)
    (sweeps / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [{override /hydra/sweeper: grid}]\n"
        "hydra: {sweeper: {params: {seed: '1,2'}, variants: [\n"
        "  [stage.kl_coef=0.1, stage.clip_coef=0.3], [stage.kl_coef=1]]}}\n"
    )
    words = ["--config-dir", str(sweeps.parent), "-m", *SMALL, "sweep=mine", "--dry-run"]
    outcome = train(tmp_path, *words)
    for line in ("1  kl_coef=0.1, clip_coef=0.3, ", "3  kl_coef=1, seed=2", "4 of 4 jobs"):
        assert line in outcome.out, outcome.out
    outcome = train(tmp_path, *words, "stage.kl_coef=3")
    for line in ("0  clip_coef=0.3, seed=1", "2  seed=1", "4 of 4 jobs"):
        assert line in outcome.out, outcome.out
    # A key that a variant leaves out is shown only if nothing else tells the variants apart.
    outcome = train(
        tmp_path,
        *words,
        "hydra.sweeper.variants=[['stage.kl_coef=3','~stage.vf_coef'],['~stage.vf_coef']]",
    )
    for line in ("0  kl_coef=3, seed=1", "2  seed=1", "4 of 4 jobs"):
        assert line in outcome.out, outcome.out
    outcome = train(tmp_path, *words, "hydra.sweeper.variants=[['~stage.vf_coef'],[]]")
    for line in ("0  vf_coef, seed=1", "2  seed=1", "4 of 4 jobs"):
        assert line in outcome.out, outcome.out
    bad = train(tmp_path, *words, "hydra.sweeper.variants=[['stage.kl=1']]")
    assert_refused(bad, r"stage\.kl\b.*\n  in job 0 \(kl=1,seed=1\), job 1 ")


def test_a_dry_run_of_one_run_checks_it(tmp_path):
    outcome = train(tmp_path, *TINY, "--dry-run")
    assert (outcome.code, outcome.raised) == (0, None)
    assert re.search(r"all is well: PPO in outputs/run/\S+; .*; nothing was started", outcome.out)
    assert written(tmp_path) == []
    assert_refused(train(tmp_path, *TINY, "--dry-run", "stage.kl_coef=-1"), r"stage\.kl_coef=-1")


def test_a_dry_run_foresees_the_space_of_snapshots(tmp_path):
    words = [*TINY, "--dry-run", "stage.snapshots=log", "stage.total_phases=10"]
    words.append("model.d_model=256")
    outcome = train(tmp_path, *words)
    assert (outcome.code, outcome.raised) == (0, None), outcome.out
    foreseen = re.search(r"6 snapshots of ([\d.]+) MiB .*each, ([\d.]+) MiB in all", outcome.out)
    assert foreseen, outcome.out
    half = re.search(r" of ([\d.]+) MiB", train(tmp_path, *words, "stage.snapshot_dtype=bf16").out)
    each = float(foreseen[1])
    assert float(foreseen[2]) == pytest.approx(6 * each, abs=0.3)
    assert float(half[1]) == pytest.approx(each / 2, abs=0.1)
    words.append("until=base")
    assert "snapshots" not in train(tmp_path, *words).out


FEW = [1, 3, 5, 7]  # of the functions


@pytest.mark.parametrize(
    ("given", "launcher"),
    [
        pytest.param(FEW, [], id="one after the other"),
        pytest.param([*range(12)], TWO_AT_A_TIME, id="two at a time", marks=pytest.mark.soak),
    ],
)
def test_of_many_jobs_three_fail_and_are_completed(tmp_path, given, launcher):
    (tmp_path / "rewards.py").write_text(REWARDS)
    functions = ",".join(f"rewards.py:f{number}" for number in given)
    words = [*SMALL, *launcher, "reward=function", f"reward.function={functions}"]
    words += ["stage.total_phases=4", "stage.checkpoint_every=2", "skip_completed=true"]
    first = train(tmp_path, "-m", *words)
    assert (first.code, first.raised) == (1, None), first.out + first.err
    assert "Traceback" not in first.out + first.err
    states_after = states(tmp_path)
    failed = {given[job] for job, state in states_after.items() if state["status"] != "done"}
    assert (len(states_after), failed) == (len(given), {3, 5, 7})
    for number, reason in {
        3: "the judge is out of order",
        5: "killed by SIGKILL",
        7: "nan",
    }.items():
        job = given.index(number)
        assert reason in states_after[job]["error"]
        line = rf"^job {job} \(function=rewards\.py:f{number}\) failed: .*{reason}.*; see sweep/"
        assert re.search(line, first.out, re.MULTILINE)
    [log] = (tmp_path / "sweep").glob(f"{given.index(3)}_*/train.log")
    assert "RuntimeError: the judge is out of order" in log.read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/metrics.jsonl")}

    (tmp_path / "mended").touch()
    second = train(tmp_path, "-m", *words)
    assert (second.code, second.raised) == (0, None), second.out + second.err
    assert f"sweep: {len(given)} jobs, {len(given) - 3} of them done" in second.out
    assert {state["status"] for state in states(tmp_path).values()} == {"done"}
    for path, changed in before.items():
        mended = given[int(path.parent.name.partition("_")[0])] in failed
        assert (path.stat().st_mtime_ns != changed) == mended
        assert phases(path.parent) == [1, 2, 3, 4]
        went_on = "going on after phase 2" in (path.parent / "train.log").read_text()
        assert went_on == mended


def test_a_dry_run_removes_nothing_that_was_there(tmp_path):
    assert train(tmp_path, *TINY, "logger=local", "hydra.run.dir=run").code == 0
    planned = train(tmp_path, *TINY, "logger=local", "hydra.run.dir=run", "--dry-run")
    assert_refused(planned, r"hydra\.run\.dir=run holds a run already")
    assert (tmp_path / "run" / "result.json").is_file()
    broken = [*TINY, "logger=local", "hydra.run.dir=cut", "reward=function"]
    (tmp_path / "rewards.py").write_text(REWARDS)
    words = ["reward.function=rewards.py:f3", "stage.total_phases=5", "stage.checkpoint_every=2"]
    assert train(tmp_path, *broken, *words).code == 2
    before = written(tmp_path / "cut")
    planned = train(tmp_path, "resume=cut", "--dry-run")
    assert planned.code == 0
    assert "all is well: PPO in cut" in planned.out
    assert written(tmp_path / "cut") == before


def test_a_sweep_is_alone_in_its_folder(tmp_path):
    with locked(tmp_path / "sweep"):
        outcome = train(tmp_path, "-m", *SMALL, "seed=1,2")
    assert_refused(outcome, r"sweep: another process is running in this folder")
    assert not list((tmp_path / "sweep").glob("*_*"))


STOPS_ITS_SWEEP = """
import os, signal

calls = 0

def stop(completions, **_):
    global calls
    calls += 1
    if calls == 3:
        os.kill(int(os.environ["RLHF_EXP_SWEEP_PID"]) if WHOLE else os.getpid(), signal.NAME)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    ("name", "whole", "code"),
    [
        ("SIGINT", True, 130),
        pytest.param("SIGTERM", True, 143, marks=pytest.mark.soak),
        pytest.param("SIGINT", False, 130, id="of a job"),
    ],
)
def test_a_sweep_that_is_stopped_ends_with_how_it_goes_on(tmp_path, name, whole, code):
    source = STOPS_ITS_SWEEP.replace("NAME", name).replace("WHOLE", str(whole))
    (tmp_path / "rewards.py").write_text(source)
    words = [*SMALL, "reward=function", "reward.function=rewards.py:stop"]
    outcome = train(tmp_path, "-m", *words, "stage.total_phases=5000", "seed=1,2")
    assert (outcome.code, outcome.raised) == (code, None), outcome.out + outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    again = r"run what is missing: python .* hydra\.sweep\.dir=sweep .*skip_completed=true"
    assert re.search(again, outcome.out)
    assert {n: state["status"] for n, state in states(tmp_path).items()} == {0: "interrupted"}


@pytest.mark.soak
def test_the_end_of_a_sweep_is_that_of_its_jobs(tmp_path):
    words = [*SMALL, *TWO_AT_A_TIME, "stage.total_phases=5000", "seed=1,2"]
    jobs = [tmp_path / "sweep" / name for name in ("0_seed=1", "1_seed=2")]
    with begin(tmp_path, *words) as sweep:
        sweep.await_that(lambda: all((job / "metrics.jsonl").is_file() for job in jobs))
        sweep.process.kill()
        assert sweep.wait() == -9
    deadline = time.monotonic() + 20
    while any(is_locked(job) for job in jobs):
        assert time.monotonic() < deadline, "a job outlives its sweep"
        time.sleep(0.1)


@pytest.mark.soak
def test_a_sweep_under_nohup_outlives_its_terminal(tmp_path):
    words = [*SMALL, "stage.total_phases=80", "seed=1,2"]
    with begin(tmp_path, *words, ignore=[signal.SIGHUP]) as sweep:
        rows = tmp_path / "sweep" / "0_seed=1" / "metrics.jsonl"
        sweep.await_that(lambda: rows.is_file() and rows.read_text().count("\n") > 3)
        os.kill(sweep.pid, signal.SIGHUP)
        assert sweep.wait() == 0, sweep.said()
    assert {state["status"] for state in states(tmp_path).values()} == {"done"}


def test_what_makes_no_other_job_is_not_swept(tmp_path):
    outcome = train(tmp_path, "-m", *SMALL, "logger.notes=a,b")
    assert_refused(outcome, r"logger\.notes: the jobs would be the same; give it one value")
    outcome = train(tmp_path, "-m", *SMALL, "seed=1,1,2", "--dry-run")
    assert "1 of 3 jobs repeat others" in outcome.out
    assert "2 of 2 jobs to run" in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stage.kl_coef=interval(0.1,1)"],
            r"stage\.kl_coef: an interval is for a search; add hydra/sweeper=",
        ),
        (["sweep=search", "hydra.sweeper.sampler=tpee"], r"hydra\.sweeper\.sampler=tpee: use tpe"),
        (
            ["sweep=search", "hydra.sweeper.maximize=[eval/scoer]"],
            r"hydra\.sweeper: eval/scoer is no metric of these runs; they have: .*, eval/score\n",
        ),
        (
            ["sweep=search", "until=sft"],
            r"until=sft: a search needs results of whole runs: leave it out",
        ),
        (
            ["sweep=search", "hydra.sweeper.minimize=[eval/kl,eval/score]"],
            r"eval/score: it is in hydra\.sweeper\.maximize and minimize",
        ),
        (
            ["hydra/sweeper=search", "stage.kl_coef=interval(1,0.1)"],
            r"stage\.kl_coef: interval\(1,0\.1\) ends below its beginning: write interval",
        ),
        (["sweep=search", "hydra.sweeper.n_trials=0"], r"hydra\.sweeper\.n_trials=0: it must be 1"),
        (["hydra.sweeper.variants=[seed]"], r"hydra\.sweeper\.variants: seed must be in brackets"),
        (["hydra.sweeper.max_batch_size=-1"], r"hydra\.sweeper\.max_batch_size=-1: it must be 1"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(tmp_path, words, message):
    outcome = train(tmp_path, "-m", *TINY, "hydra.sweep.dir=sweep", *words, "--dry-run")
    assert (outcome.code, outcome.raised) == (2, None)
    assert re.search(message, outcome.err), outcome.err


def test_what_is_for_sweeps_is_refused_in_a_run(tmp_path):
    for word in ("skip_completed=true", "fail_fast=true"):
        assert_refused(train(tmp_path, *TINY, word), rf"{word} is for sweeps: add -m")
    assert_refused(train(tmp_path, *TINY, "gpus=[0]"), r"gpus is for sweeps: .* device=cuda:1")


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (
            "defaults: [{override /hydra/launcher: joblib}]\nhydra: {launcher: {n_jobs: 2}}",
            "launcher",
        ),
        ("hydra: {sweeper: {params: {stage.kl_coef: '0.1,1'}}}", "sweeper"),
        ("hydra: {sweep: {dir: elsewhere}}", "sweep"),
    ],
)
def test_what_is_the_whole_sweeps_is_not_taken_from_a_swept_experiment(tmp_path, lines, part):
    folder = tmp_path / "configs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "plain.yaml").write_text("# @package _global_\n")
    (folder / "own.yaml").write_text(f"# @package _global_\n{lines}\n")
    small = [word for word in TINY if not word.startswith(("~", "model."))]
    words = ["--config-dir", str(folder.parent), "-m", *small, "--dry-run"]
    outcome = train(tmp_path, *words, "experiment=plain,own")
    assert_refused(
        outcome, rf"hydra\.{part} applies to the whole sweep.*\n  in job 1 \(experiment=own\)"
    )
    alone = train(tmp_path, *words, "experiment=own", "seed=1,2")
    assert (alone.code, alone.raised) == (0, None), alone.out + alone.err


def test_a_folder_holds_one_sweep(tmp_path):
    assert train(tmp_path, "-m", *SMALL, "seed=1", "hydra/job_logging=none").code == 0
    log = (tmp_path / "sweep" / "0_all-defaults" / "train.log").read_text()
    assert log.count("INFO] run folder: ") == 1
    again = train(tmp_path, "-m", *SMALL, "seed=1,2")
    assert_refused(again, r"hydra\.sweep\.dir=sweep holds a sweep already: add skip_completed=true")
    more = train(tmp_path, "-m", *SMALL, "seed=2,1", "skip_completed=true")
    assert more.code == 0
    assert "sweep: 2 jobs, 1 of them done" in more.out
    assert {path.name for path in (tmp_path / "sweep").glob("*_*")} == {
        "0_all-defaults",
        "1_seed=2",
    }


def test_completing_needs_the_folder(tmp_path):
    words = [word for word in SMALL if not word.startswith("hydra.sweep.dir")]
    outcome = train(tmp_path, "-m", *words, "seed=1,2", "skip_completed=true")
    assert_refused(outcome, r"skip_completed=true needs the folder .* hydra\.sweep\.dir=FOLDER")


def test_joblib_is_told_how_many(tmp_path):
    outcome = train(tmp_path, "-m", *SMALL, "seed=1,2", "hydra/launcher=joblib")
    assert_refused(outcome, r"set the number, hydra\.launcher\.n_jobs=2")
    missing = train(tmp_path, "-m", *SMALL, "seed=1,2", "hydra/launcher=ray")
    assert_refused(missing, r"pip install 'rlhf_exp\[ray\]'")


# Writes when each job begins and ends with its GPU. The job with kl_coef=0.3 is killed in between.
ON_A_GPU = """
import json, os, signal, time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0

def say(what):
    row = [what, os.environ["CUDA_VISIBLE_DEVICES"], os.getpid(), time.monotonic()]
    with (HERE / "held.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\\n")

def held(completions, **_):
    global calls
    calls += 1
    say("first" if calls == 1 else "later")
    if calls == 1:
        time.sleep(2)  # long enough that jobs that did not wait for each other would overlap
    if calls == 2 and "=0.3" in os.readlink(f"/proc/self/fd/1"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """CUDA says that it sees two GPUs; in the processes of jobs it sees none, so that they compute
    on the CPU. Their leases are in a folder of the test."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with tempfile.TemporaryDirectory() as leases:  # its path is short enough for a fork server
        monkeypatch.setenv("TMPDIR", leases)
        yield tmp_path


@pytest.mark.soak
def test_of_two_gpus_none_is_held_twice(two_gpus):
    (two_gpus / "rewards.py").write_text(ON_A_GPU)
    words = ["-m", *SMALL, "sweep=kl_frontier", "seed=1", "hydra/launcher=joblib", "gpus=auto"]
    words += ["hydra.launcher.n_jobs=3", "reward=function", "reward.function=rewards.py:held"]
    outcome = train(two_gpus, *words)
    assert (outcome.code, outcome.raised) == (1, None), outcome.out + outcome.err
    assert "GPUs: 0, 1, one job on each" in outcome.out
    assert len(re.findall(r"started on GPU [01]$", outcome.out, re.MULTILINE)) == 5
    ends = {number: state["status"] for number, state in states(two_gpus).items()}
    assert ends == {0: "done", 1: "done", 2: "failed", 3: "done", 4: "done"}
    assert list(Path(os.environ["TMPDIR"]).glob("rlhf_exp-*/gpus/0.0-of-1.lock"))
    rows = [json.loads(line) for line in (two_gpus / "held.jsonl").read_text().splitlines()]
    assert {gpu for _, gpu, *_ in rows} == {"0", "1"}
    for gpu in "01":
        times: dict[int, list[float]] = {}
        for _, _, pid, now in (row for row in rows if row[1] == gpu):
            times.setdefault(pid, []).append(now)
        spans = sorted((now[0], now[-1]) for now in times.values())
        assert len(spans) >= 2
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=[]"], r"gpus=\[\]: name one"),
        (["gpus=0"], r"gpus=0: write gpus=auto, or a list: 'gpus=\[0,1\]'"),
        (["gpus=0,1"], r"gpus: the jobs would be the same; give it one value"),
        (["gpus=[0,0]"], r"gpus: 0 is listed twice; .*jobs_per_gpu=2"),
        (["gpus=[first]"], r"gpus: first is no name of a GPU"),
        (["gpus=[0,2]"], r"gpus: CUDA sees no GPU 2 on this machine"),
        (["jobs_per_gpu=2"], r"jobs_per_gpu=2 needs gpus: add gpus=auto"),
        (["gpus=auto", "jobs_per_gpu=0"], r"jobs_per_gpu=0: should be at least 1"),
        (["gpus=auto", "device=cuda:1"], r"device=cuda:1: a job sees only the GPU .* device=auto"),
        (["gpus=auto", "hydra/launcher=slurm"], r"gpus: jobs of this launcher .*gpus_per_node"),
        (["fail_fast=perhaps"], r"fail_fast='perhaps': should be true or false"),
    ],
)
def test_leases_that_cannot_be_are_refused(tmp_path, monkeypatch, words, message):
    def count() -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        return len([name for name in visible if name in "01"])

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", count)
    assert_refused(train(tmp_path, "-m", *SMALL, "seed=1,2", *words, "--dry-run"), message)


def test_a_dry_run_says_which_gpus_are_leased(two_gpus):
    words = ["-m", *SMALL, "seed=1,2,3,4,5", "hydra/launcher=joblib", "--dry-run"]
    outcome = train(two_gpus, *words, "gpus=auto", "jobs_per_gpu=2")
    assert (outcome.code, outcome.raised) == (0, None), outcome.err
    assert "GPUs: 0, 1, up to 2 jobs on each" in outcome.out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        outcome = train(two_gpus, *words, "gpus=auto", "hydra.launcher.n_jobs=1")
    assert "gpus=auto: CUDA sees no GPU here, so the jobs lease none" in outcome.out


def test_the_keys_of_a_sweep_are_not_taken_from_a_swept_experiment(tmp_path):
    folder = tmp_path / "configs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "plain.yaml").write_text("# @package _global_\n")
    (folder / "own.yaml").write_text("# @package _global_\nfail_fast: true\n")
    small = [word for word in TINY if not word.startswith(("~", "model."))]
    words = ["--config-dir", str(folder.parent), "-m", *small, "experiment=plain,own"]
    outcome = train(tmp_path, *words, "--dry-run")
    assert_refused(outcome, r"fail_fast applies to the whole sweep.*\n  in job 1 \(experiment=own")
    assert train(tmp_path, *words, "--dry-run", "fail_fast=true").code == 0


# The reward of seed 1 fails in the third phase, once seed 2, if it runs too, has a checkpoint.
FAILS_FIRST = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0

def fail(completions, **_):
    global calls
    calls += 1
    first = "seed=1" in os.readlink("/proc/self/fd/1")
    if first and calls == 3 and not (HERE / "mended").exists():
        while TOGETHER and not [*HERE.glob("sweep/*seed=2/checkpoints/phase-*")]:
            time.sleep(0.01)
        raise RuntimeError("out of order")
    if not first and not (HERE / "mended").exists():
        time.sleep(0.1)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], id="one after the other"),
        pytest.param(TWO_AT_A_TIME, id="two at a time", marks=pytest.mark.soak),
    ],
)
def test_the_first_failure_stops_a_sweep_that_fails_fast(tmp_path, launcher):
    source = FAILS_FIRST.replace("TOGETHER", str(bool(launcher)))
    (tmp_path / "rewards.py").write_text(source)
    words = ["-m", *SMALL, *launcher, "seed=1,2,3", "reward=function", "stage.checkpoint_every=1",
             "reward.function=rewards.py:fail", "fail_fast=true",
             f"stage.total_phases={5000 if launcher else 3}"]  # fmt: skip
    outcome = train(tmp_path, *words)
    assert (outcome.code, outcome.raised) == (1, None), outcome.out + outcome.err
    assert "fail_fast=true: the first failure stopped the sweep" in outcome.out
    assert re.search(r"^job 0 \(seed=1\) failed: .*out of order", outcome.out, re.MULTILINE)
    assert re.search(r"^job 2 \(seed=3\) did not start", outcome.out, re.MULTILINE)
    ends = {number: state["status"] for number, state in states(tmp_path).items()}
    assert ends == {0: "failed", **({1: "interrupted"} if launcher else {})}
    if launcher:
        return
    (tmp_path / "mended").touch()
    assert train(tmp_path, *words, "skip_completed=true").code == 0
    assert {state["status"] for state in states(tmp_path).values()} == {"done"}
    assert "going on after phase 1" in (tmp_path / "sweep" / "0_seed=1" / "train.log").read_text()


@pytest.mark.soak
def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path):
    (tmp_path / "rewards.py").write_text(
        "import time\n\ndef slow(completions, **_):\n    time.sleep(0.4)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    words = [*SMALL, "hydra/launcher=submitit_local", "seed=1,2", "reward=function",
             "reward.function=rewards.py:slow", "stage.total_phases=12", "stage.eval_every=12",
             "stage.checkpoint_every=2"]  # fmt: skip
    job = tmp_path / "sweep" / "0_seed=1"
    with begin(tmp_path, *words) as sweep:
        sweep.await_that(lambda: (job / "checkpoints" / "phase-000002").is_dir())
        [task] = [
            found.pid
            for found in psutil.process_iter(["cmdline"])
            if "submitit.core._submit" in (found.info["cmdline"] or ())
            and found.ppid() == _controller(tmp_path, job)
        ]
        os.kill(task, signal.SIGUSR2)
        assert sweep.wait() == 0, sweep.said()
    assert {n: state["status"] for n, state in states(tmp_path).items()} == {0: "done", 1: "done"}
    assert "going on after phase" in (job / "train.log").read_text()
    assert "going on" not in (tmp_path / "sweep" / "1_seed=2" / "train.log").read_text()
    assert phases(job) == list(range(1, 13))


def _controller(folder: Path, job: Path) -> int:
    """The process that submitit has made for a job; its number is the name of a folder."""
    pickles = list((folder / "sweep" / ".submitit").glob("*/*_submitted.pkl"))
    [found] = [path for path in pickles if f"'{job.name}'".encode() in path.read_bytes()]
    return int(found.parent.name)


def test_a_search_draws_runs_and_goes_on(tmp_path):
    words = [*SMALL, "hydra/sweeper=search", "hydra.sweeper.minimize=[eval/kl]"]
    words += ["stage.kl_coef=tag(log,interval(0.1,1))", "stage.num_minibatches=1,2"]
    dry = train(tmp_path, "-m", *words, "hydra.sweeper.n_trials=2", "--dry-run")
    assert (dry.code, dry.raised) == (0, None), dry.err
    assert "kl_coef=1.0, num_minibatches=1" in dry.out
    assert "both ends of each interval are right; 2 trials to run" in dry.out
    assert written(tmp_path) == []
    outcome = train(tmp_path, "-m", *words, "hydra.sweeper.n_trials=1")
    assert (outcome.code, outcome.raised) == (0, None), outcome.out + outcome.err
    assert len(states(tmp_path)) == 1
    assert re.search(
        r"best: \{'eval/score': .*'eval/kl': .*\} with \{'stage\.kl_coef': 0\.", outcome.out
    )
    more = train(tmp_path, "-m", *words, "hydra.sweeper.n_trials=2", "skip_completed=true")
    assert (more.code, more.raised) == (0, None), more.out + more.err
    assert {state["status"] for state in states(tmp_path).values()} == {"done"}
    assert len(states(tmp_path)) == 2
    drawn = set()
    for path in (tmp_path / "sweep").glob("*/resolved_config.json"):
        stage = json.loads(path.read_text())["stage"]
        assert 0.1 <= stage["kl_coef"] <= 1
        drawn.add(stage["kl_coef"])
    assert len(drawn) == 2


def test_a_terminal_shows_a_table_that_lives(tmp_path, monkeypatch):
    for name, value in {"TERM": "xterm", "COLUMNS": "90", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    words = [*SMALL, "seed=1,2", "stage.total_phases=20"]
    outcome = train(tmp_path, "-m", *words, terminal=True)
    assert (outcome.code, outcome.raised) == (0, None), outcome.out + outcome.err
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", outcome.out)
    assert "1 running, 1 waiting" in text
    assert re.search(r"0 +seed=1 +running +\d+/20", text)
    last = text[text.rindex("#  job") :]
    assert re.search(r"0 +seed=1 +done +20/20 .*\n1 +seed=2 +done +20/20", last)
