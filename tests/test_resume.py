"""A run that ends early goes on from its checkpoint, as if nothing had happened."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf_exp.models.saving import save_policy
from tests.app.test_run import OWN_MODEL, TINY, Outcome, assert_refused, train, written
from tests.builders import tiny_policy
from tests.scripts import call_script

SMALL = [
    *OWN_MODEL, *(word for word in TINY if word.startswith(("stage.", "schedule."))),
    "stage.total_phases=5", "stage.checkpoint_every=2", "stage.eval_every=3", "sampler.gen_len=4",
    "logger=local", "reward=function", "task=prefix", "task.held_out_fraction=0.4",
    "task.prefix=[one two,three,four five six,seven,eight nine]",
]  # fmt: skip
# Fails in phase 4, unless the file "mended" is there: evaluations call it too, once each.
REWARD = """
from pathlib import Path

calls = 0

def nines(completions, **_):
    global calls
    calls += 1
    if calls == 6 and not Path(__file__).with_name("mended").exists():
        raise RuntimeError("the judge is out of order")
    return [text.count("nine") for text in completions]
"""


COMMAND = [*SMALL, "model=local", "model.base_model=base", "reward.function=my_reward.py:nines"]


def begin(folder: Path) -> list[str]:
    """A small run on a saved model, its reward in a file: its words, to be called in the folder."""
    save_policy(tiny_policy(), folder / "base")
    (folder / "my_reward.py").write_text(REWARD)
    return COMMAND


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return begin(tmp_path)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that its reward ended, `broken`."""
    folder = tmp_path_factory.mktemp("ended")
    assert train(folder, *begin(folder), "hydra.run.dir=broken").code == 2
    return folder


