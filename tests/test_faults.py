"""Runs that are killed, stopped, cut off from the disk: each goes on to the very numbers and
weights of one that was not. `make soak` tries many more moments than `make test`."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.runs.status import read_state
from tests.faulty import (
    Broken,
    ClosedPipe,
    FullDiskAtPhase,
    FullDiskWhenDone,
    KillArtifactAtUpdate,
    KillAtCheckpoints,
    KillAtFileOperation,
    KillWandbAtPhase,
    SignalAtPhase,
    SignalWhenDone,
    SmallFiles,
    Threads,
    begin_or_go_on,
    clock_backwards,
    run,
    said,
)
from tests.forked import TRAIN
from tests.reliability import count_cases

SMALL = (
    "~experiment", "model.num_layers=1", "model.d_model=16", "sampler.gen_len=4",
    "stage.batch_size=8", "stage.num_minibatches=2", "stage.batches_per_learning_phase=1",
    "stage.eval_samples=8", "stage.eval_every=4", "stage.checkpoint_every=3",
    "stage.histograms_every=4", "schedule.warmup_steps=1", "logger=local", "device=cpu",
    "reward.character=e",
)  # fmt: skip
SHORT = (*SMALL, "stage.total_phases=6")
LONG = (*SMALL, "stage.total_phases=60", "stage.checkpoint_every=2")
KILLS, CRASHES = 40, 400  # of a long campaign; the latter is more than a short run has operations


def untimed(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def what_it_left(folder: Path) -> dict[str, Any]:
    """The result of a run, times and paths left out."""
    result = json.loads((folder / "result.json").read_text())
    return {
        **{name: untimed(folder / name) for name in ("metrics.jsonl", "samples.jsonl")},
        "histograms": (folder / "histograms.jsonl").read_bytes(),
        "result": {k: result[k] for k in ("before", "after")},
        "weights": {
            file.name: file.read_bytes()
            for file in (folder / "model").iterdir()
            if file.suffix == ".safetensors"
        },
    }


def assert_the_same(folder: Path, whole: Path, kind: str, number: int) -> None:
    """Counts the faults that a run went through, as survived if it is like the other one."""
    same = what_it_left(folder) == what_it_left(whole)
    count_cases(kind, number, lost=0 if same else number)
    assert same
    phases = [row["phase"] for row in untimed(folder / "metrics.jsonl") if "loss/total" in row]
    assert phases == list(range(1, len(phases) + 1)), "a gap or a repeat"
    assert json.loads((folder / "status.json").read_text())["status"] == "done"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "whole"
    assert run(folder, [*SHORT, f"hydra.run.dir={folder}"]) == 0, said(folder)
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "whole"
    assert run(folder, [*LONG, f"hydra.run.dir={folder}"]) == 0, said(folder)
    return folder


def kill_often(folder: Path, words: tuple[str, ...], *, kills: int, phases: int, seed: int) -> None:
    """Kills a run so many times at moments over its length, and lets it end."""
    rng = random.Random(seed)
    moments: list[int | None] = sorted(rng.choices(range(phases), k=kills - kills // 8))
    moments = [*[None] * (kills // 8), *moments]  # while it is started
    for phase in moments:
        delay = rng.uniform(0, 1.0) if phase is None else rng.uniform(0, 0.02)
        fault = SignalAtPhase(phase, delay_s=delay)
        assert begin_or_go_on(folder, words, fault=fault) in (-9, 2), said(folder)
    assert begin_or_go_on(folder, words) in (0, 2), said(folder)


@pytest.mark.soak
@pytest.mark.parametrize("kills", [5, KILLS])
def test_killed_at_random_moments(kills: int, request: pytest.FixtureRequest, tmp_path) -> None:
    words, phases, name = (SHORT, 6, "short") if kills < KILLS else (LONG, 60, "long")
    whole = request.getfixturevalue(name)
    kill_often(tmp_path / "cut", words, kills=kills, phases=phases, seed=kills)
    assert_the_same(tmp_path / "cut", whole, "SIGKILL at a random moment", kills)


def test_killed_at_operations_on_files(short: Path, tmp_path: Path) -> None:
    """At some of all places where a file of the run is written, renamed, removed or flushed."""
    crash_at(range(7, 100, 60), short, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_killed_at_every_operation_on_files(short: Path, tmp_path: Path) -> None:
    crash_at(range(1, CRASHES), short, tmp_path)


def crash_at(numbers: range, whole: Path, tmp_path: Path) -> None:
    for number in numbers:
        folder = tmp_path / str(number)
        code = begin_or_go_on(folder, SHORT, fault=KillAtFileOperation(number))
        if code == 0:
            assert number > 50, "a run has more operations than that"
            return
        assert code == -9, said(folder)
        if read_state(folder).status != "done":  # else it was killed while it showed its result
            assert begin_or_go_on(folder, SHORT) == 0, said(folder)
        assert_the_same(folder, whole, "SIGKILL at an operation on a file", 1)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGINT", 130, marks=pytest.mark.soak),
        pytest.param("SIGUSR1", 138, marks=pytest.mark.soak),
    ],
)
def test_asked_to_stop(name: str, code: int, short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    assert begin_or_go_on(folder, SHORT, fault=SignalAtPhase(2, name=name)) == code, said(folder)
    status = json.loads((folder / "status.json").read_text())
    assert status == {"status": "interrupted", "error": name}
    text = said(folder)
    assert f"{name}: finishing this step and saving; once more ends at once" in text
    assert f"stopped by {name}; go on with: python train.py resume=" in text
    assert "Traceback" not in text
    newest = max(int(p.name[-6:]) for p in (folder / "checkpoints").glob("phase-*"))
    assert newest == untimed(folder / "metrics.jsonl")[-1]["phase"], "the finished phase is saved"
    assert begin_or_go_on(folder, SHORT) == 0, said(folder)
    assert_the_same(folder, short, "SIGTERM, SIGINT, SIGUSR1", 1)


def test_asked_twice_it_ends_at_once(short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    fault = SignalAtPhase(2, name="SIGINT", twice=True)
    assert begin_or_go_on(folder, (*SHORT, "stage.eval_samples=8"), fault=fault) == 130
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert begin_or_go_on(folder, SHORT) == 0, said(folder)
    assert_the_same(folder, short, "SIGTERM, SIGINT, SIGUSR1", 1)


def test_out_of_time_again_and_again(short: Path, tmp_path: Path) -> None:
    """One step is always made, so that a run of limits that are too short ends too."""
    folder, starts = tmp_path / "cut", 3
    for start in range(1, starts + 1):
        assert begin_or_go_on(folder, (*SHORT, "max_minutes=1e-4")) == 75, said(folder)
        assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
        assert untimed(folder / "metrics.jsonl")[-1]["phase"] == start
    assert begin_or_go_on(folder, (*SHORT, "max_minutes=null")) == 0, said(folder)
    assert_the_same(folder, short, "max_minutes over", starts)


def test_the_clock_goes_backwards(short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert begin_or_go_on(folder, SHORT, fault=clock_backwards) == 0, said(folder)
    seconds = json.loads((folder / "result.json").read_text())["seconds"]
    # A forked process counts from the start of the one that it is forked from.
    assert all(0 <= value < 86_400 for value in seconds.values())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [value for row in rows for name, value in row.items() if name.startswith("time/")]
    assert times
    assert min(times) >= 0
    assert_the_same(folder, short, "clock going backwards", 1)


CHAIN = (
    *(word for word in SHORT if word.split("=")[0] not in ("~experiment", "reward.character")),
    "experiment=reviews", "artifacts_dir=artifacts", "task.num_reviews=120",
    "task.num_labelled=120",
    "task.num_held_out=20", "prepare.base.stage={epochs:2,batch_size:30,checkpoint_every:1}",
    "prepare.classifier.stage={epochs:1,batch_size:30,checkpoint_every:2}",
    "prepare.base.model={num_layers:1,d_model:16}", "prepare.base.schedule.warmup_steps=1",
    "prepare.classifier.model={num_layers:1,d_model:16}",
    "prepare.classifier.schedule.warmup_steps=1",
)  # fmt: skip


def test_killed_while_it_prepares(tmp_path: Path) -> None:
    """In the middle of a step that is trained, it goes on there; what is built has no checkpoints
    left."""
    words = [word for word in CHAIN if not word.startswith("model.")]
    whole, cut = tmp_path / "a" / "whole", tmp_path / "b" / "cut"
    assert begin_or_go_on(whole, words) == 0, said(whole)
    for step, phase in (("base", 3), ("classifier", 2)):
        fault = KillArtifactAtUpdate(step, phase)
        assert begin_or_go_on(cut, words, fault=fault) == -9, said(cut)
    assert begin_or_go_on(cut, words) == 0, said(cut)
    text = said(cut)
    assert text.count("base: building") == 2
    assert "going on after update" in text
    built = [
        {
            file.relative_to(home / "artifacts"): file.read_bytes()
            for file in sorted((home / "artifacts").rglob("*.safetensors"))
        }
        for home in (tmp_path / "a", tmp_path / "b")
    ]
    assert built[0] == built[1]
    assert len(built[0]) == 2
    assert not [*tmp_path.rglob("artifacts/*/checkpoints")]
    assert_the_same(cut, whole, "SIGKILL while preparing", 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flip, id="flip"),
        pytest.param(os.unlink, id="gone", marks=pytest.mark.soak),
        pytest.param(lambda file: os.truncate(file, 9), id="cut", marks=pytest.mark.soak),
    ],
)
def test_the_newest_checkpoint_is_damaged(damage: Any, short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    assert begin_or_go_on(folder, SHORT, fault=KillAtCheckpoints(2)) == -9
    found = sorted((folder / "checkpoints").glob("phase-*"))
    assert len(found) >= 2
    damage(found[-1] / "state.safetensors")
    assert begin_or_go_on(folder, SHORT) == 0, said(folder)
    assert f"{found[-1].name} is damaged" in said(folder)
    assert "resuming from an earlier checkpoint" in said(folder)
    assert_the_same(folder, short, "damaged newest checkpoint", 1)


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_two_runs_of_one_seed_are_equal(threads: int, short: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        # Wide enough to be shared out.
        words = (*SHORT, "stage.total_phases=2", "model.d_model=192", "sampler.gen_len=24")
        assert begin_or_go_on(folder, words, fault=Threads(threads)) == 0, said(folder)
        told = (folder / "environment.txt").read_text()
        assert f"{threads} thread" in told
    assert what_it_left(folders[0]) == what_it_left(folders[1])
    count_cases(f"one seed twice, {threads} thread(s)", 1)


def test_no_room_for_checkpoints_and_then_not_for_the_model(short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    size = (short / "model" / "model.safetensors").stat().st_size
    assert begin_or_go_on(folder, SHORT, fault=SmallFiles(size - 1)) == 1
    text = said(folder)
    assert "a checkpoint could not be written (" in text
    assert "File too large" in text
    assert "Traceback" not in text
    assert f"fix that, then: python train.py resume={folder.name}" in text.replace("../", "")
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    assert begin_or_go_on(folder, SHORT) == 0, said(folder)
    assert_the_same(folder, short, "disk full at a checkpoint and at the model", 1)


def test_no_room_for_metrics(short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert begin_or_go_on(folder, SHORT, fault=FullDiskAtPhase(4)) == 1
    text = said(folder)
    assert "cannot be written: No space left on device; fix that, then: python train.py" in text
    assert "Traceback" not in text
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.kept").rename(folder / "metrics.jsonl")
    assert begin_or_go_on(folder, SHORT) == 0, said(folder)
    assert_the_same(folder, short, "disk full while logging", 1)


SHOWING = {
    "figures": (Broken("matplotlib.figure", "Figure", "savefig"), "curves.png failed"),
    "tables": (Broken("rich.console", "Console", "print"), "the table of samples failed"),
    "tables exit": (Broken("rich.console", "Console", "print", exits=True), "the table of samples"),
    "cards": (Broken("huggingface_hub", "ModelCard", "save"), "the model card failed"),
    "disk": (FullDiskWhenDone(), "failed (OSError: "),
    "stdout": (ClosedPipe(), ""),
}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=() if what in ("figures", "disk") else pytest.mark.soak)
        for what in SHOWING
    ],
)
def test_what_shows_a_result_does_not_cost_it(what: str, short: Path, tmp_path: Path) -> None:
    """Warned of once where it fails; the status stays, and so do result and model."""
    folder = tmp_path / "run"
    fault, warning = SHOWING[what]
    assert begin_or_go_on(folder, SHORT, fault=fault) == 0, said(folder)
    assert_the_same(folder, short, f"shown in vain: {what}", 1)
    text = said(folder)
    assert "Traceback" not in text
    assert text.count(warning) == 1 or what in ("disk", "stdout")
    assert text.count("the result is complete without it") <= 3


def test_a_signal_while_the_result_is_shown_leaves_the_run_done(
    short: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert begin_or_go_on(folder, SHORT, fault=SignalWhenDone("SIGTERM")) == 143, said(folder)
    assert "stopped by SIGTERM; the run is done" in said(folder)
    assert_the_same(folder, short, "SIGTERM, SIGINT, SIGUSR1", 1)


@pytest.mark.parametrize("phase", [2, pytest.param(6, marks=pytest.mark.soak)])
def test_wandb_is_killed(phase: int, short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = (*(word for word in SHORT if word != "logger=local"), "logger.finish_s=5")
    assert begin_or_go_on(folder, words, fault=KillWandbAtPhase(phase)) == 0, said(folder)
    assert (tmp_path / "killed").exists()
    assert "W&B failed" in said(folder)
    assert_the_same(folder, short, "W&B killed", 1)


REWARD = """
import time
from pathlib import Path

