"""Preference pairs from a policy's own answers: two are sampled for each prompt, and a reward
decides which is better."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_exp.machine.precision import Dtype, autocast
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models.loading import ModelSettings
from rlhf_exp.models.model_checks import must_be_causal
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rewards.protocol import Reward, RewardFunction
from rlhf_exp.rl.collect import SCORING, sample
from rlhf_exp.rl.setup import fingerprints, fitting_prompts, load_reward, load_sampled_policy
from rlhf_exp.rollout.sampler import Sampler, have_ended
from rlhf_exp.runs.context import Context, TrainingError
from rlhf_exp.settings import ConfigError, Count, settings
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.tasks.conversations import prompt_key, prompt_text
from rlhf_exp.tasks.hashing import hash_fraction
from rlhf_exp.tasks.pairs import FOLDER, Format, write_pairs
from rlhf_exp.tasks.prompts import PromptStream
from rlhf_exp.tasks.protocol import Conversation, DemonstrationTask, Pair, Prompt, PromptRow, Task
from rlhf_exp.tracking.progress import Progress
from rlhf_exp.training.out_of_memory import explaining_memory
from rlhf_exp.training.saver import Saver, check_inputs
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.types import PromptBatch

log = logging.getLogger(__name__)
# Sampling continues until there are enough pairs, unless almost all are ties.
MIN_USABLE, MIN_TRIED = 0.01, 2000
LOGGED = 64
BOTH = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class PreferencesParts:
    """The parts for sampling preference pairs."""

    task: Task
    model: ModelSettings
    reward: Reward
    sampler: Sampler


@settings
class Preferences(Stage[PreferencesParts]):
    """Sampling of `num_pairs` pairs to train on and `num_held_out` held-out ones.

    The better answer is chosen; ties are dropped and counted. Held-out pairs have prompts that no
    other pair has, and that the policy was not trained on if the task holds demonstrations out.
    """

    Parts = PreferencesParts

    num_pairs: Count = 10000
    """Pairs to train on; ties do not count."""
    num_held_out: Count = 1000
    """Pairs of other prompts, to measure a reward model on."""
    batch_size: Count = 256
    """Prompts sampled at once."""
    format: Format = "jsonl"
    """jsonl or parquet."""
    dtype: Dtype = "fp32"
    """Dtype of forward passes: fp32, bf16; auto: bf16 if the device has instructions for it,
    which pays if d_model >= 256."""
    checkpoint_every: Count | None = 20
    """Batches between checkpoints, and one at the end; null: only when asked to stop."""

    def check(self, parts: PreferencesParts) -> list[str]:
        parts.task.fingerprint()
        problems = must_be_causal(parts.model)
        if not parts.sampler.stop_at_eos:
            problems.append(
                "stage=preferences writes answers that end: set sampler.stop_at_eos=true"
            )
        return problems

    def metric_names(self, parts: PreferencesParts) -> tuple[str, ...]:
        return ("pairs/prompts", "pairs/ties", "pairs/tie_fraction", "pairs/chosen_reward",
                "pairs/rejected_reward")  # fmt: skip

    def run(self, context: Context, parts: PreferencesParts) -> StageResult:
        """Samples, writes pairs/train and pairs/test below the run's folder; returns the result.

        Raises TrainingError if fewer than 1% of the prompts give answers of different reward.
        """
        clock, task, model, sampler = Stopwatch(), parts.task, parts.model, parts.sampler
        share = self.num_held_out / (self.num_pairs + self.num_held_out)
        with clock("load"):
            policy = load_sampled_policy(context, task, model, sampler)
            prompts = [
                fitting_prompts(policy, task, texts, sampler)
                for texts in split_prompts(task, share)
            ]
            kinds = {type(prompt) for batch in prompts for prompt in batch.unrendered}
            if self.format == "parquet" and len(kinds) > 1:
                raise ConfigError(
                    "stage.format=parquet: a column holds texts or conversations, but the task's"
                    " prompts are both: set stage.format=jsonl"
                )
            score = load_reward(context, parts.reward, policy, policy, task, sampler, prompts)
        source = _PairSource(policy, sampler, score, context, self, prompts)
        source.inputs = fingerprints(policy.language_model, task=task, model=model)
        saver = Saver(context, {"pairs": source}, interval=self.checkpoint_every)
        if saver.restore():
            log.info("going on after %d prompts", source.num_prompts)
        context.folder.start()
        knobs = f"lower stage.batch_size (now {self.batch_size})", "lower sampler.gen_len", *SCORING
        explaining = explaining_memory("sampling", knobs)
        progress = Progress(sum(source.targets), unit="pair")
        progress.start(source.num_prompts - source.num_ties)
        with clock("sample"), explaining, saver.steps(), progress:
            while not source.is_complete:
                source.sample_batch(progress)
                saver.step_done(source.num_batches, is_last=source.is_complete)
        train, held_out = source.splits
        with clock("save"):
            for name, pairs in (("train", train), ("test", held_out)):
                write_pairs(pairs, context.folder.path / FOLDER / f"{name}.{self.format}")
        context.folder.log(source.num_prompts, source.metrics())
        samples = [pair._replace(prompt=prompt_text(pair.prompt)) for pair in held_out[:LOGGED]]
        context.folder.log_samples(0, [pair._asdict() for pair in samples])
        log.info(
            "%d and %d held-out pairs kept of %d sampled, of which %d are ties; mean reward of the"
            " better answers %.2f, of the others %.2f",
            len(train), len(held_out), source.num_prompts, source.num_ties,
            *(source.metrics()[f"pairs/{name}_reward"] for name in BOTH),
        )  # fmt: skip
        return StageResult(after=source.metrics(), seconds=clock.seconds)


class _PairSource:
    """Samples pairs of the prompts to train on, then of the held-out ones, and counts what it
    sampled. Its state holds everything that changes from batch to batch."""

    def __init__(
        self,
        policy: TransformerWithValueHead,
        sampler: Sampler,
        score: RewardFunction,
        context: Context,
        stage: Preferences,
        prompts: Sequence[PromptBatch],
    ) -> None:
        self.policy, self.sampler, self.stage = policy, sampler, stage
        self.score = CheckedReward(score)
        self.inputs: Mapping[str, str] = {}
        order = make_generator(context.seed, "prompts")
        self.streams = [PromptStream(batch, stage.batch_size, order) for batch in prompts]
        self.generator = make_generator(context.seed, "sampling", context.device)
        self.targets = (stage.num_pairs, stage.num_held_out)
        self.pairs: tuple[list[Pair], list[Pair]] = ([], [])
        self.tried = [0, 0]
        self.num_batches = self.num_prompts = self.num_ties = 0
        self.sums = dict.fromkeys(BOTH, 0.0)

    @property
    def is_complete(self) -> bool:
        """True if both splits have enough pairs."""
        return self._split is None

    @property
    def splits(self) -> tuple[list[Pair], list[Pair]]:
        """The pairs to train on and the held-out ones, in the order in which they were sampled."""
        train, held_out = (p[:n] for p, n in zip(self.pairs, self.targets, strict=True))
        return train, held_out

    @property
    def _split(self) -> int | None:
        short = [len(p) < n for p, n in zip(self.pairs, self.targets, strict=True)]
        return short.index(True) if any(short) else None

    def sample_batch(self, progress: Progress) -> None:
        """Samples a batch of the split that lacks pairs. Raises TrainingError if fewer than 1% of
        its prompts give answers of different reward."""
        split = self._split
        assert split is not None
        self.pairs[split].extend(self._pairs(next(self.streams[split])))
        self.tried[split] += self.stage.batch_size
        self.num_batches += 1
        progress.advance(min(progress.total, self.num_prompts - self.num_ties), self.metrics())
        tried, num_usable = self.tried[split], len(self.pairs[split])
        if tried >= MIN_TRIED and num_usable < min(self.targets[split], MIN_USABLE * tried):
            raise TrainingError(
                f"of {tried} prompts only {num_usable} gave two answers of different reward;"
                " raise sampler.temperature or choose another reward or model"
            )

    def state_dict(self) -> dict[str, Any]:
        """Positions of the prompts and the generator, and the pairs and counts so far."""
        return {
            "prompts": {str(i): prompts.state_dict() for i, prompts in enumerate(self.streams)},
            "sampling": self.generator.get_state(),
            "pairs": [[list(pair) for pair in part] for part in self.pairs],
            "tried": list(self.tried),
            "counts": [self.num_batches, self.num_prompts, self.num_ties],
            "sums": dict(self.sums),
            "inputs": dict(self.inputs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state. Raises ConfigError for other inputs."""
        check_inputs(self.inputs, state["inputs"])
        for i, prompts in enumerate(self.streams):
            prompts.load_state_dict(state["prompts"][str(i)])
        self.generator.set_state(state["sampling"])
        train, held_out = ([Pair(*pair) for pair in part] for part in state["pairs"])
        self.pairs, self.tried = (train, held_out), list(state["tried"])
        self.num_batches, self.num_prompts, self.num_ties = state["counts"]
        self.sums = dict(state["sums"])

    def _pairs(self, prompts: PromptBatch) -> list[Pair]:
        twice = torch.arange(len(prompts.rows), device=self.policy.device).repeat_interleave(2)
        with autocast(self.stage.dtype, self.policy.device):
            generation = sample(
                self.sampler, self.policy, prompts[twice], self.generator, phase=self.num_prompts
            )
        completions = generation.completions
        scores = self.score(completions, phase=self.num_prompts).tolist()
        answers = [*zip(completions.texts, scores, have_ended(completions, self.policy.tokenizer)
                        .tolist(), strict=True)]  # fmt: skip
        pairs = [
            as_pair(prompt, answers[2 * i], answers[2 * i + 1])
            for i, prompt in enumerate(prompts.unrendered)
        ]
        usable = [pair for pair in pairs if pair is not None]
        self.num_prompts += len(pairs)
        self.num_ties += len(pairs) - len(usable)
        for name in BOTH:
            self.sums[name] += sum(getattr(pair, f"{name}_reward") for pair in usable)
        return usable

    def metrics(self) -> dict[str, float]:
        """Metrics of the samples so far."""
        usable = max(1, self.num_prompts - self.num_ties)
        return {
            "pairs/prompts": float(self.num_prompts),
            "pairs/ties": float(self.num_ties),
            "pairs/tie_fraction": self.num_ties / max(1, self.num_prompts),
            "pairs/chosen_reward": self.sums["chosen"] / usable,
            "pairs/rejected_reward": self.sums["rejected"] / usable,
        }


