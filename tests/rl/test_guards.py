"""What guards a run of PPO: steps that are not finite, memory that runs out, and a reference that
must not change."""

import math
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import reference_hash
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rl.guards import check_finite
from rlhf_exp.rl.setup import check_frozen
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.checkpoint import read_newest_checkpoint
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import ConfigError, settings
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.sweeps.isolation import call_in_process
from rlhf_exp.types import Completions

from .toy import RAGGED, context, parts, phase, ppo_with, rows, start

SMALL = ppo_with(
    total_phases=2, batch_size=8, num_minibatches=2, eval_samples=6, checkpoint_every=1
)
KINDS = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(rank=4, alpha=8),
}


def allocate_when(learning: bool, policy: TransformerWithValueHead) -> None:
    """Has the policy's passes ask for a petabyte: those with gradients, or those without."""

    def allocate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() == learning:
            torch.empty(2**50)

    policy.language_model.base_model.register_forward_pre_hook(allocate)


@pytest.mark.parametrize(
    ("learning", "first", "knobs"),
    [
        (
            False,
            "phase 1: sampling: out of memory",
            "lower stage.compute.rollout_batch_size (now 8)",
        ),
        (True, "phase 1: learning: out of memory", "set stage.compute.micro_batch_size below 4"),
    ],
)
def test_memory_that_runs_out_is_told_with_the_knob(
    tmp_path: Path, learning: bool, first: str, knobs: str
) -> None:
    setup, state = start(SMALL, tmp_path)
    allocate_when(learning, setup.policy)
    with pytest.raises(TrainingError) as raised:
        phase(SMALL, setup, state)
    said = str(raised.value).splitlines()
    assert said[0] == first
    assert "can't allocate memory" in said[1]
    assert knobs in said[2]
    assert len(said) == 3


def test_knobs_that_are_turned_already_are_not_named(tmp_path: Path) -> None:
    def knobs(ppo: PPO, kind: str) -> str:
        setup, _ = start(ppo, tmp_path, finetune=KINDS[kind])
        return " ".join(ppo.compute.less_memory(setup, minibatch=ppo.minibatch_size))

    plain = knobs(SMALL, "full")
    for word in ("micro_batch_size", "gradient_checkpointing", "finetune=lora", "gen_len"):
        assert word in plain
    turned = ppo_with(batch_size=8, micro_batch_size=1, gradient_checkpointing=True)
    assert knobs(turned, "lora") == "lower sampler.gen_len"


@settings
class Greedy:
    """A reward that wants more memory than there is, from its second call on."""

    def load(self, device: torch.device) -> RewardFunction:
        calls = iter(range(100))

        def score(completions: Completions) -> Tensor:
            return torch.zeros(2**50 if next(calls) else len(completions.texts))

        return score


def test_memory_of_a_reward_is_no_fault_to_skip(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=2, batch_size=8, eval_samples=6, on_reward_error="skip")
    message = r"^phase 1: scoring: out of memory\n.*\nto need less: lower reward\.batch_size"
    with pytest.raises(TrainingError, match=message):
        ppo.run(context(tmp_path), parts(reward=Greedy()))


def run_out_of_memory(path: Path) -> None:
    """Prints how a run ends that may take 96 MiB more than the process has."""
    torch.set_num_threads(1)
    given = parts(
        model=Scratch(num_layers=1, d_model=64, num_heads=2, context_len=512),
        sampler=CachedSampler(gen_len=200),
    )
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20),) * 2)
    ppo = ppo_with(batch_size=1024, num_minibatches=1, eval_samples=4, reward_timeout_s=None)
    with pytest.raises(TrainingError) as caught:
        ppo.run(context(path), given)
    print(caught.value)


def test_a_process_without_memory_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert call_in_process(run_out_of_memory, tmp_path / "run", log=log) == 0, log.read_text()
    first, why, knobs = log.read_text().strip().splitlines()[-3:]
    assert first.startswith("phase 1: ")
    assert first.endswith(": out of memory")
    assert "allocate" in why
    assert knobs.startswith("to need less: ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_names_its_reference_and_a_resumed_one_has_the_same(
    tmp_path: Path, kind: str
) -> None:
    given = parts(task=RAGGED, finetune=KINDS[kind])
    result = SMALL.run(context(tmp_path), given)
    assert len(result.extra["reference_sha256"]) == 64
    newest = read_newest_checkpoint(tmp_path)
    assert newest is not None
    saved = newest.numbers["state"]["loop"]
    assert saved["inputs"]["finetune"] == result.extra["reference_sha256"]
    resumed = SMALL.run(context(tmp_path, resume=True), given)
    assert resumed.extra["reference_sha256"] == result.extra["reference_sha256"]


def test_a_run_does_not_go_on_with_another_reference(tmp_path: Path) -> None:
    setup, state = start(SMALL, tmp_path, task=RAGGED)
    state.inputs = {"finetune": setup.reference_hash}
    saved = state.state_dict()
    _, other = start(SMALL, tmp_path, task=RAGGED)
    other.inputs = {"finetune": "of others"}
    with pytest.raises(ConfigError, match=r"^finetune: the files that it names have changed"):
        other.load_state_dict(saved)


@settings
class Meddling:
    """A reference that a run moves by a bit: its last layer norm is trained after all."""

    def check(self, model: object) -> list[str]:
        return []

    def select(self, language_model: object) -> None:
        pass

    def attach(self, policy: TransformerWithValueHead, *, seed: int) -> object:
        reference = policy.frozen_reference()
        theirs = dict(reference.language_model.named_modules())["transformer.ln_f"]
        theirs.weight = dict(policy.language_model.named_modules())["transformer.ln_f"].weight
        return reference


def test_a_reference_that_has_changed_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^the reference's weights changed during the run"):
        SMALL.run(context(tmp_path), parts(finetune=Meddling()))
    assert not (tmp_path / "model").exists()
    assert len(rows(tmp_path)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_learning_leaves_every_reference_alone(tmp_path: Path, kind: str) -> None:
    ppo = ppo_with(batch_size=8, dtype="bf16")
    setup, state = start(ppo, tmp_path, finetune=KINDS[kind])
    ppo.compute.prepare(setup)
    before = reference_hash(setup.reference, setup.policy)
    phase(ppo, setup, state)
    check_frozen(setup, before)


def steps_with(total: float) -> list[dict[str, float]]:
    fine = {"loss/total": 0.5, "loss/kl": 2.0, "policy/clipfrac": 0.1}
    return [fine, {"loss/total": total, "loss/kl": 0.1234567, "policy/clipfrac": 0.9}, fine]


@pytest.mark.parametrize("total", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_terms(total):
    message = (
        rf"^phase 7, step 2: the loss is not finite \(loss/total {total:g}, loss/kl 0.123457\);"
        r" lower optimizer.base_lr and optimizer.head_lr, raise stage.kl_coef, or skip such steps"
        r" with stage.guards.on_nonfinite=skip$"
    )
    with pytest.raises(TrainingError, match=message):
        check_finite(steps_with(total), 7)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_it_too(norm):
    step = {"loss/total": 0.5, "grad_norm/base": norm, "grad_norm/head": 1.0}
    message = (
        rf"^phase 7, step 1: the gradient is not finite \(loss/total 0.5, grad_norm/base {norm:g},"
        r" grad_norm/head 1\);"
    )
    with pytest.raises(TrainingError, match=message):
        check_finite([step], 7)


def test_a_finite_loss_goes_on_whatever_its_terms_are():
    check_finite(steps_with(-1e30), 7)
    check_finite([{"loss/total": 1.0, "policy/approxkl": math.nan}], 7)
    check_finite([], 7)
