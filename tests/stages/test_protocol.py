"""What every stage is: its parts and its result; what cannot fit is said before it is built."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.scratch import Scratch, ScratchClassifier
from rlhf_exp.rewards.classifier import Classifier
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.classifier import TrainClassifier
from rlhf_exp.stages.dpo import DPO
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.stages.preferences import Preferences
from rlhf_exp.stages.protocol import Built, Stage, StageResult, look_up
from rlhf_exp.stages.reward_model import TrainRewardModel
from rlhf_exp.stages.sft import SFT
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import Constant, WarmupDecay

from ..rl.toy import ToyPairs, ToyTask, context, parts, parts_of, ppo_with


def built(stage: Stage[Any], **replaced: Any) -> Built:
    return stage, parts_of(stage, **replaced)


STEPS = {
    "base": built(SFT(), model=Scratch(context_len=16)),
    "judge": built(TrainClassifier(), model=ScratchClassifier()),
}
FITTING = {
    "reward": Classifier(name="artifact:judge", label="low"),
    "model": Pretrained(base_model="artifact:base"),
    "sampler": CachedSampler(gen_len=15),
}


def problems(taken: dict[str, Any], steps: dict[str, Built] = STEPS) -> list[str]:
    """What is said of PPO's parts, and of those of preferences word for word too."""
    said = [s.check_upstream(parts_of(s, **taken), look_up(steps)) for s in (PPO(), Preferences())]
    assert said[0] == said[1]
    return said[0]


def test_a_label_that_the_texts_do_not_have() -> None:
    wrong = {**FITTING, "reward": replace(FITTING["reward"], label="happy")}
    [problem] = problems(wrong)
    assert "reward.label='happy'" in problem
    assert "one of high, low" in problem
    assert problems(FITTING) == []


def test_completions_that_fill_the_context() -> None:
    wrong = {**FITTING, "sampler": CachedSampler(gen_len=16)}
    [problem] = problems(wrong)
    assert problem.startswith("sampler.gen_len=16 leaves no room")
    assert "prepare.base.model.context_len=16" in problem


@pytest.mark.parametrize(
    ("stage", "updates"), [(SFT(epochs=2, batch_size=16), 14), (TrainClassifier(batch_size=16), 21)]
)
def test_a_schedule_longer_than_the_texts_allow(stage: SFT | TrainClassifier, updates: int) -> None:
    def check(warmup_steps: int) -> list[str]:
        model = ScratchClassifier() if isinstance(stage, TrainClassifier) else Scratch()
        schedule = WarmupDecay(warmup_steps=warmup_steps) if warmup_steps else Constant()
        return stage.check_texts(parts_of(stage, model=model, schedule=schedule))

    [problem] = check(updates)
    assert f"schedule.warmup_steps={updates} must be below the number of updates" in problem
    assert check(updates - 1) == []
    assert check(0) == []


@pytest.mark.parametrize("sampler", [CachedSampler(gen_len=4), BridgeSampler(gen_len=4)])
def test_a_policy_that_diverged_stops_the_run_naming_the_phase(
    sampler: Sampler, tmp_path: Path
) -> None:
    ppo = ppo_with(total_phases=3, num_minibatches=1, batches_per_learning_phase=1, eval_samples=8)
    wild = AdamWSettings(base_lr=1e30)
    with pytest.raises(TrainingError, match=r"phase [123]: the policy's logits are not finite"):
        ppo.run(context(tmp_path), parts(sampler=sampler, optimizer=wild))


def test_stopping_at_an_eos_that_there_is_not_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    class NoEos(ToyTask):
        def build_tokenizer(self):  # type: ignore[no-untyped-def]
            tokenizer = super().build_tokenizer()
            tokenizer.eos_token = None
            return tokenizer

    stops = CachedSampler(gen_len=4, stop_at_eos=True)
    with pytest.raises(ConfigError, match="stop_at_eos=true needs a tokenizer"):
        PPO().run(context(tmp_path), parts(task=NoEos(), sampler=stops))
    assert not [*tmp_path.iterdir()]
    assert torch.is_grad_enabled()


def test_the_shape_is_found_through_steps_that_train_on_one_another() -> None:
    steps = dict(STEPS)
    base = "base"
    for name, stage in (("sft", SFT()), ("ppo", PPO()), ("reward", TrainRewardModel())):
        steps[name] = built(stage, task=ToyPairs(), model=Pretrained(base_model=f"artifact:{base}"))
        base = name
    on_last = {**FITTING, "model": Pretrained(base_model=f"artifact:{base}")}
    assert problems(on_last, steps) == []
    [problem] = problems({**on_last, "sampler": CachedSampler(gen_len=16)}, steps)
    assert "prepare.base.model.context_len=16" in problem


def test_a_model_from_elsewhere_is_not_judged() -> None:
    steps = {"tuned": built(SFT(), model=Pretrained(base_model="gpt2"))}
    for name in ("artifact:tuned", "gpt2"):
        taken = {"model": Pretrained(base_model=name), "sampler": CachedSampler(gen_len=99)}
        assert problems(taken, steps) == []
    unknown = {"reward": Classifier(name="somewhere", label="low")}
    assert problems(unknown) == []
    with_long = {"model": Scratch(context_len=4), "sampler": CachedSampler(gen_len=99)}
    assert problems(with_long) == []  # load_setup says it


def test_a_stage_names_the_parts_of_its_dataclass_and_refuses_other_kinds() -> None:
    assert Preferences.parts == {"task", "model", "reward", "sampler"}
    assert TrainClassifier.parts == SFT.parts == {"task", "model", "optimizer", "schedule"}
    taken = vars(parts_of(SFT()))
    assert SFT().check_kinds(taken) == []
    assert SFT().check_kinds({**taken, "model": ScratchClassifier(), "schedule": ToyPairs()}) == [
        "model: ScratchClassifier is not for this stage, SFT, which takes a ModelSettings; choose"
        " another model=...",
        "schedule: ToyPairs is not for this stage, SFT, which takes a Schedule; choose another"
        " schedule=...",
    ]


def test_a_part_may_be_absent_where_its_default_is_none() -> None:
    assert DPO.optional_parts == {"reward"}
    assert PPO.optional_parts == SFT.optional_parts == frozenset()
    taken = vars(parts_of(DPO(), task=ToyPairs(), reward=None))
    assert DPO().check_kinds(taken) == []
    assert DPO().check_kinds({**taken, "reward": ToyPairs(), "sampler": None}) == [
        "sampler: NoneType is not for this stage, DPO, which takes a Sampler; choose another"
        " sampler=...",
        "reward: ToyPairs is not for this stage, DPO, which takes a Reward; choose another"
        " reward=...",
    ]


def test_a_result_is_written_with_its_keys_in_their_order() -> None:
    only = StageResult(after={"a": 1.0}, seconds={"load": 2.0})
    assert [*only.content().items()] == [("after", {"a": 1.0}), ("seconds", {"load": 2.0})]
    full = replace(only, before={"a": None}, extra={"stopped": None})
    assert [*full.content()] == ["before", "after", "stopped", "seconds"]
    assert full.content()["before"] == {"a": None}
