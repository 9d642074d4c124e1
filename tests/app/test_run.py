"""train.py in this process: what it says and leaves behind when its input is bad or a run stops."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from transformers import BertConfig, BertModel

from rlhf_exp.app import run
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.scratch import ScratchClassifier
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.pairs import write_pairs
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.tasks.reviews import Reviews
from tests.builders import build_tokenizer, tiny_policy, without_checks
from tests.composed import compose
from tests.forked import TRAIN
from tests.scripts import kept_logging

# A run of a second that stands on nothing.
TINY = (
    "~experiment", "model.num_layers=1", "model.d_model=16", "sampler.gen_len=6",
    "stage.total_phases=2", "schedule.warmup_steps=1", "stage.batch_size=8", "stage.eval_samples=8",
    "stage.num_minibatches=1", "stage.batches_per_learning_phase=1",
)  # fmt: skip
# In place of ~experiment for a model that was saved; it needs a model, a task and a reward.
OWN_MODEL = ("experiment=yours", "name=run", "sampler.stop_at_eos=false")
OFFLINE = {
    "HYDRA_FULL_ERROR": "",
    "WANDB_MODE": "disabled",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": "http://127.0.0.1:9",
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code or what it raised, and what it said."""

    code: int | None
    raised: Exception | None
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return (self.out + self.err).splitlines()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def train(folder: Path, *arguments: str, terminal: bool = False) -> Outcome:
    """`python train.py ARGUMENTS` in the folder, as if it were a process of its own."""
    out, err = (Terminal() if terminal else io.StringIO() for _ in range(2))
    code, raised = 0, None
    with pytest.MonkeyPatch.context() as patch, kept_logging(), one_thread(), without_checks():
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *arguments])
        patch.setattr(sys, "excepthook", sys.excepthook)
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(TRAIN), run_name="__main__")
            except SystemExit as stop:
                code = stop.code
            except Exception as error:
                raised = error
    if "hydra/launcher=joblib" in arguments:
        end_workers()
    return Outcome(None if raised else code, raised, out.getvalue(), err.getvalue())


