"""Evaluation of a policy: fresh samples at temperature 1 from the full distribution."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from rlhf_exp.functional.masking import masked_mean
from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rewards.protocol import Reward
from rlhf_exp.rewards.weighted_sum import WeightedSum
from rlhf_exp.rl.collect import sample
from rlhf_exp.rl.eval_text import text_metrics
from rlhf_exp.rl.exact_answers import exact_match, judge_answers
from rlhf_exp.rl.metrics import distinct_n
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rollout.measure import measure
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.runs.paths import CURVES
from rlhf_exp.runs.summary import describe
from rlhf_exp.tasks.prompts import take
from rlhf_exp.tasks.protocol import AnswerTask, Task
from rlhf_exp.tracking.curves import plot_ppo, print_before_after
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.types import Completions, PromptBatch, Rollout

log = logging.getLogger(__name__)

ROWS, TABLE_ROWS = 64, 6
SAID_S = 10  # a longer evaluation logs a line
SCORE, GAP = "eval/score", "eval/reward_gap"  # only with a reward
METRICS = (SCORE, "eval/kl", "eval/kl_sum", "eval/entropy", "eval/distinct_3",
           "eval/len_mean")  # fmt: skip
# Also for a task that knows exact answers.
ANSWER_METRICS = ("eval/true_reward", GAP, "eval/exact_match",
                  "eval/greedy_exact_match")  # fmt: skip


def metric_names(task: Task, reward: Reward | None) -> tuple[str, ...]:
    """The names of an evaluation's metrics."""
    terms = reward.terms if isinstance(reward, WeightedSum) else ()
    of_answers = ANSWER_METRICS if isinstance(task, AnswerTask) else ()
    names = (*METRICS, *(f"eval/score_{name}" for name in terms), *of_answers)
    return tuple(name for name in names if reward is not None or name not in (SCORE, GAP))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics by name, and the samples they were computed from."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def read_evaluations(folder: RunFolder) -> tuple[Evaluation, Evaluation]:
    """The first and the last evaluation that a run has logged."""
    evaluated = [row for row in folder.rows() if "eval/kl" in row]
    samples = folder.samples()
    first, last = (
        Evaluation(
            metrics={name: value for name, value in row.items() if name != "phase"},
            samples=[sample for sample in samples if sample["phase"] == row["phase"]],
        )
        for row in (evaluated[0], evaluated[-1])
    )
    return first, last


def evaluation_order(prompts: PromptBatch, seed: int) -> Int[Tensor, " prompt"]:
    """The order in which the evaluations of a run with that seed take the held-out prompts."""
    return torch.randperm(len(prompts.rows), generator=make_generator(seed, "evaluation prompts"))


