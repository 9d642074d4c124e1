"""The limit of score against KL: the least KL that a policy's score must cost, from scored samples
of the reference."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_exp.functional.optimal_frontier import frontier, optimal_kl
from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rl.collect import sample
from rlhf_exp.rl.evaluation import evaluation_order
from rlhf_exp.rl.exact_answers import judge_answers
from rlhf_exp.rl.setup import Setup
from rlhf_exp.runs.limit_file import LimitFile, read_limit_file, write_limit_file
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.prompts import take
from rlhf_exp.training.seeding import make_generator

log = logging.getLogger(__name__)

METRICS = ("eval/kl_optimal", "eval/kl_efficiency")
ROWS = 256  # completions sampled at once
MIN_KL = 0.01  # nats a completion, below which an efficiency is noise


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Scores of the reference's completions, and their true rewards if the task knows them."""

    scores: Float[Tensor, "prompt completion"]
    true_rewards: Float[Tensor, "prompt completion"] | None

    def metrics(self, evaluation: Mapping[str, float]) -> dict[str, float]:
        """eval/kl_optimal, the least KL of whole completions at the evaluation's score, and
        eval/kl_efficiency, its share of the evaluation's KL; each only if it is known."""
        least, kl = optimal_kl(self.scores, evaluation["eval/score"]), evaluation["eval/kl_sum"]
        if least is None:
            return {}
        values = (least, least / kl if kl >= MIN_KL else math.nan)
        named = zip(METRICS, values, strict=True)
        return {name: value for name, value in named if not math.isnan(value)}


def measure_limit(
    setup: Setup, reward: CheckedReward, *, num_prompts: int, samples: int, seed: int
) -> Limit:
    """Samples and scores `samples` completions of each of the prompts that an evaluation of
    `num_prompts` samples takes. The policy must still equal the reference. Raises as `evaluate`
    does."""
    policy = setup.policy
    order = evaluation_order(setup.eval_prompts, seed)[:num_prompts].to(policy.device)
    generator = make_generator(seed, "limit", policy.device)
    full = setup.sampler.full_distribution
    scores, true_rewards = [], []
    for index in order.split(max(1, ROWS // samples)):
        prompts = take(setup.eval_prompts, index).repeated(samples)
        generation = sample(full, policy, prompts, generator, phase=0, rows=ROWS)
        scores.append(reward(generation.completions, phase=0).view(-1, samples).cpu())
        if setup.answers is not None:
            judged = judge_answers(setup.answers, policy.tokenizer, generation.completions)
            true_rewards.append(judged.true_rewards.view(-1, samples))
    return Limit(
        scores=torch.cat(scores), true_rewards=torch.cat(true_rewards) if true_rewards else None
    )


def write_limit(limit: Limit, folder: Path) -> None:
    """Writes the scores and their frontier to limit.json."""
    true_rewards = limit.true_rewards
    file = LimitFile(
        scores=limit.scores.tolist(),
        true_rewards=None if true_rewards is None else true_rewards.tolist(),
        frontier=frontier(limit.scores),
        true_frontier=[] if true_rewards is None else frontier(true_rewards),
    )
    write_limit_file(folder, file)


def read_limit(folder: Path) -> Limit | None:
    """The limit in limit.json; None if there is none, and with a warning if it cannot be read."""
    try:
        file = read_limit_file(folder)
    except ConfigError as error:
        log.warning("%s: the limit is left out", error)
        return None
    if file is None:
        return None
    true_rewards = None if file.true_rewards is None else torch.tensor(file.true_rewards)
    return Limit(scores=torch.tensor(file.scores), true_rewards=true_rewards)