MODE = Path(__file__).with_name("mode")
calls = 0

def score(completions, **_):
    global calls
    calls += 1
    kind, how = MODE.read_text().split()
    if calls >= 4 and kind != "none":
        if how == "once":
            MODE.write_text("none -")
        if kind == "raises":
            raise RuntimeError("the judge is out of order")
        if kind == "hangs":
            time.sleep(600)
        if kind in ("nan", "inf"):
            return [float(kind)] * len(completions)
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Path, Path]:
    """The words of a run with a reward of its own, the file that says how that fails, and what a
    run left in which it did not."""
    home = tmp_path_factory.mktemp("judged")
    (home / "judge.py").write_text(REWARD)
    words = (
        *(word for word in SHORT if not word.startswith("reward.")), "reward=function",
        f"reward.function={home / 'judge.py'}:score", "stage.guards.reward_retry_wait_s=0.01",
    )  # fmt: skip
    (home / "mode").write_text("none -")
    assert begin_or_go_on(home / "whole", words) == 0, said(home / "whole")
    return words, home / "mode", home / "whole"


FAILURES = [(kind, how) for kind in ("raises", "hangs", "nan", "inf") for how in ("once", "always")]
FEW = [("hangs", "once"), ("raises", "always")]


@pytest.mark.parametrize(
    ("kind", "how"),
    [*FEW, *(pytest.param(*f, marks=pytest.mark.soak) for f in FAILURES if f not in FEW)],
)
def test_a_reward_fails(kind: str, how: str, judged: Any, tmp_path: Path) -> None:
    """Once, it is asked again; always, the run stops, and goes on when the reward is mended."""
    words, mode, whole = judged
    folder = tmp_path / "run"
    mode.write_text(f"{kind} {how}")
    more = (*words, "stage.guards.on_reward_error=retry", "stage.guards.reward_retries=2")
    more += ("stage.guards.reward_timeout_s=0.5",) if kind == "hangs" else ()
    code = begin_or_go_on(folder, more)
    if how == "always":
        assert code == 2, said(folder)
        assert "Traceback" not in said(folder)
        assert json.loads((folder / "status.json").read_text())["status"] == "failed"
        mode.write_text("none -")
        code = begin_or_go_on(folder, more)
    assert code == 0, said(folder)
    assert_the_same(folder, whole, f"reward that fails {how}", 1)