def end_workers() -> None:
    """Ends joblib's workers, which would run the next sweep in the folder of this one."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Several would take longer over models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def written(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def run_folder(folder: Path) -> Path:
    """The folder of the only run."""
    [log] = folder.glob("outputs/*/*/train.log")
    return log.parent


def assert_refused(outcome: Outcome, *messages: str) -> None:
    assert (outcome.code, outcome.raised) == (2, None)
    text = outcome.out + outcome.err
    assert len(outcome.lines) <= 10, text
    assert "Traceback" not in text
    for message in messages:
        assert re.search(message, text), text


# --- what Hydra refuses while it composes: nothing is written at all ---


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            "stage.kl_ceof=1",
            [r"^error: stage\.kl_ceof: no such key\. Did you mean stage\.kl_coef\?"],
        ),
        ("kl_coef=1", [r"kl_coef: no such key.* Did you mean stage\.kl_coef\?"]),
        (
            "schedule=constant schedule.warmup_steps=3",
            [
                r"^error: schedule\.warmup_steps: no such key\. The chosen schedule does not have"
                r" it; these do: schedule=cosine, schedule=warmup_decay$"
            ],
        ),
        (
            "-m schedule=constant,warmup_decay schedule.warmup_steps=1",
            [r"warmup_steps: no such key\. The chosen schedule does not .*\n  in job 0 \(schedule"],
        ),
        ("model=gpt2 model.num_layers=2", [r"these do: model=series, model=small, model=tiny"]),
        ("schedule.warmup_step=3", [r"no such key\. Did you mean schedule\.warmup_steps\?$"]),
        ("zzzzz=1", [r"zzzzz: no such key", r"python train\.py --cfg job"]),
        ("stag=ppo", [r"stag: no such key.* Did you mean stage\?"]),
        (
            "experiment=revews",
            [r"experiment=revews: no such option\. Did you mean experiment=reviews\?", "periods"],
        ),
        (
            "reward=null",
            [r"^error: reward=null: a group takes an option's name; leave it out with ~"],
        ),
        ("model=3", [r"^error: model=3: a group takes an option's name"]),
        ("logger.tags={a:1}", [r"^error: logger\.tags: Cannot merge DictConfig with ListConfig$"]),
        ("stage.kl_coef=0.1,0.2", ["Ambiguous value", "--multirun"]),
        ("stage.kl_coef=[1", ["error: .* no viable alternative", "'stage.kl_coef=\"\[1\"'$"]),
        (
            "task.prefix=#tag",
            ["^error: task.prefix=#tag cannot be read", "'task.prefix=\"#tag\"'$"],
        ),
        ("seed=1\r", [r"^error: 'seed=1\\r' ends with a carriage return"]),
        ("--cfg job -m", ["Only one of"]),
        ("-m stage.kl_coef=0.1,0.2 experiment=revews", ["Did you mean experiment=reviews"]),
    ],
)
def test_what_does_not_compose_is_explained(tmp_path, arguments, messages):
    outcome = train(tmp_path, *arguments.split(" "))
    assert_refused(outcome)
    for message in messages:
        assert re.search(message, outcome.err, re.MULTILINE), outcome.err
    assert written(tmp_path) == []


def test_a_name_leads_nowhere_else(tmp_path):
    for words in (["name=../../elsewhere"], ["-m", "name=a/../../../elsewhere", "seed=1,2"]):
        assert_refused(train(tmp_path, *words), r"name: outputs/\S+ leads elsewhere; use letters")
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "name={long}",
            r"^error: name: a folder's name has at most 255 bytes, not 300: shorten it$",
        ),
        (
            "-m name={long} seed=1,2",
            r"^error: name: a folder's name has at most 255 bytes, not 300",
        ),
        ("name='é{long}'", r"^error: name: a folder's name has at most 255 bytes, not 302"),
        (
            "hydra.run.dir={long}",
            r"^error: {long}: File name too long: shorten it$",
        ),
        (
            "-m hydra.sweep.dir={long} seed=1,2",
            r"^error: {long}\S*: File name too long: shorten it$",
        ),
        (
            "hydra.run.dir={deep}",
            r"^error: hydra\.run\.dir: its path has \d+ bytes, more than the \d+",
        ),
        ("-m hydra.sweep.dir={deep} seed=1,2", r"its path has \d+ bytes, more than the \d+ that"),
        (
            "artifacts_dir={long} experiment=reviews",
            r"^error: {long}/\S+: File name too long",
        ),
        ("task=dataset task.path={long}", r"^error: {long}: File name too long: shorten it$"),
        ("resume={long}", r"^error: resume={long}: no run's folder"),
        (
            "reward=function reward.function={long}.py:f",
            r"^error: .*{long}\.py: File name too long",
        ),
    ],
)
def test_a_name_that_is_too_long_for_the_disk_is_refused(tmp_path, words, message):
    names = {"long": "n" * 300, "deep": "/".join(["d" * 200] * 19)}
    small = () if "experiment=" in words else TINY
    outcome = train(tmp_path, *words.format(**names).split(" "), *small)
    assert_refused(outcome, "(?m)" + message.format(**names))


# --- what the run refuses before anything is loaded: only the log is written ---


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            "stage.kl_coef=-1 stage.clip_coef=abc prepare.base.stage.epochs=0",
            [r"^error: prepare\.base\.stage\.epochs=0", r"clip_coef='abc'", r"kl_coef=-1"],
        ),
        ("experiment=labelled_text", [r"error: task\.path is required: set task\.path=\.\.\.$"]),
    ],
)
def test_a_bad_value_leaves_nothing_but_the_log(tmp_path, arguments, messages):
    assert_refused(train(tmp_path, *arguments.split(" ")), *messages)
    folder = run_folder(tmp_path)
    assert written(tmp_path) == [f"{folder.relative_to(tmp_path).as_posix()}/train.log"]
    assert not (folder / ".hydra").exists()
    assert re.search(messages[-1], (folder / "train.log").read_text())


def test_more_is_wrong_than_fits_ten_lines(tmp_path):
    ppo = ["total_phases", "batch_size", "num_minibatches", "clip_coef", "vf_coef", "ent_coef"]
    ppo += ["kl_coef", "estimator.gamma", "estimator.gae_lambda", "eval_every"]
    bad = [f"stage.{name}=-1" for name in ppo]
    outcome = train(tmp_path, *bad)
    assert_refused(outcome, "stage.clip_coef=-1", r"\.\.\. and 2 more$")
    assert len(outcome.lines) == 9


REFUSED = {
    "several fields at once": (
        "stage.kl_coef=-1 stage.clip_coef=abc stage.total_phases=1.5 sampler.top_p=0"
        " prepare.base.stage.epochs=0",
        [
            r"stage\.kl_coef=-1: should be at least 0",
            r"stage\.clip_coef='abc': should be a number",
            r"stage\.total_phases=1\.5: should be a whole number",
            r"sampler\.top_p=0: should be above 0",
            r"prepare\.base\.stage\.epochs=0: should be at least 1",
        ],
    ),
    "a clip that never clips from below": (
        "stage.clip_coef=2",
        [r"stage\.clip_coef=2: should be below 1"],
    ),
    "nan": ("stage.kl_coef=nan optimizer.eps=inf", [r"stage\.kl_coef=nan", r"optimizer\.eps=inf"]),
    "a bool": ("stage.estimator.gamma=true optimizer.beta1=false", [r"gamma=True", r"beta1=False"]),
    "no multiple": ("stage.batch_size=30", [r"stage: batch_size=30 .* num_minibatches=4"]),
    "no multiple of heads": ("prepare.base.model.d_model=30", [r"base\.model: d_model=30"]),
    "warm-up": (
        "schedule.warmup_steps=100",
        [r"schedule\.warmup_steps=100 must be below stage\.total_phases=100: lower"],
    ),
    "no such file": (
        "experiment=labelled_text task.path=x.tsv",
        [r"task\.path: cannot read .*x\.tsv"],
    ),
    "an artifact": (
        "model.base_model=artifact:bsae",
        [r"model\.base_model=artifact:bsae: .*; there are: base, classifier"],
    ),
    "keys that the experiment sets for another stage": (
        "experiment=yours stage=best_of_n model=gpt2 task=prefix reward=length",
        [r"stage\.kl_coef: no such key of stage; leave it out: '~stage\.kl_coef'"],
    ),
    "a key with ++": ("++stage.kl_ceof=1", [r"stage\.kl_ceof: no such key of stage"]),
    "a key with +": ("+foo=1 +bar=2", [r"bar: no such key", r"foo: no such key"]),
    "a key of a step": ("+prepare.base.modle=1", [r"prepare\.base\.modle: no such key; use"]),
    "own keys": (
        "seed=abc prepare_seed=-1 device=null artifacts_dir=null name=''",
        [r"seed='abc'", r"prepare_seed=-1", r"device=None", r"artifacts_dir=None", r"name=''"],
    ),
    "a list": ("allow_targets=foo", [r"allow_targets='foo'"]),
    "a device": ("device=gpu", [r"device=gpu: use auto, cpu, cuda"]),
    "no step": ("prepare.base=null", [r"prepare\.base=None"]),
    "no part": ("prepare.base.model=null", [r"prepare\.base\.model: is required here"]),
    "no reward": ("~experiment ~reward", [r"reward: is required here; choose one: reward="]),
    "no logger": ("~logger", [r"logger: no option is chosen; choose one: logger="]),
    "an interpolation": ("task.prefix=a${nothing}", [r"task\.prefix: Interpolation key 'nothing'"]),
    "another kind of model": (
        "~experiment model=tiny_classifier",
        [r"model: ScratchClassifier is not for this stage, PPO"],
    ),
    "another kind of logger and hub": (
        "logger=local logger._target_=rlhf_exp.rewards.length.Length"
        " +logger.target_tokens=3 hub._target_=rlhf_exp.rewards.length.Length",
        [
            r"(?m)^logger: Length is not for this; choose",
            r"(?m)^hub\.push: no such key of hub; leave it out: '~hub\.push'$",
        ],
    ),
    "a foreign target": (
        "reward._target_=shutil.rmtree",
        [r"reward\._target_=shutil\.rmtree is outside of rlhf_exp\., .* allow_targets=\[shutil\]"],
    ),
    "a foreign target by a detour": (
        "reward._target_=rlhf_exp.app.run.shutil.rmtree"
        " optimizer._target_=torch.optim.adam.torch.load",
        [r"allow_targets=\[shutil\]", r"allow_targets=\[torch\.serialization\]"],
    ),
    "a foreign target below": (
        "~experiment reward=sum reward.terms.length.reward._target_=os.getcwd",
        [r"_target_=os\.getcwd is outside"],
    ),
    "functions and methods of our own": (
        "reward._target_=rlhf_exp.runs.files.write_whole"
        " task._target_=rlhf_exp.app.run.sys.modules.clear"
        " stage._target_=rlhf_exp.app.run.__builtins__.get"
        " sampler._target_=rlhf_exp.settings.ConfigError",
        [r"reward\._target_=rlhf_exp\.runs\.files\.write_whole: it is no class of settings",
         r"modules\.clear: it is no", r"__builtins__\.get: it is no", r"ConfigError: it is no"],
    ),
    "a foreign target in a list, in a step, below a mapping": (
        "~experiment reward.character=[{_target_:os.getcwd}] +stage.x.y._target_=os.abort"
        " +prepare={base:{stage:{_target_:os._exit},task:{_target_:rlhf_exp.tasks.prefix.Prefix}}}",
        [r"reward\.character\.0\._target_=os\.getcwd is", r"stage\.x\.y\._target_=os\.abort is",
         r"=os\._exit is"],
    ),
    "instructions to Hydra": (
        "+stage._partial_=true +reward._args_=[x] +task._recursive_=false +optimizer._convert_=none"
        " +sampler.x={_target_:rlhf_exp.rewards.length.Length,_partial_:true}",
        [r"stage: _partial_ is no key of it", r"reward: _args_ is", r"task: _recursive_ is",
         r"optimizer: _convert_ is", r"sampler: _partial_ is"],
    ),
    "no such target": (
        "stage._target_=rlhf_exp.stages.ppo.Foo",
        [r"stage\._target_=rlhf_exp.stages.ppo.Foo: .*ppo\.py\) has no Foo$"],
    ),
    "an interpolation that is a text": (
        r"~experiment reward.character='a\${b}'", [r"character='a\$\{b\}': .* at most 1 char"],
    ),
    "a dangerous target that is allowed": (
        "allow_targets=[os] reward._target_=os.system",
        [r"reward: Target 'os.system' is blocklisted"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_value_is_refused_by_name_before_anything_is_loaded(tmp_path, monkeypatch, case):
    arguments, messages = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run.execute(compose(*arguments.split(" ")), tmp_path / "run")
    for message in messages:
        assert re.search(message, str(caught.value)), caught.value
    assert written(tmp_path) == []


def test_a_malformed_address_of_the_hub_is_refused_even_if_nothing_is_loaded_from_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:bad")
    with pytest.raises(ConfigError, match=r"^HF_ENDPOINT=https://hub\.example:bad is not a URL"):
        run.execute(compose(*TINY), tmp_path / "run")


# --- what shows when the parts are loaded ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sampler.gen_len=500", r"prompt of 5 tokens and sampler\.gen_len=500 exceed .* most 59"),
        ("task=prefix", r"model: a model from scratch needs a task with texts"),
        ("model=gpt2", r"model\.base_model='gpt2' cannot be loaded: .* is out of reach"),
        ("model=local model.base_model=./x", r"model\.base_model='\./x': no such directory"),
        ("reward=classifier reward.name=a/b", r"reward\.name='a/b' cannot be loaded: .* local dir"),
        ("reward=classifier reward.name={} reward.direction=neg", r"no such label.* positive, meh"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(tmp_path, arguments, message):
    saved = tmp_path / "classifier=1,#2"
    if "{}" in arguments:
        model = ScratchClassifier(d_model=16, num_heads=2).classifier(
            build_tokenizer(), ("positive", "meh"), seed=0
        )
        model.save_pretrained(saved)
        build_tokenizer().save_pretrained(saved)
    overrides = [word.format(saved) for word in arguments.split(" ")]
    tiny = [*TINY]
    if "model=" in arguments:
        tiny = [*OWN_MODEL, "task=reviews", "reward=char_count"]
    outcome = train(tmp_path, *tiny, *overrides)
    assert_refused(outcome, message)
    assert written(run_folder(tmp_path)) == ["train.log"]


# --- rewards of a user's own ---

REWARDS = """
import torch
from rlhf_exp.rewards.protocol import TextReward
from rlhf_exp.settings import settings
from rlhf_exp.training.schedules import WarmupDecay