def as_pair(
    prompt: str | Conversation,
    first: tuple[str, float, bool],
    second: tuple[str, float, bool],
) -> Pair | None:
    """The two answers (text, reward, whether it ended) as a pair, or None for a tie: equal rewards
    or equal texts."""
    if first[1] < second[1]:
        first, second = second, first
    if first[1] == second[1] or first[0] == second[0]:
        return None
    return Pair(
        prompt=prompt,
        chosen=first[0],
        rejected=second[0],
        chosen_reward=first[1],
        rejected_reward=second[1],
        chosen_ended=first[2],
        rejected_ended=second[2],
    )


def split_prompts(task: Task, share: float) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts to sample from for training and for held-out pairs: those of held-out demonstrations
    if the task has any, else a `share` of the training prompts, at least one, chosen by their hash.
    Both are the same if there is only one prompt."""
    prompts = task.train_prompts()
    if isinstance(task, DemonstrationTask):
        return prompts, [d.prompt for d in task.demonstration_split().held_out]
    by_key: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        key = prompt_key(prompt.prompt if isinstance(prompt, PromptRow) else prompt)
        by_key.setdefault(key, []).append(prompt)
    if len(by_key) == 1:
        return prompts, prompts
    ordered = sorted(by_key, key=hash_fraction)
    count = min(max(1, round(share * len(ordered))), len(ordered) - 1)
    held_out, train = ordered[:count], ordered[count:]
    return [p for t in train for p in by_key[t]], [p for t in held_out for p in by_key[t]]