@pytest.fixture
def broken(ended: Path, tmp_path: Path) -> Path:
    """A copy of that run, of its model and its reward."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    return tmp_path / "broken"


def untimed(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def run_twice(tmp_path: Path, command: list[str], *more: str) -> tuple[Outcome, Path, Path]:
    """The outcome of a run that its reward ends, its folder, and that of one that goes through."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    outcome = train(tmp_path, *command, *more, f"hydra.run.dir={broken}")
    (tmp_path / "mended").touch()
    assert train(tmp_path, *command, *more, f"hydra.run.dir={whole}").code == 0
    return outcome, broken, whole


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param(["finetune=full"], marks=pytest.mark.soak),
        pytest.param(
            ["finetune=last_layers", "finetune.num_layers_unfrozen=1"], marks=pytest.mark.soak
        ),
        ["finetune=lora", "finetune.rank=2", "optimizer.base_lr=1e-2"],
    ],
    ids=["full", "last_layers", "lora"],
)
def test_a_run_whose_reward_failed_goes_on_bit_by_bit(tmp_path, command, reference):
    outcome, broken, whole = run_twice(tmp_path, command, *reference)
    assert (outcome.code, outcome.raised) == (2, None)
    assert re.search(r"error: phase \d: .*RuntimeError: the judge is out of order", outcome.out)
    assert "Traceback" not in outcome.out + outcome.err
    assert json.loads((broken / "status.json").read_text())["status"] == "failed"
    saved = {checkpoint.name for checkpoint in (broken / "checkpoints").iterdir()}
    assert saved in ({"phase-000002"}, {"phase-000002", "phase-000003"})  # the latter is the best
    assert not (broken / "model").exists()

    resumed = train(tmp_path, f"resume={broken}")
    assert (resumed.code, resumed.raised) == (0, None)
    assert f"going on after phase {int(max(saved)[-6:])}" in resumed.out
    assert json.loads((broken / "status.json").read_text())["status"] == "done"
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert untimed(broken / name) == untimed(whole / name)
    for file in ("model.safetensors", "value_head.safetensors"):
        assert (broken / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()
    first, second = (json.loads((f / "result.json").read_text()) for f in (broken, whole))
    assert [first[k] for k in ("before", "after")] == [second[k] for k in ("before", "after")]
    assert (broken / "model" / "adapter").is_dir() == (reference[0] == "finetune=lora")
    assert (broken / ".hydra" / "resumed" / "overrides.yaml").is_file()
    assert "reward=function" in (broken / ".hydra" / "overrides.yaml").read_text()


def test_a_run_has_its_agents_id_and_keeps_it(tmp_path, command, monkeypatch):
    broken = tmp_path / "broken"
    monkeypatch.setenv("WANDB_RUN_ID", "agent-07")
    assert train(tmp_path, *command, f"hydra.run.dir={broken}").code == 2
    assert (broken / "run_id.txt").read_text() == "agent-07\n"
    monkeypatch.setenv("WANDB_RUN_ID", "another1")
    (tmp_path / "mended").touch()
    assert train(tmp_path, f"resume={broken}").code == 0
    assert (broken / "run_id.txt").read_text() == "agent-07\n"


def test_what_cannot_be_resumed_is_refused_and_nothing_changes(tmp_path, broken):
    before = {p.relative_to(tmp_path): p.read_bytes() for p in broken.rglob("*") if p.is_file()}
    assert_refused(
        train(tmp_path, f"resume={tmp_path / 'nowhere'}"),
        r"^error: resume=\S+nowhere: no run's folder",
    )
    assert not (tmp_path / "nowhere").exists()
    assert_refused(
        train(tmp_path, f"resume={broken}", "stage.kl_coef=3", "reward=length", "seed=1"),
        r"^error: resume=\S+ uses that run's own configuration, which differs:\n"
        r"  reward\._target_: \S+FunctionReward -> \S+Length\n  reward\.function: .*\n"
        r"  reward\.target_tokens: absent -> \d+\n  stage\.kl_coef: 0\.1 -> 3\nleave that out",
    )
    assert_refused(
        train(tmp_path, f"resume={broken}", "stage.kl_coef=-3", "resume_with=[stage]"),
        r"stage\.kl_coef=-3: should be at least 0",
    )
    assert_refused(train(tmp_path, "-m", f"resume={broken}"), r"resume is for a single run")
    elsewhere = train(tmp_path, f"resume={broken}", f"hydra.run.dir={tmp_path / 'elsewhere'}")
    assert_refused(elsewhere, r"goes on in that folder: leave out hydra\.run\.dir")
    again = train(tmp_path, *COMMAND, f"hydra.run.dir={broken}")
    assert_refused(again, r"holds a run already: .* go on with it: .*resume=\S*broken")
    after = {p.relative_to(tmp_path): p.read_bytes() for p in broken.rglob("*") if p.is_file()}
    passing = {"train.log", ".lock"}
    assert {k: v for k, v in after.items() if k.name not in passing} == {
        k: v for k, v in before.items() if k.name not in passing
    }


def test_a_run_may_differ_in_what_is_allowed_and_stays_so(tmp_path, broken):
    words = ["stage.kl_coef=3", "stage.total_phases=6", "logger=local", "resume_with=stage.kl_coef"]
    (tmp_path / "mended").touch()
    words[-1] = "resume_with=[stage.kl_coef]"
    resumed = train(tmp_path, f"resume={broken}", *words)
    assert resumed.code == 0, resumed.out + resumed.err
    assert untimed(broken / "metrics.jsonl")[-1]["phase"] == 6
    config = OmegaConf.load(broken / ".hydra" / "config.yaml")
    assert (config.stage.kl_coef, config.stage.total_phases, config.resume) == (3, 6, None)
    assert "stage.kl_coef=3" in (broken / ".hydra" / "overrides.yaml").read_text()
    # What was once allowed is the run's own now, and it can be given still more phases.
    more = train(tmp_path, f"resume={broken}", "stage.total_phases=7", "stage.kl_coef=3")
    assert more.code == 0, more.out + more.err
    assert [row["phase"] for row in untimed(broken / "metrics.jsonl") if "loss/kl" in row] == [
        1, 2, 3, 4, 5, 6, 7,
    ]  # fmt: skip


def test_a_change_that_does_not_fit_the_checkpoint_is_not_kept(tmp_path, broken):
    before = [(broken / ".hydra" / name).read_text() for name in ("config.yaml", "overrides.yaml")]
    save_policy(tiny_policy(seed=1), tmp_path / "other")
    words = [f"model.base_model={tmp_path / 'other'}", "resume_with=[model]"]
    assert_refused(
        train(tmp_path, f"resume={broken}", *words),
        r"the files that it names have changed since the checkpoint",
        r"the configuration was changed for this start: model\.base_model: base -> \S+other",
    )
    after = [(broken / ".hydra" / name).read_text() for name in ("config.yaml", "overrides.yaml")]
    assert after == before
    (tmp_path / "mended").touch()
    assert train(tmp_path, f"resume={broken}").code == 0


def test_a_run_whose_kl_budget_is_spent_goes_on_with_a_larger_one(tmp_path, command):
    (tmp_path / "mended").touch()
    run = tmp_path / "run"
    spent = train(
        tmp_path,
        *command,
        f"hydra.run.dir={run}",
        "stage.guards.max_kl_sum=1e-9",
        "optimizer.base_lr=1e-2",
    )
    assert spent.code == 0, spent.out
    ended = untimed(run / "metrics.jsonl")[-1]["phase"]
    assert ended < 5
    assert "stage.guards.max_kl_sum" in json.loads((run / "result.json").read_text())["stopped"]
    still = train(tmp_path, f"resume={run}", "stage.total_phases=6")
    assert still.code == 0
    assert "no phase follows; raise stage.guards.max_kl_sum to go on" in still.out
    assert untimed(run / "metrics.jsonl")[-1]["phase"] == ended
    more = train(
        tmp_path,
        f"resume={run}",
        "stage.guards.max_kl_sum=100",
        "resume_with=[stage.guards.max_kl_sum]",
    )
    assert more.code == 0, more.out
    assert untimed(run / "metrics.jsonl")[-1]["phase"] == 6
    assert json.loads((run / "result.json").read_text())["stopped"] is None


def test_auto_goes_on_with_the_newest_unfinished_and_a_named_folder_begins_one(tmp_path, command):
    named = [*command, "hydra.run.dir=outputs/x/mine", "resume=auto"]
    first = train(tmp_path, *named)  # there is none yet: it begins
    assert first.code == 2
    assert "the judge is out of order" in first.out
    (tmp_path / "mended").touch()
    second = train(tmp_path, *named)  # the same command goes on
    assert second.code == 0, second.out + second.err
    assert "going on after phase" in second.out
    assert_refused(train(tmp_path, *named), r"resume=\S+: that run is done; give it more phases")
    assert_refused(train(tmp_path, "resume=auto"), r"resume=auto: no unfinished run below outputs")
    (tmp_path / "mended").unlink()
    (tmp_path / "other.py").write_text(REWARD)
    other = [*command, f"reward.function={tmp_path / 'other.py'}:nines"]
    assert train(tmp_path, *other, "hydra.run.dir=outputs/x/other").code == 2
    (tmp_path / "mended").touch()
    found = train(tmp_path, "resume=auto")
    assert found.code == 0
    assert "run folder: outputs/x/other" in found.out


def test_a_run_of_an_earlier_version_is_not_resumed(tmp_path, broken):
    config = OmegaConf.load(broken / ".hydra/config.yaml")
    config.stage.kl_target = None
    OmegaConf.save(config, broken / ".hydra/config.yaml")
    assert_refused(
        train(tmp_path, f"resume={broken}"),
        r"broken is of an earlier version: its configuration has stage\.kl_target, which is"
        r" stage\.adaptive_kl_target now\. Finish it with that version",
    )


def test_what_may_differ_is_a_key(tmp_path, broken):
    again = train(tmp_path, f"resume={broken}", "stage.kl_coef=3", "resume_with=[stage.kl_target]")
    assert_refused(again, r"resume_with: stage\.kl_target is no key of the configuration")


def test_a_run_whose_model_changed_is_not_resumed(tmp_path, broken):
    save_policy(tiny_policy(seed=1), tmp_path / "base")
    assert_refused(
        train(tmp_path, f"resume={broken}"),
        r"model: the files that it names have changed since the checkpoint",
    )


def test_a_run_goes_on_with_its_model_copied_anew(tmp_path, broken):
    base = tmp_path / "base"
    base.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", base, copy_function=shutil.copyfile)
    (base / "README.md").write_text("what this is")
    (base / "latest").symlink_to("nowhere")
    (tmp_path / "mended").touch()
    resumed = train(tmp_path, f"resume={broken}")
    assert (resumed.code, resumed.raised) == (0, None), resumed.out + resumed.err
    assert untimed(broken / "metrics.jsonl")[-1]["phase"] == 5


def test_scripts_sample_from_a_run_and_talk_to_it(tmp_path, command):
    (tmp_path / "mended").touch()
    folder = tmp_path / "run"
    assert train(tmp_path, *command, f"hydra.run.dir={folder}").code == 0
    asked = ("--prompt", "one two", "--prompt", "six", "--num", "2", "--gen-len", "6")
    sampled = call_script("sample.py", folder, *asked, folder=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    for word in ("base", "tuned", "one two", "six"):
        assert word in sampled.stdout
    assert sampled.stdout.count("one two") >= 2
    talked = call_script(
        "chat.py",
        folder,
        "--gen-len",
        3,
        "--temperature",
        0,
        folder=tmp_path,
        stdin="one\n/quit\ntwo\n",
    )
    assert talked.returncode == 0, talked.stderr
    assert len(talked.stdout.splitlines()) == 1
    assert "each line is continued" in talked.stderr
    greedy, top_1 = (
        call_script("sample.py", folder, "--prompt", "one", *words, folder=tmp_path)
        for words in (("--temperature", 0, "--gen-len", 5), ("--top-k", 1, "--gen-len", 5))
    )
    assert (greedy.returncode, greedy.stderr) == (0, "")
    assert greedy.stdout == top_1.stdout
    for refused in (
        call_script("sample.py", tmp_path, "--prompt", "one"),
        call_script("sample.py", folder, "--prompt", "one", "--gen-len", 0),
        call_script("sample.py", folder, "--prompt", "one", "--temperature", -1),
        call_script("sample.py", folder, "--prompt", "one", "--num", 0),
        call_script("chat.py", tmp_path / "nowhere"),
        call_script("chat.py", folder, "--gen-len", 0),
        call_script("chat.py", folder, "--temperature", "nan"),
    ):
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
        assert "Traceback" not in refused.stderr
    cold = call_script("sample.py", folder, "--prompt", "one", "--temperature", -1)
    assert cold.stderr.startswith("error: --temperature=-1.0: should be at least")


def test_a_push_without_a_token_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    outcome = train(tmp_path, *TINY, "hub.push=true", "hub.repo=me/model")
    assert_refused(outcome, r"hub\.push=true: no Hugging Face token")
    assert [name for name in written(tmp_path) if not name.endswith("train.log")] == []
    assert_refused(train(tmp_path, *TINY, "hub.push=true"), r"hub: .*hub\.repo=OWNER/NAME")


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_starts(tmp_path, broken):
    (tmp_path / "mended").touch()
    assert train(tmp_path, f"resume={broken}").code == 0
    seconds = json.loads((broken / "result.json").read_text())["seconds"]
    total = seconds.pop("total")
    assert total == pytest.approx(sum(seconds.values()))
