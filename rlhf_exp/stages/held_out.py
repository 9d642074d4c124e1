"""A language model measured on held-out examples, while it trains and at the end."""

import logging
import math
from collections.abc import Sequence

import torch

from rlhf_exp.hf import PreTrainedModel
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rl.exact_answers import exact_match
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.runs.summary import describe
from rlhf_exp.tasks.examples import Example, ExampleBatch, pad
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.tasks.protocol import AnswerTask
from rlhf_exp.training.early_stopping import EXACT, LOSS
from rlhf_exp.training.seeding import make_generator
from rlhf_exp.types import PromptBatch

log = logging.getLogger(__name__)

MAX_EXPONENT = 700.0  # a float overflows soon after
GREEDY_EXACT, PERPLEXITY = "heldout/greedy_exact_match", "heldout/perplexity"


class HeldOut:
    """Held-out examples in random order. The first `num_samples` of them measure the model while it
    trains; if its weights are chosen by that (`chooses`), it is measured at the end on others."""

    def __init__(
        self,
        policy: TransformerWithValueHead,
        examples: Sequence[Example],
        *,
        num_samples: int,
        chooses: bool,
        batch_size: int,
        seed: int,
    ) -> None:
        order = torch.randperm(len(examples), generator=make_generator(seed, "held-out")).tolist()
        self.policy, self.seed, self.batch_size = policy, seed, batch_size
        self.examples = [examples[i] for i in order]
        self.num_samples, self.chooses = num_samples, chooses
        self._order = order
        self._answers: tuple[AnswerTask, PromptBatch] | None = None

    def with_answers(self, task: AnswerTask, prompts: Sequence[str]) -> None:
        """Makes `measure` measure exact matches too. `prompts` are the examples' prompts."""
        encoded = encode_prompts(
            self.policy.tokenizer, prompts, prepend_bos=task.prepend_bos, device=self.policy.device
        )
        self._answers = task, encoded[torch.tensor(self._order, device=self.policy.device)]

    def during(self) -> dict[str, float]:
        """Loss, and the exact-match rate of answers sampled at temperature 1."""
        chosen = slice(0, self.num_samples)
        metrics = self._loss(self.examples[chosen])
        return metrics | self._exact_match(chosen, ("sampled",))

    def measure(self, update: int) -> dict[str, float]:
        """`during`, with a log line; training continues."""
        metrics = self.during()
        self.policy.language_model.train()
        log.info("update %d: %s", update, describe(metrics))
        return metrics

    def final(self) -> dict[str, float]:
        """Loss over the examples that chose no weights, or over all if there are no others;
        exact-match rates, sampled and greedy, of examples that `during` does not see, or of the
        same ones if there are no others."""
        has_others = len(self.examples) > self.num_samples
        others = slice(self.num_samples, 3 * self.num_samples)
        first = self.num_samples if self.chooses and has_others else 0
        metrics = self._loss(self.examples[first:])
        metrics[PERPLEXITY] = math.exp(min(metrics[LOSS], MAX_EXPONENT))
        unseen = others if has_others else slice(None)
        return metrics | self._exact_match(unseen, ("sampled", "greedy"))

    def _loss(self, examples: Sequence[Example]) -> dict[str, float]:
        network = self.policy.language_model.eval()
        return {LOSS: held_out_loss(network, examples, batch_size=self.batch_size)}

    def _exact_match(self, chosen: slice, kinds: Sequence[str]) -> dict[str, float]:
        if self._answers is None:
            return {}
        task, prompts = self._answers
        longest = max(len(example) - example.start for example in self.examples)
        room = self.policy.context_len - prompts.tokens.shape[1]
        sampler = CachedSampler(gen_len=min(longest, room), stop_at_eos=True)
        samplers = {"sampled": sampler, "greedy": sampler.greedy}
        names = {"sampled": EXACT, "greedy": GREEDY_EXACT}
        rows = prompts[torch.arange(len(prompts.rows), device=self.policy.device)[chosen]]
        generator = make_generator(self.seed, "held-out samples", self.policy.device)
        return {
            names[kind]: exact_match(self.policy, task, rows, samplers[kind], generator)
            for kind in kinds
        }


def next_token_loss(network: PreTrainedModel, batch: ExampleBatch) -> torch.Tensor:
    """Mean cross-entropy over the learned tokens, in nats."""
    positions = None if batch.positions is None else batch.positions.to(network.device)
    return network(
        input_ids=batch.tokens.to(network.device),
        labels=batch.labels.to(network.device),
        position_ids=positions,
        use_cache=False,
    ).loss


@torch.no_grad()
def held_out_loss(
    network: PreTrainedModel, examples: Sequence[Example], *, batch_size: int
) -> float:
    """Mean cross-entropy per token, with equal weight for every token. The network must be in
    evaluation mode."""
    losses, counts = [], []
    for i in range(0, len(examples), batch_size):
        batch = pad(examples[i : i + batch_size])
        losses.append(next_token_loss(network, batch).cpu())
        counts.append(batch.num_learned)
    weights = torch.tensor(counts, dtype=torch.float32)
    return float((torch.stack(losses) * weights).sum() / weights.sum())
