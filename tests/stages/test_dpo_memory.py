"""Micro-batches and recomputed activations change the memory of DPO, and nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rlhf_exp.models.finetune import Full, Lora
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import Reference
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.stages.dpo import DPO
from rlhf_exp.stages.pair_logprobs import ReferencedPairs
from rlhf_exp.tasks.pair_tokens import encode_pairs
from rlhf_exp.training.supervised import add_gradients
from rlhf_exp.types import LossOutput

from ..builders import assert_near
from ..rl.toy import LowWords, ToyPairs, context, parts_of, rows, saved_model

INDEX = [7, 0, 3, 9, 1, 8, 2]  # answers of one to five tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return saved_model(tmp_path_factory.mktemp("base"))


def policy_and_pairs(
    model: Pretrained, finetune: Full | Lora
) -> tuple[TransformerWithValueHead, ReferencedPairs]:
    """A policy away from its reference."""
    network, tokenizer = model.language_model(None, seed=0)
    policy = TransformerWithValueHead(network, tokenizer, value_head=False)
    reference: Reference = finetune.attach(policy, seed=0)
    pairs = ToyPairs().pair_split().train[:12]
    encoded = encode_pairs(tokenizer, pairs, ["?"] * 12, prepend_bos=True, limit=16)
    data = ReferencedPairs(
        encoded, reference, batch_size=5, dtype="fp32", device=torch.device("cpu")
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    return policy, data


def gradients(
    stage: DPO, policy: TransformerWithValueHead, data: ReferencedPairs
) -> tuple[LossOutput, dict[str, Tensor]]:
    policy.zero_grad()
    output = add_gradients(stage.loss_parts(policy, data, INDEX))
    trained = [(n, p.grad) for n, p in policy.named_parameters() if p.requires_grad]
    return output, {name: grad.clone() for name, grad in trained if grad is not None}


@pytest.mark.parametrize("finetune", [Full(), Lora(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_parts_of_a_batch_have_its_loss_and_gradients(
    size: int, loss: str, finetune: Full | Lora, model: Pretrained
) -> None:
    policy, data = policy_and_pairs(model, finetune)
    options: dict[str, Any] = {"loss": loss, "sft_coef": 0.7, "batch_size": 8}
    whole, expected = gradients(DPO(**options), policy, data)
    stage = DPO(**options, micro_batch_size=size)
    output, seen = gradients(stage, policy, data)
    assert len([*stage.loss_parts(policy, data, INDEX)]) == -(-7 // size)
    assert_near(output.loss, whole.loss)
    assert output.metrics.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        assert_near(output.metrics[name], value)
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(seen[name], gradient)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2


@contextmanager
def before_each_mlp(call: Callable[[int], None]) -> Iterator[None]:
    """Calls with the rows that a block's MLP reads, in passes with gradients."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__.endswith("MLP") and torch.is_grad_enabled():
            call(len(args[0]))

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def train(path: Path, model: Pretrained, **options: Any) -> list[dict[str, float]]:
    """The metrics of the updates; there are four, of ten pairs each but for the last."""
    stage = DPO(**{"batch_size": 10, "log_every": 1, "eval_samples": 4, "sft_coef": 0.2, **options})
    sampler = CachedSampler(gen_len=4, stop_at_eos=True)
    parts = {"task": ToyPairs(count=60), "model": model, "reward": LowWords(), "sampler": sampler}
    stage.run(context(path), parts_of(stage, **parts))
    return [row for row in rows(path) if "train/loss" in row]


# With two blocks, the rows of both answers of the pairs of an update: of a batch at once, of three
# pairs at a time, and each block again in the backward pass.
WAYS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "whole": ({}, [20] * 2),
    "micro-batches": ({"micro_batch_size": 3}, [6] * 6 + [2] * 2),
    "checkpointing": ({"gradient_checkpointing": True}, [20] * 4),
}


@pytest.mark.parametrize("resample_every", [None, 2], ids=["offline", "online"])
def test_a_run_with_less_memory_learns_the_same(
    resample_every: int | None, tmp_path: Path, model: Pretrained
) -> None:
    metrics = {}
    for name, (options, expected_calls) in WAYS.items():
        calls: list[int] = []
        with before_each_mlp(calls.append):
            metrics[name] = train(tmp_path / name, model, resample_every=resample_every, **options)
        if resample_every:  # else a smaller batch is somewhere
            # The only prompt may be run by itself, as one row.
            assert [num_rows for num_rows in calls if num_rows > 1] == expected_calls * 4
    for one in metrics.values():
        assert len(one) == 4
        for row, expected in zip(one, metrics["whole"], strict=True):
            # At the reference, rounding decides which answer has the higher reward.
            del row["rewards/accuracies"]
            assert row == pytest.approx({name: expected[name] for name in row}, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "knobs"),
    [
        ({}, "set stage.micro_batch_size below 10; set stage.gradient_checkpointing=true; lower"),
        ({"micro_batch_size": 4}, "set stage.micro_batch_size below 4; set stage.gradient_check"),
        ({"micro_batch_size": 1, "gradient_checkpointing": True}, "lower stage.batch_size (now 10"),
    ],
)
def test_memory_that_runs_out_is_told_with_the_knobs(
    options: dict[str, Any], knobs: str, tmp_path: Path, model: Pretrained
) -> None:
    with before_each_mlp(lambda rows: torch.empty(2**50)), pytest.raises(TrainingError) as raised:
        train(tmp_path, model, **options)
    first, _, last = str(raised.value).splitlines()
    assert first == "update 1: learning: out of memory"
    assert last.startswith(f"to need less: {knobs}")


def test_a_micro_batch_is_no_larger_than_a_batch() -> None:
    assert DPO(batch_size=8, micro_batch_size=8).micro_batch_size == 8
    message = "micro_batch_size=9 is above batch_size=8: lower it, or set it null"
    with pytest.raises(ValidationError, match=message):
        DPO(batch_size=8, micro_batch_size=9)
