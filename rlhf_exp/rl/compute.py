"""How policy and reference compute: precision, compilation, batch sizes."""

from collections.abc import Iterator
from typing import Literal

import torch

from rlhf_exp.machine.precision import Dtype, compute_dtype
from rlhf_exp.models.engines import ENGINES
from rlhf_exp.models.loading import ModelSettings, Pretrained
from rlhf_exp.models.reference import compute_reference_in
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.rewards.protocol import Reward, is_scored_by_reference
from rlhf_exp.rl.guards import Guards
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.settings import Count, settings


@settings
class Compute:
    """Settings of speed and memory. Only async_reward changes the training data."""

    dtype: Dtype = "auto"
    """Dtype of passes: bf16, fp32; auto: bf16 if the device has instructions for it (CPU: if
    d_model >= 192); weights, logits, losses stay fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compiles the passes of learning; auto: on CUDA, if all prompts have the same length and
    gradient_checkpointing is false."""
    rollout_batch_size: Count | None = None
    """Completions sampled and measured at a time; less memory, other random draws; null:
    batch_size."""
    micro_batch_size: Count | None = None
    """Completions a forward and backward pass; less memory, the same result; null: a minibatch."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass; less memory, slower."""
    async_reward: bool = False
    """Samples the next batch while this one is scored, from a policy one update old."""

    def problems(self, model: ModelSettings, sampler: Sampler, reward: Reward) -> list[str]:
        """Conflicts between these settings, the model's, the sampler's and the reward's."""
        problems = []
        wants_plain = {
            "gradient_checkpointing": self.gradient_checkpointing,
            "dtype=bf16": self.dtype == "bf16",
            "compile=on": self.compile == "on",
        }
        if not ENGINES[model.engine].is_plain:
            problems += [
                f"stage.compute.{setting} needs model.engine=fast"
                for setting, is_set in wants_plain.items()
                if is_set
            ]
        if self.dtype == "bf16" and isinstance(sampler, BridgeSampler):
            problems.append(
                "stage.compute.dtype=bf16 needs sampler=cached; sampler=bridge is in fp32"
            )
        if self.dtype == "bf16" and isinstance(model, Pretrained) and model.dtype == "fp16":
            problems.append("stage.compute.dtype=bf16 and model.dtype=fp16 exclude each other")
        if self.compile == "on" and self.gradient_checkpointing:
            problems.append(
                "stage.compute.compile=on and stage.compute.gradient_checkpointing exclude each"
                " other"
            )
        if self.async_reward and is_scored_by_reference(reward):
            problems.append(
                "stage.compute.async_reward=true: with reward.name=policy the reference scores"
                " while the policy samples with the same modules; set it false, or name another"
                " model"
            )
        return problems

    def scores_on_thread(self, setup: Setup, guards: Guards) -> bool:
        """Returns True if the reward runs on a thread of its own. That pays where reward and
        reference compute on different devices; without a timeout the reward runs on the main
        thread, so nothing overlaps. Never with the reference as the reward."""
        overlaps = setup.policy.device.type == "cuda" and guards.reward_timeout_s is not None
        return self.async_reward or (overlaps and not setup.scored_by_reference)

    def too_large(self, *, batch: int, minibatch: int) -> Iterator[str]:
        """Yields a message for each size above that of a batch or a minibatch (batch_size /
        num_minibatches)."""
        above = "compute.{}={} is above {}: lower it, or set it null"
        if (size := self.rollout_batch_size or 0) > batch:
            yield above.format("rollout_batch_size", size, f"batch_size={batch}")
        if (size := self.micro_batch_size or 0) > minibatch:
            whole = f"the minibatch of {minibatch} (batch_size / num_minibatches)"
            yield above.format("micro_batch_size", size, whole)

    def less_memory(self, setup: Setup, *, minibatch: int) -> list[str]:
        """Settings that reduce the memory of learning, as advice."""
        size, knobs = self.micro_batch_size or minibatch, []
        if size > 1:
            knobs.append(f"set stage.compute.micro_batch_size below {size}")
        if setup.policy.engine.is_plain and not self.gradient_checkpointing:
            knobs.append("set stage.compute.gradient_checkpointing=true")
        if isinstance(setup.reference, CausalTransformer):
            knobs.append("train less, with finetune=last_layers or finetune=lora")
        return [*knobs, "lower sampler.gen_len"]

    def prepare(self, setup: Setup) -> None:
        """Applies dtype, checkpointing and compilation to the policy and its reference."""
        policy = setup.policy
        dtype, base = torch.float32, policy.language_model.dtype
        fast = policy.engine.is_plain
        # TransformerLens samples in fp32, and fp16 weights do not mix with bf16.
        if fast and base != torch.float16 and not isinstance(setup.sampler, BridgeSampler):
            width = policy.head.weight.shape[1]
            dtype = compute_dtype(self.dtype, policy.device, width=width)
        policy.compute_in(dtype)
        compute_reference_in(setup.reference, policy, dtype)
        if self.gradient_checkpointing:
            policy.checkpoint_gradients()
        if self.compile == "on" or (
            self.compile == "auto"
            and fast
            and policy.device.type == "cuda"
            and not self.gradient_checkpointing
            and bool(setup.train_prompts.mask.all())  # else each width is compiled
        ):
            policy.compile_passes()


def warm_up(setup: Setup, *, rows: int) -> None:
    """Compiles the code of learning for passes of `rows` completions, before any phase is timed.
    Does nothing for a policy that is not compiled."""
    policy, width = setup.policy, setup.train_prompts.tokens.shape[1]
    if not policy.is_compiled:
        return
    shape = (rows, width + setup.sampler.gen_len - 1)
    tokens = torch.zeros(shape, dtype=torch.long, device=policy.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    padded = not bool(setup.train_prompts.mask.all())
    with policy.working():
        states = policy.hidden_states(tokens, mask if padded else None, prompt_len=width)
        states.sum().backward()
    policy.zero_grad(set_to_none=True)
