"""Completions beside the exact answers of a task that knows them: strict exact match and the true
reward, sampled or greedy."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.tasks.prompts import take
from rlhf_exp.tasks.protocol import AnswerTask
from rlhf_exp.types import Completions, PromptBatch

ROWS = 128


class Judgement(NamedTuple):
    """The score of each completion."""

    exact: Bool[Tensor, " batch"]
    true_rewards: Float[Tensor, " batch"]


def judge_answers(
    task: AnswerTask, tokenizer: PreTrainedTokenizerBase, completions: Completions
) -> Judgement:
    """The judgement of each completion against the exact answer to its prompt."""
    prompts, texts = completions.prompts.texts, completions.texts
    rewards = [task.true_reward(p, t) for p, t in zip(prompts, texts, strict=True)]
    return Judgement(
        exact=exact_matches(completions, [task.answer(p) for p in prompts], tokenizer),
        true_rewards=torch.tensor(rewards, dtype=torch.float32),
    )


def exact_matches(
    completions: Completions, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Bool[Tensor, " batch"]:
    """True for each completion that is exactly the answer's tokens followed by EOS."""
    answer_ids = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    lengths = completions.mask.sum(dim=1).tolist()
    rows = completions.tokens.cpu().tolist()
    completion_ids = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    return torch.tensor(
        [a == [*b, tokenizer.eos_token_id] for a, b in zip(completion_ids, answer_ids, strict=True)]
    )


def exact_match(
    policy: TransformerWithValueHead,
    task: AnswerTask,
    prompts: PromptBatch,
    sampler: Sampler,
    generator: torch.Generator,
) -> float:
    """The fraction of the prompts whose completion by the sampler is exact."""
    matches = []
    for rows in torch.arange(len(prompts.rows), device=policy.device).split(ROWS):
        completions = sampler(policy, take(prompts, rows), generator).completions
        answers = [task.answer(prompt) for prompt in completions.prompts.texts]
        matches.append(exact_matches(completions, answers, policy.tokenizer))
    return torch.cat(matches).float().mean().item()
