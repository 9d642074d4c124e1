"""Encoded pairs and their scores under a reward model, with metrics and tables."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rlhf_exp.functional.losses import pairwise_rank_loss, reward_mse
from rlhf_exp.machine.precision import Dtype, autocast
from rlhf_exp.models.reward_model import RewardFeatures, RewardModel
from rlhf_exp.security.printable import printable
from rlhf_exp.tasks.conversations import prompt_text
from rlhf_exp.tasks.pair_tokens import EncodedPair, collate
from rlhf_exp.types import concatenate

ROWS = 256  # pairs whose features or scores are computed at once, without gradients

Scores = tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]  # chosen answers, rejected answers


class PairData(ABC):
    """Pairs, their rewards if they are known, and their scores under a model."""

    def __init__(self, pairs: Sequence[EncodedPair], device: torch.device) -> None:
        self.pairs, self.device = pairs, device
        self.rewards: Scores | None = None
        if pairs[0].pair.chosen_reward is not None:
            rewards = [(p.pair.chosen_reward, p.pair.rejected_reward) for p in pairs]
            chosen, rejected = torch.tensor(rewards, device=device).unbind(dim=1)
            self.rewards = chosen, rejected

    def __len__(self) -> int:
        return len(self.pairs)

    @abstractmethod
    def multiplications(self, num_pairs: int) -> int:
        """The approximate number of multiplications for the scores of so many pairs."""

    @abstractmethod
    def scores(self, index: Tensor) -> Scores:
        """Scores of the pairs at `index`."""

    @torch.no_grad()
    def all_scores(self) -> Scores:
        """Scores of all pairs, without gradients."""
        index = torch.arange(len(self), device=self.device).split(ROWS)
        chosen, rejected = zip(*map(self.scores, index), strict=True)
        return torch.cat(chosen), torch.cat(rejected)

    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(max(len(p.chosen), len(p.rejected)) for p in self.pairs)


class FeaturePairs(PairData):
    """Pairs that a reward model scores: from features that are computed once and kept, or from the
    whole model at every call."""

    def __init__(
        self,
        model: RewardModel,
        pairs: Sequence[EncodedPair],
        *,
        keep_features: bool,
        dtype: Dtype,
    ) -> None:
        super().__init__(pairs, model.backbone.device)
        self.model, self.dtype = model, dtype
        self._width = self.longest()
        self._cache = self._compute() if keep_features else None

    def multiplications(self, num_pairs: int) -> int:
        computed = self.model if self._cache is None else self.model.head
        states = self._width if self._cache is None else self._cache.states.shape[1]
        return 2 * num_pairs * states * sum(p.numel() for p in computed.parameters())

    def scores(self, index: Tensor) -> Scores:
        if self._cache is None:
            features = self._features([self.pairs[i] for i in index.tolist()])
        else:
            features = self._cache[torch.cat([index, index + len(self)])]
        chosen, rejected = self.model.head(features).float().chunk(2)
        return chosen, rejected

    def _features(self, pairs: Sequence[EncodedPair]) -> RewardFeatures:
        completions = collate(pairs, width=self._width, device=self.device)
        with autocast(self.dtype, self.device):
            features = self.model.features(completions)
        return self.model.head.condense(features)

    @torch.no_grad()
    def _compute(self) -> RewardFeatures:
        parts = [self._features(self.pairs[i : i + ROWS]) for i in range(0, len(self), ROWS)]
        halves = [
            [part[torch.arange(len(part.last), device=self.device).chunk(2)[half]]
             for part in parts] for half in (0, 1)
        ]  # fmt: skip
        return concatenate(halves[0] + halves[1])


def pair_loss(scores: Scores, rewards: Scores | None, *, rank_coef: float) -> Float[Tensor, ""]:
    """Mean squared error of both answers' scores plus rank_coef times the rank loss; without
    rewards only the rank loss."""
    rank = pairwise_rank_loss(*scores)
    if rewards is None:
        return rank
    return reward_mse(torch.cat(scores), torch.cat(rewards)) + rank_coef * rank


def pair_metrics(scores: Scores, rewards: Scores | None) -> dict[str, float]:
    """Metrics of the order that the scores give: of each pair, and if rewards are known of all
    answers (Spearman's rank correlation)."""
    from scipy.stats import spearmanr

    chosen, rejected = scores
    metrics = {
        "heldout/pair_accuracy": (chosen > rejected).float().mean().item(),
        "heldout/rank_loss": pairwise_rank_loss(chosen, rejected).item(),
    }
    if rewards is not None:
        predicted, true = torch.cat(scores), torch.cat(rewards)
        metrics["heldout/spearman"] = float(spearmanr(predicted.cpu(), true.cpu()).statistic)
    return metrics


def error_metrics(scores: Scores, rewards: Scores) -> dict[str, float]:
    """The scores' mean squared error, and the rewards' variance: the error of the best constant."""
    true = torch.cat(rewards)
    return {
        "heldout/mse": reward_mse(torch.cat(scores), true).item(),
        "heldout/reward_variance": true.var(correction=0).item(),
    }


def score_rows(data: PairData, scores: Scores) -> list[dict[str, object]]:
    """A row a pair for samples.jsonl and tables: texts, scores, and rewards if known."""
    rows = []
    for i, (encoded, chosen, rejected) in enumerate(
        zip(data.pairs, *(s.tolist() for s in scores), strict=True)
    ):
        row = {
            "prompt": prompt_text(encoded.pair.prompt),
            "chosen": encoded.pair.chosen,
            "rejected": encoded.pair.rejected,
            "chosen_score": chosen,
            "rejected_score": rejected,
        }
        if data.rewards is not None:
            row["chosen_reward"] = data.rewards[0][i].item()
            row["rejected_reward"] = data.rewards[1][i].item()
        rows.append(row)
    return rows


def print_pairs(rows: Sequence[dict[str, object]], console: Console) -> None:
    """A table of held-out pairs: each answer with its reward and what the model predicts."""
    table = Table(title="held-out pairs, rewards and predictions", expand=True)
    table.add_column("prompt, chosen and rejected answer", ratio=1)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("predicted", justify="right", no_wrap=True)
    for row in rows:
        # Text, not markup: an answer may hold anything.
        table.add_row(Text(printable(str(row["prompt"])), style="dim"))
        for name in ("chosen", "rejected"):
            reward = row.get(f"{name}_reward")
            table.add_row(
                Text(printable(str(row[name]).strip())),
                "" if reward is None else f"{reward:.2f}",
                f"{row[f'{name}_score']:.2f}",
                end_section=name == "rejected",
            )
    console.print(table)
