"""Every stage that is stopped after each of its steps, and begun again each time, ends as one that
went through."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.models.finetune import Finetune, Full, LastLayers, Lora
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.scratch import Scratch, ScratchClassifier
from rlhf_exp.rewards.protocol import Reward
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.checkpoint import read_newest_checkpoint
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.stopping import Interrupted, StopRequests
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.best_of_n import BestOfN
from rlhf_exp.stages.classifier import TrainClassifier
from rlhf_exp.stages.dpo import DPO
from rlhf_exp.stages.preferences import Preferences
from rlhf_exp.stages.protocol import StageResult
from rlhf_exp.stages.reward_model import TrainRewardModel
from rlhf_exp.stages.sft import SFT
from rlhf_exp.tasks.dataset import PromptDataset
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.saver import Saver, join_state

from ..reliability import count_cases
from ..rl.toy import (
    ECHO,
    RAGGED,
    Echoed,
    EchoTask,
    LowWords,
    ToyPairs,
    context,
    parts,
    parts_of,
    ppo_with,
    saved_model,
)
from ..states import assert_equal_states

DROPOUT = Scratch(num_layers=1, d_model=16, num_heads=2, context_len=16, dropout=0.2)
OPTIMIZER = AdamWSettings(base_lr=1e-2)
SAMPLER = CachedSampler(gen_len=4, stop_at_eos=True)

Run = Callable[[Context, Path], StageResult]


def sft(data: str) -> Run:
    """With measurements, of which the best is kept, in the middle of an epoch and at its end."""
    stage = SFT(
        data=data, epochs=2, batch_size=32, log_every=2, eval_every=3 if data == "texts" else 2,
        eval_samples=8, layout="pack" if data == "texts" else "pad",
    )  # fmt: skip
    taken = parts_of(stage, task=EchoTask(), model=DROPOUT, optimizer=OPTIMIZER)
    return lambda given, base: stage.run(given, taken)


def classifier(given: Context, base: Path) -> StageResult:
    model = ScratchClassifier(num_layers=1, d_model=16, num_heads=2, context_len=16)
    stage = TrainClassifier(epochs=2, batch_size=40, log_every=1, token_noise=0.2)
    return stage.run(given, parts_of(stage, model=model, optimizer=OPTIMIZER))


def pretrained_classifier(given: Context, base: Path) -> StageResult:
    """The language model below a new head, which is drawn again on resume."""
    stage = TrainClassifier(epochs=1, batch_size=40, log_every=1, dtype="bf16")
    return stage.run(given, parts_of(stage, model=model_in(base), optimizer=OPTIMIZER))


def model_in(base: Path) -> Pretrained:
    return Pretrained(base_model=str(base)) if base.exists() else saved_model(base)


def preferences(given: Context, base: Path) -> StageResult:
    stage = Preferences(num_pairs=60, num_held_out=20, batch_size=24)
    taken = parts_of(stage, task=EchoTask(), model=model_in(base), reward=Echoed(), sampler=SAMPLER)
    return stage.run(given, taken)


def best_of_n(given: Context, base: Path) -> StageResult:
    """Batches end within a prompt's samples; the rows are written once all are there."""
    stage = BestOfN(samples_per_prompt=6, num_prompts=4, batch_size=10)
    taken = parts_of(stage, task=EchoTask(), model=model_in(base), reward=Echoed(), sampler=SAMPLER)
    return stage.run(given, taken)


def reward_model(given: Context, base: Path) -> StageResult:
    stage = TrainRewardModel(
        epochs=2, batch_size=40, width=16, log_every=1, eval_every=3, num_examples=1,
        unfreeze_layers=1, keep_features=False,
    )  # fmt: skip
    pairs = ToyPairs(count=120)
    return stage.run(given, parts_of(stage, task=pairs, model=model_in(base), optimizer=OPTIMIZER))


def reward_classifier(given: Context, base: Path) -> StageResult:
    """All weights are trained, below a new head, which is drawn again on resume."""
    stage = TrainRewardModel(
        head="classifier", epochs=2, batch_size=40, log_every=1, eval_every=3, dtype="bf16"
    )
    pairs = ToyPairs(count=120)
    return stage.run(given, parts_of(stage, task=pairs, model=model_in(base), optimizer=OPTIMIZER))


def ppo(given: Context, base: Path) -> StageResult:
    stage = ppo_with(
        total_phases=4, batch_size=6, num_minibatches=2, eval_every=2, eval_samples=4,
        histograms_every=1, adaptive_kl_target=1.0, kl_horizon=20, async_reward=True,
    )  # fmt: skip
    taken = parts(task=RAGGED, sampler=SAMPLER, finetune=Lora(rank=2), model=ECHO)
    return stage.run(given, taken)


