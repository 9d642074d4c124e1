"""Best of n: score and KL of choosing, among n samples of a model, the one that a reward prefers.
Nothing is trained."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from rlhf_exp.functional.best_of_n import best_of_n_kl, best_of_n_kl_bound, best_of_n_weights
from rlhf_exp.machine.precision import Dtype, autocast
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models.loading import ModelSettings
from rlhf_exp.models.model_checks import must_be_causal
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rewards.protocol import Reward, RewardFunction
from rlhf_exp.rewards.weighted_sum import WeightedSum
from rlhf_exp.rl.collect import SCORING, sample
from rlhf_exp.rl.evaluation import (
    brief,
    evaluation_order,
    present,
    queue_curves,
    read_evaluations,
)
from rlhf_exp.rl.exact_answers import judge_answers
from rlhf_exp.rl.limit import Limit, write_limit
from rlhf_exp.rl.setup import fingerprints, load_prompts, load_reward, load_sampled_policy
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.runs.context import Context
from rlhf_exp.settings import ConfigError, Count, Fingerprinted, settings
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.tasks.prompts import take
from rlhf_exp.tasks.protocol import AnswerTask, Task
from rlhf_exp.tracking.curves import plot_best_of_n
from rlhf_exp.tracking.progress import Progress
from rlhf_exp.training.out_of_memory import explaining_memory
from rlhf_exp.training.saver import Saver, check_inputs
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.types import PromptBatch

log = logging.getLogger(__name__)

MOST_PROMPTS = 64  # with num_prompts null
METRICS = ("eval/score", "eval/kl", "eval/kl_sum", "eval/kl_sum_bound", "eval/len_mean")
ANSWER_METRICS = ("eval/true_reward", "eval/reward_gap", "eval/exact_match")


@dataclass(frozen=True, kw_only=True)
class BestOfNParts:
    """The parts for choosing among samples."""

    task: Task
    model: ModelSettings
    reward: Reward
    sampler: Sampler


@settings
class BestOfN(Stage[BestOfNParts]):
    """The best of n = 1, 2, 4, ... samples, up to `samples_per_prompt`, all estimated from the same
    completions of the task's evaluation prompts. The base is the model itself, at temperature 1
    with the full distribution. In metrics.jsonl the phase of a row is n."""

    Parts = BestOfNParts

    samples_per_prompt: Annotated[Count, Field(ge=2)] = 64
    """Completions sampled for each prompt, 16-512; the largest n."""
    num_prompts: Count | None = None
    """Evaluation prompts, at most those of the task; null: all, or 64 if there are more."""
    batch_size: Count = 256
    """Completions sampled at once."""
    dtype: Dtype = "fp32"
    """Dtype of forward passes: fp32, bf16; auto: bf16 if the device has instructions for it,
    which pays if d_model >= 256."""
    checkpoint_every: Count | None = 20
    """Batches between checkpoints, and one at the end; null: only when asked to stop."""

    @property
    def counts(self) -> list[int]:
        """Each n: the powers of two below `samples_per_prompt`, and that number."""
        most = self.samples_per_prompt
        return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]

    def check(self, parts: BestOfNParts) -> list[str]:
        for part in (parts.task, parts.reward):
            if isinstance(part, Fingerprinted):
                part.fingerprint()
        problems = must_be_causal(parts.model) + [
            f"sampler.{name}={vars(parts.sampler)[name]}: stage=best_of_n samples from the full"
            f" distribution at temperature 1, as evaluations do: set sampler.{name}={needed}"
            for name, value, needed in (
                ("temperature", 1.0, "1"), ("top_k", None, "null"), ("top_p", 1.0, "1"),
            )
            if vars(parts.sampler)[name] != value
        ]  # fmt: skip
        if isinstance(parts.task, AnswerTask) and not parts.sampler.stop_at_eos:
            problems.append("the task has exact answers, which end: set sampler.stop_at_eos=true")
        return problems

    def check_texts(self, parts: BestOfNParts) -> list[str]:
        return self._too_few(len(parts.task.eval_prompts()))

    def _too_few(self, available: int) -> list[str]:
        if self.num_prompts is None or self.num_prompts <= available:
            return []
        return [
            f"stage.num_prompts={self.num_prompts} is above the number of the task's evaluation"
            f" prompts, {available}: set it to at most that, or null"
        ]

    def metric_names(self, parts: BestOfNParts) -> tuple[str, ...]:
        terms = parts.reward.terms if isinstance(parts.reward, WeightedSum) else ()
        of_answers = ANSWER_METRICS if isinstance(parts.task, AnswerTask) else ()
        return (*METRICS, *(f"eval/score_{name}" for name in terms), *of_answers)

    def run(self, context: Context, parts: BestOfNParts) -> StageResult:
        """Samples, scores, writes the metrics of each n, the chosen samples of the smallest and the
        largest, and limit.json; returns the result.

        Raises ConfigError for more prompts than the task has, and RewardError as the reward does.
        """
        clock, folder, model = Stopwatch(), context.folder, parts.model
        with clock("load"), explaining_memory("loading", ("choose a smaller model",)):
            if problems := self.check_texts(parts):
                raise ConfigError("\n".join(problems))
            policy = load_sampled_policy(context, parts.task, model, parts.sampler)
            prompts = self._prompts(policy, parts, seed=context.seed)
            score = load_reward(
                context, parts.reward, policy, policy, parts.task, parts.sampler, [prompts]
            )
        samples = _Samples(self, policy, parts, score, prompts, seed=context.seed)
        samples.inputs = fingerprints(policy.language_model, task=parts.task, model=model)
        saver = Saver(context, {"samples": samples}, interval=self.checkpoint_every)
        if saver.restore():
            log.info("going on after %d completions", len(samples.texts))
        folder.start()
        knobs = f"lower stage.batch_size (now {self.batch_size})", "lower sampler.gen_len", *SCORING
        progress = Progress(samples.total, unit="completion")
        progress.start(len(samples.texts))
        with clock("sample"), explaining_memory("sampling", knobs), saver.steps(), progress:
            while not samples.is_complete:
                samples.sample_batch(progress)
                saver.step_done(samples.num_batches, is_last=samples.is_complete)
        for n in self.counts:
            metrics = samples.metrics(n)
            folder.log(n, metrics)
            log.info("best of %d: %s", n, brief(metrics))
        for n in (1, self.samples_per_prompt):
            folder.log_samples(n, samples.chosen(n))
        write_limit(samples.limit(), folder.path)
        before, after = read_evaluations(folder)
        title = f"best of 1 to {self.samples_per_prompt} samples"
        present(context, before, after)
        queue_curves(context, plot=plot_best_of_n, title=title)
        return StageResult(before=before.metrics, after=after.metrics, seconds=clock.seconds)

    def _prompts(
        self, policy: TransformerWithValueHead, parts: BestOfNParts, *, seed: int
    ) -> PromptBatch:
        """The first prompts of an evaluation with that seed."""
        _, prompts = load_prompts(policy, parts.task, parts.sampler)
        if problems := self._too_few(len(prompts.rows)):  # once they are cut to their first tokens
            raise ConfigError("\n".join(problems))
        order = evaluation_order(prompts, seed)[: self.num_prompts or MOST_PROMPTS]
        return take(prompts, order.to(policy.device))


class _Samples:
    """The completions so far, those of a prompt side by side, with the numbers that evaluations
    average, by metric. Its state holds everything that changes from batch to batch."""

    def __init__(
        self,
        stage: BestOfN,
        policy: TransformerWithValueHead,
        parts: BestOfNParts,
        score: RewardFunction,
        prompts: PromptBatch,
        *,
        seed: int,
    ) -> None:
        self.stage, self.policy, self.prompts = stage, policy, prompts
        self.sampler, self.reward = parts.sampler, CheckedReward(score)
        self.answers = parts.task if isinstance(parts.task, AnswerTask) else None
        self.inputs: Mapping[str, str] = {}
        self.generator = make_generator(seed, "sampling", policy.device)
        self.texts: list[str] = []
        self.columns: dict[str, list[float]] = {}

    @property
    def total(self) -> int:
        """The number of completions in the end."""
        return len(self.prompts.rows) * self.stage.samples_per_prompt

    @property
    def is_complete(self) -> bool:
        """True if every prompt has its completions."""
        return len(self.texts) == self.total

    @property
    def num_batches(self) -> int:
        """The batches so far."""
        return -(-len(self.texts) // self.stage.batch_size)

    def sample_batch(self, progress: Progress) -> None:
        """Samples and scores the next batch."""
        start, phase = len(self.texts), self.num_batches + 1
        rows = torch.arange(start, min(start + self.stage.batch_size, self.total))
        index = (rows // self.stage.samples_per_prompt).to(self.policy.device)
        with autocast(self.stage.dtype, self.policy.device):
            completions = sample(
                self.sampler, self.policy, take(self.prompts, index), self.generator, phase=phase
            ).completions
        scores, terms = self.reward.by_term(completions, phase=phase)
        values = {"eval/score": scores, "eval/len_mean": completions.mask.sum(dim=1)}
        values |= {f"eval/score_{name}": term for name, term in terms.items()}
        if self.answers is not None:
            exact, true = judge_answers(self.answers, self.policy.tokenizer, completions)
            values |= {"eval/true_reward": true, "eval/exact_match": exact}
        for name, column in values.items():
            self.columns.setdefault(name, []).extend(column.double().tolist())
        self.texts.extend(completions.texts)
        mean = sum(self.columns["eval/score"]) / len(self.texts)
        progress.advance(len(self.texts), {"eval/score": mean})

    def state_dict(self) -> dict[str, Any]:
        """The completions, their numbers, and the generator."""
        return {
            "texts": list(self.texts),
            "columns": {name: list(column) for name, column in self.columns.items()},
            "sampling": self.generator.get_state(),
            "inputs": dict(self.inputs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state. Raises ConfigError for other inputs."""
        check_inputs(self.inputs, state["inputs"])
        self.generator.set_state(state["sampling"])
        self.texts = list(state["texts"])
        self.columns = {name: list(column) for name, column in state["columns"].items()}

    def metrics(self, n: int) -> dict[str, float]:
        """The metrics of the best of n, each the mean over the prompts."""
        scores = self._scores()
        weights = best_of_n_weights(scores, n)
        means = {name: self._mean(weights, column) for name, column in self.columns.items()}
        kl_sum = best_of_n_kl(scores, n).mean().item()
        means |= {
            "eval/kl": kl_sum / means["eval/len_mean"],
            "eval/kl_sum": kl_sum,
            "eval/kl_sum_bound": best_of_n_kl_bound(n),
        }
        if self.answers is not None:
            means["eval/reward_gap"] = means["eval/score"] - means["eval/true_reward"]
        return means

    def limit(self) -> Limit:
        """The scores by prompt, and the true rewards if the task knows them."""
        true_rewards = self.columns.get("eval/true_reward")
        return Limit(
            scores=self._scores(),
            true_rewards=None if true_rewards is None else self._by_prompt(true_rewards),
        )

    def chosen(self, n: int) -> list[dict[str, Any]]:
        """The best of the first n completions of each prompt, for samples.jsonl and tables."""
        best = self._scores()[:, :n].argmax(dim=1).tolist()
        rows = []
        for number, (prompt, place) in enumerate(zip(self.prompts.texts, best, strict=True)):
            index = number * self.stage.samples_per_prompt + place
            values = {name: column[index] for name, column in self.columns.items()}
            del values["eval/len_mean"]
            if self.answers is not None:
                values["exact"] = bool(values.pop("eval/exact_match"))
            numbers = {name.removeprefix("eval/"): value for name, value in values.items()}
            rows.append({"prompt": prompt, "completion": self.texts[index], **numbers})
        return rows

    def _scores(self) -> Float[Tensor, "prompt completion"]:
        """The scores by prompt. Completions of the same text and length take the score of the first
        of them: a network's scores differ by a rounding from batch to batch, which would break
        ties."""
        first: dict[tuple[int, str, float], float] = {}
        lengths, scores = self.columns["eval/len_mean"], []
        for i, (text, length) in enumerate(zip(self.texts, lengths, strict=True)):
            completion = (i // self.stage.samples_per_prompt, text, length)
            scores.append(first.setdefault(completion, self.columns["eval/score"][i]))
        return self._by_prompt(scores)

    def _mean(self, weights: Tensor, column: list[float]) -> float:
        return (weights * self._by_prompt(column)).sum(dim=1).mean().item()

    def _by_prompt(self, column: list[float]) -> Float[Tensor, "prompt completion"]:
        values = torch.tensor(column, dtype=torch.float64)
        return values.view(-1, self.stage.samples_per_prompt)
