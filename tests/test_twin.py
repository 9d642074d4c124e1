"""The package computes what tests/twin.py writes down: the same tokens, losses and weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_exp.models.finetune import Full
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.saving import save_policy
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import WarmupDecay
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.types import Completions

from . import twin
from .builders import tiny_policy
from .rl.toy import ToyTask, context, parts, ppo_with, rows

SEED, EOS, NEVER = 1, 2, -1
EQUAL = ("zero one", "two three", "four five", "six seven", "eight nine", "one zero")
RAGGED = ("zero", "one two three", "four five", "six seven eight nine", "no .", "two two")
# Two phases of warm-up, one at the full rates and one of decay.
SETTINGS = twin.Settings(
    total_phases=4, batch_size=8, num_minibatches=2, batches_per_learning_phase=2, gen_len=6,
    eos=NEVER, gamma=0.97, gae_lambda=0.9, clip_coef=0.02, vf_coef=0.3, ent_coef=0.1, kl_coef=0.5,
    kl_penalty="loss", base_lr=5e-4, head_lr=2e-3, warmup_steps=2, final_scale=0.1,
    max_grad_norm=1.0,
)  # fmt: skip


def share_of_even(tokens: Tensor, real: Tensor) -> Tensor:
    """The share of each completion's tokens that have an even id."""
    return ((tokens % 2 == 0) & real).sum(1) / real.sum(1)


def always_half(tokens: Tensor, real: Tensor) -> Tensor:
    return torch.full((len(tokens),), 0.5)


@dataclass
class RecordingReward:
    """A reward that scores completions by a function and records their tokens."""

    score: Callable[[Tensor, Tensor], Tensor]
    tokens: list[Tensor] = field(default_factory=list)

    def __call__(self, tokens: Tensor, real: Tensor) -> Tensor:
        self.tokens.append(tokens)
        return self.score(tokens, real)

    def load(self, device: torch.device) -> Callable[[Completions], Tensor]:
        return lambda completions: self(completions.tokens, completions.mask)


@dataclass(frozen=True)
class Run:
    """The metrics of each phase, and the weights at the end."""

    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]


def run_package(
    start: Path, prompts: tuple[str, ...], reward: RecordingReward, s: twin.Settings, folder: Path
) -> Run:
    """The package's PPO on a saved policy: the only code here that calls its interface."""
    ppo = ppo_with(
        total_phases=s.total_phases, batch_size=s.batch_size, num_minibatches=s.num_minibatches,
        batches_per_learning_phase=s.batches_per_learning_phase, gamma=s.gamma,
        gae_lambda=s.gae_lambda, clip_coef=s.clip_coef, vf_coef=s.vf_coef, ent_coef=s.ent_coef,
        kl_coef=s.kl_coef, kl_penalty=s.kl_penalty, max_grad_norm=s.max_grad_norm, dtype="fp32",
        eval_every=s.total_phases, eval_samples=1, checkpoint_every=None,
    )  # fmt: skip
    taken = parts(
        task=ToyTask(prompts=prompts),
        model=Pretrained(base_model=str(start)),
        finetune=Full(),
        reward=reward,
        sampler=CachedSampler(gen_len=s.gen_len, stop_at_eos=s.eos == EOS),
        optimizer=AdamWSettings(base_lr=s.base_lr, head_lr=s.head_lr),
        schedule=WarmupDecay(warmup_steps=s.warmup_steps, final_scale=s.final_scale),
    )
    ppo.run(context(folder, SEED), taken)
    del reward.tokens[0], reward.tokens[-1]  # of the evaluations before and after
    metrics = [row for row in rows(folder) if "objective/scores" in row]
    return Run(metrics, weights(load(folder / "model")))


def run_twin(
    start: Path, prompts: tuple[str, ...], reward: RecordingReward, settings: twin.Settings
) -> Run:
    """The twin on the same policy, with the package's streams of random numbers."""
    policy = load(start)
    tokenizer = AutoTokenizer.from_pretrained(start)
    texts = [f"<bos> {prompt}" for prompt in prompts]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    metrics = twin.train(
        policy, encoded["input_ids"], encoded["attention_mask"].bool(), reward, settings,
        prompt_rng=make_generator(SEED, "prompts"), sample_rng=make_generator(SEED, "samples"),
        minibatch_rng=make_generator(SEED, "minibatches"),
    )  # fmt: skip
    return Run(list(metrics), weights(policy))


def load(folder: Path) -> twin.Policy:
    """A saved policy, read by transformers and safetensors alone."""
    language_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    width = language_model.config.hidden_size
    value_head = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 1))
    value_head.load_state_dict(load_file(folder / "value_head.safetensors"))
    return twin.Policy(language_model, value_head)


def weights(policy: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in policy.named_parameters()}


def assert_twins(
    tmp_path: Path,
    *,
    architecture: str,
    padded: bool,
    settings: twin.Settings,
    score: Callable[[Tensor, Tensor], Tensor] = share_of_even,
) -> Run:
    """Runs both and checks that they are equal; returns the twin's run."""
    start = save_policy(tiny_policy(architecture), tmp_path / "start")
    prompts = RAGGED if padded else EQUAL
    settings = settings._replace(eos=EOS if padded else NEVER)
    rewards = RecordingReward(score), RecordingReward(score)
    package = run_package(start, prompts, rewards[0], settings, tmp_path / "run")
    expected = run_twin(start, prompts, rewards[1], settings)
    torch.testing.assert_close(rewards[0].tokens, rewards[1].tokens, rtol=0, atol=0)
    for row, expected_row in zip(package.metrics, expected.metrics, strict=True):
        assert {name: row[name] for name in expected_row} == pytest.approx(expected_row, abs=1e-5)
    torch.testing.assert_close(package.weights, expected.weights, rtol=0, atol=1e-5)
    return expected


@pytest.mark.parametrize("kl_penalty", ["loss", "reward"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_package_samples_and_learns_as_its_twin(
    tmp_path: Path, architecture: str, padded: bool, kl_penalty: str
) -> None:
    settings = SETTINGS._replace(kl_penalty=kl_penalty)
    assert_twins(tmp_path, architecture=architecture, padded=padded, settings=settings)


def test_both_take_equal_scores_for_no_signal(tmp_path: Path) -> None:
    run = assert_twins(
        tmp_path, architecture="gpt2", padded=True, settings=SETTINGS, score=always_half
    )
    assert run.metrics[0]["loss/policy"] == 0


def test_the_twin_is_short_and_stands_alone() -> None:
    source = Path(twin.__file__).read_text()
    assert len(source.splitlines()) <= 150
    assert "rlhf_exp" not in source
