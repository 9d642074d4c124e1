"""What cannot fit is said before anything is built."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.scratch import Scratch, ScratchClassifier
from rlhf_exp.rewards.classifier import Classifier
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.classifier import TrainClassifier
from rlhf_exp.stages.foresight import foresee
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.stages.sft import SFT
from rlhf_exp.training.context import TrainingError
from rlhf_exp.training.optim import AdamWSettings, Constant, WarmupDecay

from ..rl.toy import ToyTask, context, parts, ppo_with

STEPS = {
    "base": (SFT(), {"task": ToyTask(), "model": Scratch(context_len=16)}),
    "judge": (TrainClassifier(), {"task": ToyTask(), "model": ScratchClassifier()}),
}
FITTING = {
    "reward": Classifier(name="artifact:judge", label="low"),
    "model": Pretrained(base_model="artifact:base"),
    "sampler": CachedSampler(gen_len=15),
}


def test_a_label_that_the_texts_do_not_have() -> None:
    wrong = {**FITTING, "reward": replace(FITTING["reward"], label="happy")}
    [problem] = foresee(wrong, STEPS, prefix="artifact:")
    assert "reward.label='happy'" in problem
    assert "one of high, low" in problem
    assert foresee(FITTING, STEPS, prefix="artifact:") == []


def test_completions_that_fill_the_context() -> None:
    wrong = {**FITTING, "sampler": CachedSampler(gen_len=16)}
    [problem] = foresee(wrong, STEPS, prefix="artifact:")
    assert problem.startswith("sampler.gen_len=16 leaves no room")
    assert "prepare.base.model.context_len=16" in problem


@pytest.mark.parametrize(
    ("stage", "updates"), [(SFT(epochs=2, batch_size=16), 14), (TrainClassifier(batch_size=16), 21)]
)
def test_a_schedule_longer_than_the_texts_allow(stage: SFT | TrainClassifier, updates: int) -> None:
    def check(warmup_steps: int) -> list[str]:
        return stage.check_texts(task=ToyTask(), schedule=WarmupDecay(warmup_steps=warmup_steps))

    [problem] = check(updates)
    assert f"schedule.warmup_steps={updates} must be below the number of updates" in problem
    assert check(updates - 1) == []
    assert stage.check_texts(task=ToyTask(), schedule=Constant()) == []


@pytest.mark.parametrize("sampler", [CachedSampler(gen_len=4), BridgeSampler(gen_len=4)])
def test_a_policy_that_diverged_stops_the_run_naming_the_phase(
    sampler: Sampler, tmp_path: Path
) -> None:
    ppo = ppo_with(total_phases=3, num_minibatches=1, batches_per_learning_phase=1, eval_samples=8)
    wild = AdamWSettings(base_lr=1e30)
    with pytest.raises(TrainingError, match=r"phase [123]: the policy's logits are not finite"):
        ppo.run(context(tmp_path), **parts(sampler=sampler, optimizer=wild))


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
        PPO().run(context(tmp_path), **parts(task=NoEos(), sampler=stops))
    assert not [*tmp_path.iterdir()]
    assert torch.is_grad_enabled()


def test_the_shape_is_found_through_steps_that_train_on_one_another() -> None:
    steps = {
        **STEPS,
        "tuned": (SFT(), {"task": ToyTask(), "model": Pretrained(base_model="artifact:base")}),
    }
    parts_of = {**FITTING, "model": Pretrained(base_model="artifact:tuned")}
    assert foresee(parts_of, steps, prefix="artifact:") == []
    [problem] = foresee(
        {**parts_of, "sampler": CachedSampler(gen_len=16)}, steps, prefix="artifact:"
    )
    assert "prepare.base.model.context_len=16" in problem


def test_a_model_from_elsewhere_is_not_judged() -> None:
    steps = {"tuned": (SFT(), {"task": ToyTask(), "model": Pretrained(base_model="gpt2")})}
    for name in ("artifact:tuned", "gpt2"):
        given = {"model": Pretrained(base_model=name), "sampler": CachedSampler(gen_len=99)}
        assert foresee(given, steps, prefix="artifact:") == []
    unknown = {"reward": Classifier(name="somewhere", label="low")}
    assert foresee(unknown, STEPS, prefix="artifact:") == []
    with_long = {"model": Scratch(context_len=4), "sampler": CachedSampler(gen_len=99)}
    assert foresee(with_long, STEPS, prefix="artifact:") == []  # load_actors says it
