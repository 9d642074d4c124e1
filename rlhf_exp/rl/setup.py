"""Loads policy, reference, reward and prompts, and checks that they fit each other."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.models.fast_paths import check_hooked
from rlhf_exp.models.finetune import Finetune
from rlhf_exp.models.interventions import NO_INTERVENTION, Intervention
from rlhf_exp.models.loading import ModelSettings, build_policy
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reference import Reference, reference_hash
from rlhf_exp.rewards.protocol import (
    ReadsPrompts,
    ReadsTokens,
    Reward,
    RewardFunction,
    UsesReference,
    is_scored_by_reference,
)
from rlhf_exp.rl.eval_text import TextFile
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.sampler import Sampler, eos_token_id
from rlhf_exp.runs.context import Context, TrainingError
from rlhf_exp.settings import ConfigError, Fingerprinted
from rlhf_exp.tasks.encoding import leading_ids, tokenizer_factory
from rlhf_exp.tasks.prompts import encode_prompts, take
from rlhf_exp.tasks.protocol import AnswerTask, Prompt, ShapesPrompts, Task
from rlhf_exp.training.seeding import stream_seed
from rlhf_exp.types import Completions, PromptBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The policy, its reference, the reward if there is one, the sampler and the prompts of a run.
    `answers` is the task if it knows exact answers, `reference_hash` the hash of the reference at
    its loading, `texts` what evaluations read besides."""

    policy: TransformerWithValueHead
    reference: Reference
    reference_hash: str
    score: RewardFunction | None
    scored_by_reference: bool
    sampler: Sampler
    train_prompts: PromptBatch
    eval_prompts: PromptBatch
    answers: AnswerTask | None
    texts: Completions | None = None


def load_setup(
    context: Context,
    task: Task,
    model: ModelSettings,
    reward: Reward | None,
    sampler: Sampler,
    finetune: Finetune,
    *,
    intervention: Intervention = NO_INTERVENTION,
    value_head: bool = True,
    separate_values: bool = False,
    eval_text: TextFile | None = None,
) -> Setup:
    """The policy with its trained weights selected, its reference, the reward and the prompts, on
    the context's device. Raises ConfigError if one cannot be loaded or does not fit the others."""
    policy = load_sampled_policy(context, task, model, sampler, value_head=value_head)
    train, held_out = load_prompts(policy, task, sampler)
    texts = None if eval_text is None else eval_text.load(policy, prepend_bos=task.prepend_bos)
    first = policy.tokenizer.decode(train.tokens[0][train.mask[0]])  # with special tokens
    unseen = {*map(str, held_out.rows)} - {*map(str, train.rows)}
    log.info("%d prompts to train on, %d held out; the first: %r",
             len(train.rows), len(unseen), first)  # fmt: skip
    if separate_values:
        policy.separate_values()  # before adapters change the policy's language model
    reference = finetune.attach(policy, seed=stream_seed(context.seed, "reference"))
    score = None
    if reward is not None:
        score = load_reward(context, reward, policy, reference, task, sampler, (train, held_out))
    intervention.attach(policy)
    return Setup(
        policy=policy,
        reference=reference,
        reference_hash=reference_hash(reference, policy),
        score=score,
        scored_by_reference=is_scored_by_reference(reward),
        sampler=sampler,
        train_prompts=train,
        eval_prompts=held_out,
        answers=task if isinstance(task, AnswerTask) else None,
        texts=texts,
    )


def load_prompts(
    policy: TransformerWithValueHead, task: Task, sampler: Sampler
) -> tuple[PromptBatch, PromptBatch]:
    """The prompts to train on and those of evaluations. Raises ConfigError as `fitting_prompts`
    does."""
    train, held_out = (
        fitting_prompts(policy, task, texts, sampler)
        for texts in (task.train_prompts(), task.eval_prompts())
    )
    if isinstance(task, ShapesPrompts):
        held_out = without(held_out, train)
    return train, held_out


def fingerprints(network: PreTrainedModel, **parts: Any) -> dict[str, str]:
    """The hash of each part's files, by part (task, model ...); for a model from the hub, the
    commit. The reward is left out: the user may fix it and resume."""
    hashes = {
        name: part.fingerprint() if isinstance(part, Fingerprinted) else ""
        for name, part in parts.items()
    }
    return hashes | {"model": f"{hashes['model']} {vars(network.config).get('_commit_hash')}"}


