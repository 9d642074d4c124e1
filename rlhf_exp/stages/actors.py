"""What samples and what scores, loaded and checked against each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_exp.models.loading import ModelSettings, build_policy
from rlhf_exp.models.policy import CausalTransformer, TransformerWithValueHead
from rlhf_exp.rewards.protocol import ReadsPrompts, ReadsTokens, Reward, RewardFunction
from rlhf_exp.rollout.sampler import Sampler, eos_token
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.encoding import tokenizer_factory
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.tasks.protocol import AnswerTask, Task
from rlhf_exp.training.context import Context
from rlhf_exp.training.seeding import stream_seed
from rlhf_exp.types import PromptBatch


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Everything that a phase runs on and that no optimizer step replaces. `answers` is the task
    if it knows exact answers."""

    policy: TransformerWithValueHead
    reference: CausalTransformer
    score: RewardFunction
    sampler: Sampler
    train_prompts: PromptBatch
    eval_prompts: PromptBatch
    answers: AnswerTask | None


def load_actors(
    context: Context, task: Task, model: ModelSettings, reward: Reward, sampler: Sampler
) -> Actors:
    """The policy and its frozen copy, the reward and the prompts, on the context's device. Raises
    ConfigError for what cannot be loaded or does not fit."""
    policy = load_sampled_policy(context, task, model, sampler)
    prompts = [
        fitting_prompts(policy, task, texts, sampler)
        for texts in (task.train_prompts(), task.eval_prompts())
    ]
    return Actors(
        policy=policy,
        reference=policy.frozen_reference(),
        score=load_reward(context, reward, policy, task, sampler, prompts),
        sampler=sampler,
        train_prompts=prompts[0],
        eval_prompts=prompts[1],
        answers=task if isinstance(task, AnswerTask) else None,
    )


def load_sampled_policy(
    context: Context, task: Task, model: ModelSettings, sampler: Sampler
) -> TransformerWithValueHead:
    """A policy that the sampler can sample from. Raises ConfigError if it cannot be loaded or has
    no EOS to stop at."""
    seed = stream_seed(context.seed, "model")
    policy = build_policy(model, tokenizer_factory(task), device=context.device, seed=seed)
    eos_token(policy, stop_at_eos=sampler.stop_at_eos)  # raises here rather than while sampling
    return policy


def load_reward(
    context: Context,
    reward: Reward,
    policy: TransformerWithValueHead,
    task: Task,
    sampler: Sampler,
    prompts: Sequence[PromptBatch],
) -> RewardFunction:
    """The reward's function. Raises ConfigError if it cannot be loaded or cannot read the prompts
    or what the policy writes after them."""
    for batch in prompts:
        if isinstance(reward, ReadsPrompts):
            reward.check_prompts(batch.texts)
        if isinstance(reward, ReadsTokens):
            reward.check_policy(
                policy.tokenizer,
                prepend_bos=task.prepend_bos,
                num_tokens=batch.tokens.shape[1] + sampler.gen_len,
            )
    return reward.load(context.device)


def fitting_prompts(
    policy: TransformerWithValueHead, task: Task, texts: Sequence[str], sampler: Sampler
) -> PromptBatch:
    """The texts as prompts of the policy. Raises ConfigError if one leaves no room for a
    completion."""
    prompts = encode_prompts(
        policy.tokenizer, texts, prepend_bos=task.prepend_bos, device=policy.device
    )
    longest = prompts.tokens.shape[1]
    if longest + sampler.gen_len > policy.context_len:
        raise ConfigError(
            f"a prompt of {longest} tokens and sampler.gen_len={sampler.gen_len} exceed the"
            f" model's context of {policy.context_len} tokens; set sampler.gen_len to at most"
            f" {max(0, policy.context_len - longest)} or use shorter prompts"
        )
    return prompts