ON_A_DISK = """
set -e
mount -t tmpfs -o size=8m tmpfs {disk}
export WANDB_MODE=disabled HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
start() {{ {python} {train} {words} hydra.run.dir={disk}/run resume=auto >> {out}/said 2>&1; }}
wait_for_phase() {{
    until grep -qs '{{"phase": 3,' {disk}/run/metrics.jsonl; do sleep 0.002; done
}}
fill() {{ dd if=/dev/zero of={disk}/filler bs=1k count=$1 2> /dev/null || true; }}
case {fault} in
    "little room") fill 7900 ;;
    "no room") (wait_for_phase; fill 9000) & ;;
    "read-only") mount -o remount,ro {disk} ;;
esac
set +e
start; echo $? > {out}/code
cp {disk}/run/status.json {out}/ 2> /dev/null
mount -o remount,rw {disk}
rm -f {disk}/filler
start; echo $? >> {out}/code
cp -r {disk}/run {out}/run
"""


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["little room", "no room", "read-only"])
def test_a_disk_that_is_full_or_read_only_and_then_mended(
    fault: str, long: Path, tmp_path: Path
) -> None:
    """On a small disk of its own, which this process and those that it starts alone see."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    script = ON_A_DISK.format(
        disk=disk, out=out, train=TRAIN, python=sys.executable, words=shlex.join(LONG),
        fault=shlex.quote(fault),
    )  # fmt: skip
    apart = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    subprocess.run([*apart, "bash", "-c", script], check=True, capture_output=True, timeout=200)
    text = (out / "said").read_text()
    begun = fault != "read-only"
    assert (out / "code").read_text().split() == ["1" if begun else "2", "0"], text
    assert ("cannot be written" if begun else "error: cannot write") in text
    assert ("fix that, then: python train.py resume=" in text) == begun
    assert "Traceback" not in text
    assert_the_same(out / "run", long, f"disk: {fault}", 1)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_asked_to_stop_at_random_moments(name: str, long: Path, tmp_path: Path) -> None:
    rng, folder = random.Random(name), tmp_path / "cut"
    phase = times = 0
    while (phase := phase + rng.randint(1, 6)) < 55:
        fault = SignalAtPhase(phase, delay_s=rng.uniform(0, 0.02), name=name)
        assert begin_or_go_on(folder, LONG, fault=fault) in (143, 130), said(folder)
        assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
        phase, times = untimed(folder / "metrics.jsonl")[-1]["phase"], times + 1
    assert begin_or_go_on(folder, LONG) == 0, said(folder)
    assert "Traceback" not in said(folder)
    assert_the_same(folder, long, "SIGTERM, SIGINT, SIGUSR1", times)