@settings
class Vowels(TextReward):
    per: int = 1

    def score(self, text):
        return sum(text.count(vowel) for vowel in "aeiou") / self.per


@settings
class Broken(TextReward):
    after: int = 0

    def score(self, text):
        Broken_seen.append(text)
        return float("nan") if len(Broken_seen) > self.after else 1.0


Broken_seen = []


@settings
class Forcing(TextReward):
    def score(self, text):
        import logging

        logging.basicConfig(force=True)
        return 0.0


@settings
class Bug(TextReward):
    def score(self, text):
        return 1 / 0


@settings
class Unloadable(TextReward):
    def score(self, text):
        return 0.0

    def load(self, device):
        return 1 / 0


@settings
class Sudden(WarmupDecay):
    def multiplier(self, step, *, total_steps):
        return 1 / (1 - step)


@settings
class Stop(TextReward):
    def score(self, text):
        raise KeyboardInterrupt
"""


@pytest.fixture
def my_rewards(tmp_path, monkeypatch) -> str:
    """The name of a module of rewards outside of the package."""
    name = f"rewards_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{name}.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return name


def own(module: str, name: str, *arguments: str) -> list[str]:
    return [*TINY, f"allow_targets=[{module}]", "~reward.character",
            f"reward._target_={module}.{name}", *arguments]  # fmt: skip


def status(folder: Path) -> dict[str, str]:
    return json.loads((folder / "status.json").read_text())


def test_a_reward_from_a_module_that_is_allowed_is_used(tmp_path, my_rewards):
    outcome = train(tmp_path, *own(my_rewards, "Vowels", "+reward.per=2"))
    assert (outcome.code, outcome.raised) == (0, None)
    folder = run_folder(tmp_path)
    assert status(folder) == {"status": "done", "error": None}
    lines = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    for row in lines:
        text = row["prompt"] + row["completion"]
        assert row["score"] == sum(text.count(vowel) for vowel in "aeiou") / 2
    assert [line for line in outcome.lines if line.startswith("phase ")][1].startswith("phase 2/2")


def test_a_reward_that_is_not_finite_stops_the_run_by_phase_and_cause(tmp_path, my_rewards):
    # 8 scores of the evaluation before and 8 of the first phase are finite.
    outcome = train(tmp_path, *own(my_rewards, "Broken", "+reward.after=16"))
    assert (outcome.code, outcome.raised) == (2, None)
    assert re.search(r"error: phase 2: the reward gave nan for 8 of 8 samples", outcome.out)
    assert "Traceback" not in outcome.out + outcome.err
    folder = run_folder(tmp_path)
    assert status(folder)["status"] == "failed"
    assert "phase 2" in status(folder)["error"]
    assert "Traceback" in (folder / "train.log").read_text()
    phases = [json.loads(x)["phase"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert phases == [0, 1]


@pytest.mark.soak
def test_a_job_of_a_sweep_that_stops_leaves_the_others(tmp_path, my_rewards):
    broken = own(my_rewards, "Broken", "+reward.after=8,1000")
    outcome = train(tmp_path, "-m", *broken)
    assert (outcome.code, outcome.raised) == (1, None)
    assert "Traceback" not in outcome.out + outcome.err
    jobs = sorted(tmp_path.glob("outputs/run/sweeps/*/*/status.json"))
    assert [json.loads(path.read_text())["status"] for path in jobs] == ["failed", "done"]


def test_a_bug_keeps_its_traceback(tmp_path, my_rewards):
    words = [f"allow_targets=[{my_rewards}]", f"schedule._target_={my_rewards}.Sudden"]
    outcome = train(tmp_path, *TINY, *words)
    assert isinstance(outcome.raised, ZeroDivisionError)
    folder = run_folder(tmp_path)
    assert status(folder) == {"status": "failed", "error": "ZeroDivisionError: division by zero"}
    assert "ZeroDivisionError" in (folder / "train.log").read_text()


def test_a_bug_in_the_scores_of_a_reward_is_told_with_its_line(tmp_path, my_rewards):
    outcome = train(tmp_path, *own(my_rewards, "Bug"))
    assert (outcome.code, outcome.raised) == (2, None)
    line = REWARDS.splitlines().index("        return 1 / 0") + 1
    message = (
        rf"error: phase 0: the reward raised ZeroDivisionError: .* at .*{my_rewards}\.py:{line}"
    )
    assert re.search(message, outcome.out)
    assert_refused(outcome)
    log = (run_folder(tmp_path) / "train.log").read_text()
    assert "Traceback" in log
    assert "ZeroDivisionError" in log
    assert status(run_folder(tmp_path))["status"] == "failed"


def test_an_interrupt_ends_the_run_with_a_line_and_130(tmp_path, my_rewards):
    outcome = train(tmp_path, *own(my_rewards, "Stop"))
    assert outcome.code == 130
    assert "interrupted; what was logged so far is in outputs/run/" in outcome.out
    assert "Traceback" not in outcome.out + outcome.err
    assert status(run_folder(tmp_path))["status"] == "interrupted"


def test_on_a_terminal_the_lines_of_the_phases_are_in_the_log_alone(tmp_path):
    outcome = train(tmp_path, *TINY, terminal=True)
    assert outcome.code == 0
    assert "phase 1/2" not in outcome.out
    assert "phase 1/2" in (run_folder(tmp_path) / "train.log").read_text()
    assert "2/2" in outcome.err, "the bar"
    assert "evaluation at phase 2" in outcome.out


@pytest.mark.parametrize(
    "option",
    ["none", *(pytest.param(name, marks=pytest.mark.soak) for name in ("disabled", "stdout"))],
)
def test_the_log_is_written_whatever_hydra_logs(tmp_path, option):
    outcome = train(tmp_path, *TINY, f"hydra/job_logging={option}", "hydra.run.dir=run")
    assert (outcome.code, outcome.raised) == (0, None)
    assert "INFO] run folder: run" in (tmp_path / "run" / "train.log").read_text()
    words = [*TINY, f"hydra/job_logging={option}", "hydra.run.dir=bad", "stage.kl_coef=-1"]
    bad = train(tmp_path, *words)
    assert_refused(bad, r"error: stage\.kl_coef=-1")
    assert "kl_coef=-1" in (tmp_path / "bad" / "train.log").read_text()


def test_a_reward_that_sets_up_logging_anew_ends_no_log(tmp_path, my_rewards):
    outcome = train(tmp_path, *own(my_rewards, "Forcing"))
    assert (outcome.code, outcome.raised) == (0, None)
    assert "INFO] run folder: " in (run_folder(tmp_path) / "train.log").read_text()
    assert "run folder: " in outcome.out


# --- pieces ---


def test_an_error_that_is_not_hydras_is_left_alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "")
        with pytest.raises(ZeroDivisionError):
            run.guard(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [(run.AlreadySaid(2), 2), (run.AlreadySaid(1), 1), (KeyboardInterrupt(), 130)],
)
def test_a_guard_turns_errors_into_exit_codes(error, code, monkeypatch, capsys):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run.guard(main)
    assert caught.value.code == code
    assert capsys.readouterr() == ("", "")


def test_full_errors_are_there_for_the_asking(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "stage.kl_ceof=1"])
    with pytest.raises(hydra.errors.ConfigCompositionException):
        runpy.run_path(str(TRAIN), run_name="__main__")


def test_full_errors_leave_a_command_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(OFFLINE, "HYDRA_FULL_ERROR", "1")
    outcome = train(tmp_path, *TINY, "--dry-run")
    assert (outcome.code, outcome.raised) == (0, None)
    assert "all is well" in outcome.out


def test_a_run_goes_on_with_the_command_that_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_TOKEN", "training")
    monkeypatch.setenv("KEYWORD", "great")
    keywords = r'reward.keywords=["costs \${x}","${oc.env:KEYWORD}","${task.prefix}"]'
    words = [*TINY, "reward=keyword", keywords, "hydra.run.dir=my runs/0_kl_coef=0.1,#2"]
    assert train(tmp_path, *words).code == 0
    again = train(tmp_path, *words)
    assert_refused(again, "or go on with it: python train.py ")
    shown = re.search(r"python train\.py (.*)", again.out)[1]
    monkeypatch.setenv("JUPYTER_TOKEN", "none")
    for full_error, phases in (("", 3), ("1", 4)):
        monkeypatch.setitem(OFFLINE, "HYDRA_FULL_ERROR", full_error)
        outcome = train(tmp_path, *shlex.split(shown), f"stage.total_phases={phases}")
        assert (outcome.code, outcome.raised) == (0, None), outcome.out + outcome.err
        assert f"phase {phases}/{phases}" in outcome.out
    folder = tmp_path / "my runs" / "0_kl_coef=0.1,#2"
    resolved = json.loads((folder / "resolved_config.json").read_text())
    prompt = resolved["task"]["prefix"]
    assert resolved["reward"]["keywords"] == ["costs ${x}", "great", prompt]


def test_all_that_is_missing_is_named():
    cfg = compose("~experiment", "task=labelled_text", "model=local", "reward=classifier")
    with pytest.raises(ConfigError) as caught:
        run.to_container(cfg)
    assert str(caught.value).splitlines() == [
        f"{key} is required: set {key}=..."
        for key in ("model.base_model", "reward.name", "task.path")
    ]


def test_every_run_has_an_id_of_its_own():
    ids = [OmegaConf.create({"a": "${run_id:}", "b": "${run_id:}"}) for _ in range(2)]
    assert ids[0].a == ids[0].b
    assert re.fullmatch("[0-9a-f]{6}", ids[0].a)
    assert ids[0].a != ids[1].a


def test_what_is_allowed_is_instantiated_with_plain_values():
    problems: list[str] = []
    config = {"_target_": "rlhf_exp.tasks.reviews.Reviews", "num_reviews": 12}
    built = run.instantiate(config, "task", problems, allowed=run.ALLOWED_TARGETS)
    assert built == Reviews(num_reviews=12)
    assert problems == []
    torch_optimizer = {"_target_": "torch.optim.SGD", "_partial_": True}
    assert run.instantiate(torch_optimizer, "x", problems, allowed=run.ALLOWED_TARGETS)
    assert os.environ.get("HYDRA_FULL_ERROR") != "1", "a run in this process left it behind"


@pytest.mark.parametrize("word", ["reward=http", "finetune=lora", "sampler.gen_len=3"])
def test_a_part_that_the_stage_does_not_take_is_refused(tmp_path, word):
    outcome = train(tmp_path, "~experiment", "stage=sft", "task=reviews", word,
                    *(["reward.url=http://localhost:1/"] if "http" in word else []))  # fmt: skip
    part = word.partition("=")[0].partition(".")[0]
    assert_refused(outcome, rf"{part}: SFT takes none and would ignore it: leave {part}=")


def test_dpo_says_what_it_takes_and_needs_rates_for_a_saved_model(tmp_path):
    file = tmp_path / "pairs.jsonl"
    write_pairs([Pair(f"{i}", " a", " b") for i in range(40)], file)
    own = ["logger=local", f"task.path={file}", "model.base_model=DIR", "--dry-run"]
    outcome = train(tmp_path, "experiment=dpo", *own)
    assert outcome.code == 0, outcome.err
    assert "all is well: DPO in" in outcome.out
    outcome = train(tmp_path, "experiment=dpo", *own, "intervention=none")
    assert_refused(outcome, "intervention: DPO takes none and would ignore it")
    outcome = train(tmp_path, "experiment=dpo", *own, "stage.resample_every=2")
    assert_refused(outcome, r"stage\.resample_every=2 needs a reward .*: choose one: reward=")
    bare = ["~experiment", "~reward", "stage=dpo", "task=pairs", "model=local"]
    outcome = train(tmp_path, *bare, *own)
    assert_refused(outcome, "would ruin DIR: write experiment=dpo in place of ~experiment, with")


def test_a_saved_model_is_not_trained_with_the_settings_of_a_tiny_one(tmp_path):
    save_policy(tiny_policy(), tmp_path / "DIR")
    own = ["model=local", "model.base_model=DIR", "task=prefix", "reward=length", "--dry-run"]
    outcome = train(tmp_path, *own)
    assert_refused(
        outcome,
        r"optimizer\.base_lr and other settings are those of a tiny model, and would ruin DIR: add"
        " experiment=yours, or experiment=reviews to keep these settings",
    )
    outcome = train(tmp_path, "~experiment", *own)
    assert_refused(outcome, "would ruin DIR: write experiment=yours in place of ~experiment, with")
    for words in (["experiment=yours"], ["experiment=reviews", "task=reviews"]):
        outcome = train(tmp_path, *own, *words)
        assert outcome.code == 0, outcome.err
    outcome = train(tmp_path, "-m", *own, "experiment=yours", "seed=1,2")
    assert "2 of 2 jobs to run" in outcome.out


@pytest.mark.parametrize(
    "words",
    [
        "experiment=yours task=prefix reward=length",
        "~experiment stage=best_of_n task=prefix reward=length",
        "~experiment stage=preferences task=instructions reward=length sampler.stop_at_eos=true",
        "~experiment ~reward stage=sft task=reviews",
        "experiment=dpo task.path=pairs.jsonl",
    ],
)
def test_an_encoder_is_refused_before_it_is_loaded_where_texts_are_continued(tmp_path, words):
    shape = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path / "BERT")
    write_pairs([Pair(f"{i}", " a", " b") for i in range(40)], tmp_path / "pairs.jsonl")
    own = ["model=local", "model.base_model=BERT", "--dry-run"]
    assert_refused(
        train(tmp_path, *words.split(), *own), r"'BERT' is an encoder \(bert\) and cannot"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra.run.dir={long}"], r"the name of the run's folder has 140 characters"),
        (["-m", "hydra.sweep.dir={long}"], r"the name of the sweep's folder has 140 characters"),
    ],
)
def test_a_folder_too_long_for_wandb_is_refused_before_anything_is_loaded(tmp_path, words, message):
    outcome = train(
        tmp_path, *(word.format(long="a" * 140) for word in words), *TINY, "logger.mode=offline"
    )
    assert outcome.code == 2
    assert re.search(message, outcome.err + outcome.out)
    assert "phase" not in outcome.out


def test_a_push_is_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    pushed = ["hub.push=true", "hub.repo=me/model"]
    sweep = train(tmp_path, "-m", *TINY, *pushed, "seed=1,2")
    assert_refused(sweep, r"the jobs of a sweep would overwrite it: set hub\.push=false")
    assert_refused(train(tmp_path, "until=base", *pushed), r"and until=base ends before: set hub")


WANDERING = """
import os, tempfile