def check_frozen(setup: Setup, expected: str) -> None:
    """Raises TrainingError if the reference's weights no longer have that hash."""
    if reference_hash(setup.reference, setup.policy) != expected:
        raise TrainingError(
            "the reference's weights changed during the run, so its KL is wrong: some code wrote"
            " to frozen weights, such as a reward that shares them"
        )


def without(prompts: PromptBatch, others: PromptBatch) -> PromptBatch:
    """The prompts whose tokens are not among the others', or all prompts if none is left. Different
    texts may be equal once cut to their first tokens."""
    excluded_ids = set(_ids(others))
    indices = [i for i, ids in enumerate(_ids(prompts)) if ids not in excluded_ids]
    if not indices:
        log.warning("every held-out prompt is trained on too: evaluations measure no new prompts")
        return prompts
    return take(prompts, torch.tensor(indices, device=prompts.tokens.device))


def _ids(prompts: PromptBatch) -> list[tuple[int, ...]]:
    starts = (~prompts.mask).sum(dim=1).tolist()
    return [tuple(row[s:]) for row, s in zip(prompts.tokens.tolist(), starts, strict=True)]


def load_sampled_policy(
    context: Context,
    task: Task,
    model: ModelSettings,
    sampler: Sampler,
    *,
    value_head: bool = False,
) -> TransformerWithValueHead:
    """A policy that the sampler can sample from. Raises ConfigError if it cannot be loaded or has
    no EOS to stop at."""
    seed = stream_seed(context.seed, "model")
    policy = build_policy(
        model, tokenizer_factory(task), device=context.device, seed=seed, value_head=value_head
    )
    eos_token_id(policy, stop_at_eos=sampler.stop_at_eos)  # raises here, not while sampling
    if isinstance(sampler, BridgeSampler) and policy.engine.is_plain:  # loading checks the other
        check_hooked(policy)
    return policy


def load_reward(
    context: Context,
    reward: Reward,
    policy: TransformerWithValueHead,
    reference: Reference,
    task: Task,
    sampler: Sampler,
    prompts: Sequence[PromptBatch],
) -> RewardFunction:
    """The reward's function. `reference` scores the completions if the reward names no other model.
    Raises ConfigError if it cannot be loaded or cannot read the prompts
    or the policy's completions."""
    for batch in prompts:
        if isinstance(reward, ReadsPrompts):
            reward.check_prompts(batch.texts)
        if isinstance(reward, ReadsTokens):
            reward.check_policy(
                policy.tokenizer,
                prepend_bos=bool(leading_ids(policy.tokenizer, prepend_bos=task.prepend_bos)),
                num_tokens=batch.tokens.shape[1] + sampler.gen_len,
            )
    with contextlib.chdir("."):  # the reward may change the working folder
        if isinstance(reward, UsesReference) and is_scored_by_reference(reward):
            return reward.load_with_reference(policy, reference)
        return reward.load(context.device)


def _why_so_short(policy: TransformerWithValueHead) -> str:
    config = policy.language_model.config
    if policy.context_len == config.max_position_embeddings:
        return ""
    return (
        f" (Its max_position_embeddings of {config.max_position_embeddings} cannot be used: in"
        " longer sequences its rotary embedding changes at all positions.)"
    )


def fitting_prompts(
    policy: TransformerWithValueHead, task: Task, prompts: Sequence[Prompt], sampler: Sampler
) -> PromptBatch:
    """The prompts as tokens of the policy. Raises ConfigError if one leaves no room for a
    completion."""
    shaping = task if isinstance(task, ShapesPrompts) else None
    batch = encode_prompts(
        policy.tokenizer,
        prompts,
        prepend_bos=task.prepend_bos,
        device=policy.device,
        shaping=shaping,
    )
    longest = batch.tokens.shape[1]
    room = max(0, policy.context_len - longest)
    if sampler.gen_len > room:
        text = batch.texts[int(batch.mask.sum(dim=1).argmax())]
        shorter = (
            f"leave such prompts out with task.max_tokens={policy.context_len - sampler.gen_len}"
            if shaping is not None and sampler.gen_len < policy.context_len
            else "use shorter prompts"
        )
        raise ConfigError(
            f"a prompt of {longest} tokens and sampler.gen_len={sampler.gen_len} exceed the"
            f" model's context of {policy.context_len} tokens; set sampler.gen_len to at most"
            f" {room} or {shorter}.{_why_so_short(policy)} The prompt begins {text[:80]!r}"
        )
    return batch