def ppo_on_a_dataset(given: Context, base: Path) -> StageResult:
    """Prompts and columns of a file, micro-batches, a trunk that is shared."""
    file = base.with_name("prompts.jsonl")
    rows = [{"prompt": f"w{i} w{i + 1}"[: 2 + 3 * (i % 2)], "n": i} for i in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = ppo_with(
        total_phases=3, batch_size=4, num_minibatches=2, micro_batch_size=1, eval_every=2,
        eval_samples=4, whiten_advantages="minibatch", kl_penalty="reward",
    )  # fmt: skip
    taken = parts(
        task=PromptDataset(path=str(file), prepend_bos=True), sampler=SAMPLER,
        finetune=LastLayers(num_layers_unfrozen=1), model=model_in(base),
    )  # fmt: skip
    return stage.run(given, taken)


def dpo(finetune: Finetune, reward: Reward | None, **options: Any) -> Run:
    """Evaluated before, between and after; in the middle of an epoch and at its end."""
    stage = DPO(
        epochs=2, batch_size=40, log_every=1, eval_every=3, eval_samples=4, sft_coef=0.1,
        **{"eval_task": EchoTask(), **options},
    )  # fmt: skip

    def run(given: Context, base: Path) -> StageResult:
        taken = parts_of(
            stage, task=ToyPairs(count=120), model=model_in(base), optimizer=OPTIMIZER,
            finetune=finetune, reward=reward, sampler=SAMPLER,
        )  # fmt: skip
        return stage.run(given, taken)

    return run


STAGES: dict[str, tuple[Run, int]] = {
    "sft on texts": (sft("texts"), 6),
    "sft on demonstrations": (sft("demonstrations"), 6),
    "classifier": (classifier, 6),
    "classifier on a pretrained model": (pretrained_classifier, 3),
    "preferences": (preferences, 3),
    "best_of_n": (best_of_n, 3),
    "reward_model": (reward_model, 4),
    "reward_model with a classifier": (reward_classifier, 4),
    "dpo": (dpo(Full(), None), 4),
    "dpo of adapters": (dpo(Lora(rank=2), Echoed()), 4),
    "dpo on new pairs": (dpo(Lora(rank=2), LowWords(), resample_every=3), 4),
    "ppo": (ppo, 4),
    "ppo on a dataset": (ppo_on_a_dataset, 3),
}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts of states that were loaded; each gives what was saved again right after."""
    parts: list[str] = []
    restore = Saver.restore

    def compare(saver: Saver) -> bool:
        was_loaded = restore(saver)
        if was_loaded:
            newest = read_newest_checkpoint(saver._context.folder.path)
            assert newest is not None
            saved = join_state(*newest)["state"]
            loaded = {name: part.state_dict() for name, part in saver._parts.items()}
            assert_equal_states(loaded, saved)
            parts.extend(loaded)
        return was_loaded

    monkeypatch.setattr(Saver, "restore", compare)
    return parts


def left(path: Path) -> dict[str, Any]:
    """What a run wrote, by file, without times, checkpoints and its name."""
    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_file() or name.startswith(("checkpoints/", "run_id", "environment")):
            continue
        content: Any = file.read_bytes()
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in content.decode().splitlines()]
            content = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]
        found[name] = content
    return found


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", STAGES)
def test_stopped_after_each_step_it_ends_as_if_it_had_gone_through(
    name: str, tmp_path: Path, loads: list[str]
) -> None:
    stage, fewest = STAGES[name]
    whole = stage(context(tmp_path / "whole"), tmp_path / "base")
    starts = 0
    while True:
        stop = StopRequests()
        stop.limit(1e-9, began=0.0)  # the time is always up; one step is always made
        given = Context(
            folder=context(tmp_path / "cut").folder, seed=1, device=torch.device("cpu"),
            resume=starts > 0, stop=stop,
        )  # fmt: skip
        torch.rand(starts)  # nobody draws from this one
        starts += 1
        try:
            result = stage(given, tmp_path / "base")
            break
        except Interrupted:
            assert starts < 50
    assert starts >= fewest
    assert loads.count("random") == starts - 1
    assert left(tmp_path / "cut") == left(tmp_path / "whole")
    assert replace(result, seconds={}) == replace(whole, seconds={})
    count_cases(f"stopped after a step: {name.split()[0]}", starts - 1)


def stopped(run: Run, path: Path, base: Path, *, resume: bool) -> None:
    """The first step of a run, or one more."""
    stop = StopRequests()
    stop.limit(1e-9, began=0.0)
    folder = context(path).folder
    run(Context(folder=folder, seed=1, device=torch.device("cpu"), resume=resume, stop=stop), base)


@pytest.mark.parametrize("name", ["reward_model", "dpo", "best_of_n"])
def test_another_model_is_refused(name: str, tmp_path: Path) -> None:
    run = STAGES[name][0]
    with pytest.raises(Interrupted):
        stopped(run, tmp_path / "run", tmp_path / "base", resume=False)
    saved_model(tmp_path / "other", d_model=8)
    with pytest.raises(
        ConfigError, match=r"^model: the files that it names have changed since the checkpoint"
    ):
        stopped(run, tmp_path / "run", tmp_path / "other", resume=True)


@dataclass(frozen=True)
class Shorter(EchoTask):
    """Evaluates on half of the prompts."""

    def eval_prompts(self) -> tuple[str, ...]:
        return super().eval_prompts()[:12]

    def fingerprint(self) -> str:
        return "shorter"


def test_dpo_goes_on_with_the_same_evaluations(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        stopped(dpo(Full(), None), tmp_path / "run", tmp_path / "base", resume=False)
    other = dpo(Full(), None, eval_task=Shorter())
    with pytest.raises(ConfigError, match=r"^stage.eval_task: the files that it names have chan"):
        stopped(other, tmp_path / "run", tmp_path / "base", resume=True)
