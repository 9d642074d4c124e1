"""Preference pairs that the policy samples while it learns: two answers to each prompt, of which
the reward chooses the better one.

Knows how pairs are made, not what is learned from them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from rlhf_exp.machine.precision import Dtype, autocast
from rlhf_exp.rewards.attempts import CheckedReward
from rlhf_exp.rl.collect import sample
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rollout.sampler import have_ended
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.stages.pair_logprobs import ReferencedPairs
from rlhf_exp.tasks.pair_tokens import EncodedPair
from rlhf_exp.tasks.prompts import PromptStream
from rlhf_exp.tasks.protocol import Conversation, Pair
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.types import PromptBatch

MAX_TRIED = 100  # prompts a pair; with more, almost all are ties

PairBatch = tuple[ReferencedPairs, list[int]]


class Answer(NamedTuple):
    """A sampled answer: its tokens and text, its reward, and whether it has ended."""

    tokens: list[int]
    text: str
    reward: float
    ended: bool


class OnlinePairs(Iterator[PairBatch]):
    """Endless batches of pairs. Every `num_batches` batches new pairs are sampled from the policy
    as it then is, to prompts in random order; a tie, of rewards or of answers, is dropped. The
    reference reads `pass_size` pairs at a time, by default `batch_size`. `log` is called with the
    number of batches so far and metrics of the new pairs."""

    def __init__(
        self,
        setup: Setup,
        prompts: PromptBatch,
        *,
        batch_size: int,
        num_batches: int,
        dtype: Dtype,
        pass_size: int | None = None,
        seed: int,
        log: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        assert setup.score is not None
        self._setup, self._reward, self._log = setup, CheckedReward(setup.score), log
        self._batch_size, self._num_batches, self._dtype = batch_size, num_batches, dtype
        self._pass_size = pass_size or batch_size
        self._prompts = PromptStream(prompts, batch_size, make_generator(seed, "prompts"))
        self._generator = make_generator(seed, "samples", setup.policy.device)
        self._encoded: list[EncodedPair] = []
        self._pairs: ReferencedPairs | None = None
        self._drawn = 0  # batches, of all pairs so far

    def __next__(self) -> PairBatch:
        place = self._drawn % self._num_batches
        if place == 0:
            self._sample()
        assert self._pairs is not None
        self._drawn += 1
        return self._pairs, [*range(place * self._batch_size, (place + 1) * self._batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """Positions of the prompts and the generator, and the newest pairs."""
        return {
            "prompts": self._prompts.state_dict(),
            "sampling": self._generator.get_state(),
            "pairs": [[list(p.pair), p.prompt, p.chosen, p.rejected] for p in self._encoded],
            "drawn": self._drawn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the state; the reference's log-probs are computed again."""
        self._prompts.load_state_dict(state["prompts"])
        self._generator.set_state(state["sampling"])
        self._drawn = state["drawn"]
        self._use([
            EncodedPair(pair=Pair(*pair), prompt=prompt, chosen=chosen, rejected=rejected)
            for pair, prompt, chosen, rejected in state["pairs"]
        ])  # fmt: skip

    def _sample(self) -> None:
        """Samples new pairs. Raises TrainingError if almost all prompts give ties."""
        needed, tried = self._batch_size * self._num_batches, 0
        pairs: list[EncodedPair] = []
        while len(pairs) < needed:
            if tried >= MAX_TRIED * needed:
                raise TrainingError(
                    f"update {self._drawn + 1}: of {tried} prompts only {len(pairs)} gave two"
                    " answers of different reward; raise sampler.temperature or choose another"
                    " reward or model"
                )
            pairs += self._usable(next(self._prompts))
            tried += self._batch_size
        rewards = torch.tensor([[p.pair.chosen_reward, p.pair.rejected_reward] for p in pairs])
        chosen, rejected = rewards.mean(dim=0).tolist()
        self._log(self._drawn, {
            "pairs/tie_fraction": 1 - len(pairs) / tried,
            "pairs/chosen_reward": chosen,
            "pairs/rejected_reward": rejected,
        })  # fmt: skip
        self._use(pairs[:needed])

    def _use(self, pairs: list[EncodedPair]) -> None:
        self._encoded = pairs
        self._pairs = ReferencedPairs(
            pairs, self._setup.reference,
            batch_size=self._pass_size, dtype=self._dtype, device=self._setup.policy.device,
        )  # fmt: skip

    @torch.no_grad()
    def _usable(self, prompts: PromptBatch) -> list[EncodedPair]:
        policy, phase = self._setup.policy, self._drawn
        twice = torch.arange(len(prompts.rows), device=policy.device).repeat_interleave(2)
        with autocast(self._dtype, policy.device):
            generation = sample(
                self._setup.sampler, policy, prompts[twice], self._generator, phase=phase
            )
        completions = generation.completions
        masks = zip(completions.tokens, completions.mask, strict=True)
        answers = [
            Answer(*answer)
            for answer in zip(
                [tokens[mask].tolist() for tokens, mask in masks],
                completions.texts,
                self._reward(completions, phase=phase).tolist(),
                have_ended(completions, policy.tokenizer).tolist(),
                strict=True,
            )
        ]
        prompt_tokens = [t[m].tolist() for t, m in zip(prompts.tokens, prompts.mask, strict=True)]
        places = zip(prompt_tokens, prompts.unrendered, answers[::2], answers[1::2], strict=True)
        pairs = [ordered_pair(*place) for place in places]
        return [pair for pair in pairs if pair is not None]


def ordered_pair(
    tokens: list[int], prompt: str | Conversation, first: Answer, second: Answer
) -> EncodedPair | None:
    """Two answers to a prompt as a pair, the better one chosen; None for a tie, of rewards or of
    answers."""
    if first.reward == second.reward or first.tokens == second.tokens:
        return None
    better, other = (first, second) if first.reward > second.reward else (second, first)
    pair = Pair(
        prompt, better.text, other.text, better.reward, other.reward, better.ended, other.ended
    )
    return EncodedPair(pair=pair, prompt=tokens, chosen=better.tokens, rejected=other.tokens)