def wander():
    os.chdir(tempfile.mkdtemp(dir={away!r}))

wander()

def f(completions, **_):
    wander()
    return [float(len(text)) for text in completions]
"""


def test_a_reward_that_changes_the_folder_scatters_nothing(tmp_path):
    here, away = tmp_path / "here", tmp_path / "away"
    here.mkdir()
    away.mkdir()
    (here / "rewards.py").write_text(WANDERING.format(away=str(away)))
    words = ["reward=function", "reward.function=rewards.py:f", "logger=local"]
    done = train(here, *TINY, *words, "stage.checkpoint_every=1")
    assert done.code == 0, done.lines
    folder = run_folder(here)
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert {"model/README.md", "curves.png", "result.json"} <= {*written(folder)}
    assert f"run folder: {folder.relative_to(here)}" in done.out
    assert len([*away.iterdir()]) > 1
    assert written(away) == []


INFINITE = """
def f(completions, **_):
    return [3e38 for _ in completions]
"""


def test_a_run_whose_mean_score_is_infinite_ends_as_others_do(tmp_path):
    (tmp_path / "rewards.py").write_text(INFINITE)
    words = ["reward=function", "reward.function=rewards.py:f", "logger=local"]
    done = train(tmp_path, *TINY, *words)
    assert done.code == 0, done.lines
    folder = run_folder(tmp_path)
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert json.loads((folder / "result.json").read_text())["after"]["eval/score"] is None
    assert "after:  score not finite  kl " in done.out
    assert "| `eval/score` | not finite | not finite |" in (folder / "model/README.md").read_text()
    assert "the table of samples failed" not in done.out