def evaluate(
    setup: Setup, reward: CheckedReward | None, *, num_samples: int, seed: int, phase: int
) -> Evaluation:
    """Scores, exact KL and diversity of `num_samples` completions of the held-out prompts.

    Without a reward there are no scores. A sum of rewards adds the mean score of each term; a
    task that knows exact answers adds exact-match rates, sampled and greedy, and the true reward.

    Calls with the same seed use the same random numbers and the same prompts in the same order,
    repeated if there are fewer than samples. So evaluations are paired, and their differences are
    less noisy. Rollouts draw from other streams. Raises TrainingError naming the phase for logits
    that are not finite, and RewardError as the reward does.
    """
    policy, prompts, answers = setup.policy, setup.eval_prompts, setup.answers
    device = policy.device
    order = evaluation_order(prompts, seed)
    index = order.repeat(-(-num_samples // len(order)))[:num_samples]
    generator = make_generator(seed, "evaluation", device)
    full = setup.sampler.full_distribution
    chunks, by_term = [], list[dict[str, Tensor]]()
    began = time.monotonic()
    for rows in index.split(ROWS):
        generation = sample(full, policy, take(prompts, rows.to(device)), generator, phase=phase)
        scores, terms = _score(reward, generation.completions, phase=phase)
        by_term.append(terms)
        chunks.append(measure(policy, setup.reference, generation, scores, temperature=1.0))
        seconds = (time.monotonic() - began) * len(index) / len(rows)
        if len(chunks) == 1 and seconds > SAID_S:
            log.info("evaluating %d completions takes about %.0f s", len(index), seconds)
    metrics, samples = _metrics(setup, chunks), sample_rows(chunks)
    for name in by_term[0]:
        scores = torch.cat([terms[name] for terms in by_term])
        metrics[f"eval/score_{name}"] = scores.mean().item()
        for row, score in zip(samples, scores.tolist(), strict=True):
            row[f"score_{name}"] = score
    if answers is not None:
        judged = [judge_answers(answers, policy.tokenizer, chunk.completions) for chunk in chunks]
        exact, true = map(torch.cat, zip(*judged, strict=True))
        distinct = take(prompts, order[:num_samples].to(device))
        metrics |= {
            "eval/true_reward": true.mean().item(),
            GAP: metrics[SCORE] - true.mean().item(),
            "eval/exact_match": exact.float().mean().item(),
            "eval/greedy_exact_match": exact_match(
                policy, answers, distinct, full.greedy, generator
            ),
        }
        for row, value, is_exact in zip(samples, true.tolist(), exact.tolist(), strict=True):
            row |= {"true_reward": value, "exact": is_exact}
    if reward is None:
        metrics = {name: value for name, value in metrics.items() if name not in (SCORE, GAP)}
        samples = [{k: v for k, v in row.items() if k != "score"} for row in samples]
    return Evaluation(metrics=metrics, samples=samples)


def _score(
    reward: CheckedReward | None, completions: Completions, *, phase: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores, and those of each term; NaN and none without a reward."""
    if reward is None:
        return torch.full(completions.mask.shape[:1], math.nan, device=completions.mask.device), {}
    return reward.by_term(completions, phase=phase)


def sample_rows(rollouts: list[Rollout]) -> list[dict[str, Any]]:
    """Prompt, completion, score and summed KL of every row, for samples.jsonl and tables."""
    return [
        {"prompt": prompt, "completion": text, "score": score, "kl_sum": kl_sum}
        for r in rollouts
        for prompt, text, score, kl_sum in zip(
            r.completions.prompts.texts,
            r.completions.texts,
            r.scores.tolist(),
            r.kl.sum(dim=1).tolist(),
            strict=True,
        )
    ]


def _metrics(setup: Setup, chunks: list[Rollout]) -> dict[str, float]:
    of_texts = {}
    if setup.texts is not None:
        of_texts = text_metrics(setup.policy, setup.reference, setup.texts)
    mask = torch.cat([r.completions.mask for r in chunks])
    kl = torch.cat([r.kl for r in chunks])
    tokens = torch.cat([r.completions.tokens for r in chunks])
    return {
        SCORE: torch.cat([r.scores for r in chunks]).mean().item(),
        "eval/kl": masked_mean(kl, mask).item(),
        "eval/kl_sum": kl.sum(dim=1).mean().item(),
        "eval/entropy": masked_mean(torch.cat([r.entropy for r in chunks]), mask).item(),
        "eval/distinct_3": distinct_n(tokens, mask, n=3),
        "eval/len_mean": mask.sum(dim=1).float().mean().item(),
        **of_texts,
    }


def brief(metrics: Mapping[str, float]) -> str:
    """The metrics of an evaluation as a line, without "eval/"."""
    return describe({name.removeprefix("eval/"): value for name, value in metrics.items()})


def present(context: Context, before: Evaluation, after: Evaluation) -> None:
    """Queues samples and metrics, before and after, for display."""
    add = context.presentation.add

    def show_samples() -> None:
        print_before_after(before.samples[:TABLE_ROWS], after.samples[:TABLE_ROWS], Console())

    def show_metrics() -> None:
        log.info("before: %s", brief(before.metrics))
        log.info("after:  %s", brief(after.metrics))

    add("the table of samples", show_samples)
    add("the summary", show_metrics)


def queue_curves(
    context: Context, *, plot: Callable[..., Path] = plot_ppo, title: str = "PPO by phase"
) -> None:
    """Queues the figure of all rows, curves.png: by default score and KL by phase."""
    folder = context.folder

    def draw_curves() -> None:
        picture = plot(folder.rows(), folder.path / CURVES, title=title)
        log.info("curves: %s", os.path.relpath(picture))

    context.presentation.add(CURVES, draw_curves)
