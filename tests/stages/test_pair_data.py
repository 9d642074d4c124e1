"""Scores of pairs kept or computed anew, and their losses and metrics by hand."""

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rlhf_exp.models.reward_model import HeadShape, RewardModel
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.stages import pair_data
from rlhf_exp.stages.pair_data import (
    FeaturePairs,
    error_metrics,
    pair_loss,
    pair_metrics,
    print_pairs,
    score_rows,
)
from rlhf_exp.tasks.pair_tokens import EncodedPair, encode_pairs

from ..rl.toy import ToyPairs, saved_model


def model(path: Path, kind: str = "token_sum") -> RewardModel:
    network, tokenizer = saved_model(path).language_model(None, seed=0)
    shape = HeadShape(kind=kind, width=8, read_layers=2, prepend_bos=True)
    scorer = RewardModel(CausalTransformer(network, tokenizer), shape)
    scorer.unfreeze(0)
    scorer.initialise_head(torch.Generator().manual_seed(0), bias=0.5)
    return scorer


def encoded(scorer: RewardModel, task: ToyPairs | None = None) -> list[EncodedPair]:
    """11 pairs, of prompts and answers of several lengths."""
    held_out = (ToyPairs() if task is None else task).pair_split().held_out[:11]
    return encode_pairs(scorer.backbone.tokenizer, held_out, ["?"] * 11, prepend_bos=True, limit=16)


def score_alone(scorer: RewardModel, prompt: list[int], answer: list[int]) -> float:
    """The token_sum head on the states of one answer without any padding."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        output = scorer.backbone.language_model(input_ids=ids, output_hidden_states=True)
        states = torch.cat([output.hidden_states[-2], output.hidden_states[-1]], dim=-1)[0]
        logprobs = output.logits[0].log_softmax(dim=-1)
        total = torch.zeros(8)
        summed = 0.0
        for i in range(len(prompt), ids.shape[1]):
            logprob = logprobs[i - 1, ids[0, i]]
            total += scorer.head.token(torch.cat([states[i - 1], states[i], logprob[None]]))
            summed += logprob.item()
        return scorer.head.score(scorer.head.out(torch.cat([total, torch.tensor([summed])]))).item()


@pytest.mark.parametrize("keep_features", [True, False])
@pytest.mark.parametrize("size", [3, 256])
def test_each_answer_is_scored_as_by_itself(
    tmp_path: Path, keep_features: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_data, "ROWS", size)
    scorer = model(tmp_path)
    pairs = encoded(scorer)
    data = FeaturePairs(scorer, pairs, keep_features=keep_features, dtype="fp32")
    chosen, rejected = data.all_scores()
    assert chosen.tolist() == pytest.approx(
        [score_alone(scorer, p.prompt, p.chosen) for p in pairs], abs=1e-4
    )
    assert rejected.tolist() == pytest.approx(
        [score_alone(scorer, p.prompt, p.rejected) for p in pairs], abs=1e-4
    )
    assert (chosen - rejected).abs().min() > 1e-3
    some = torch.tensor([7, 2, 2, 10])
    for a, b in zip(data.scores(some), (chosen, rejected), strict=True):
        torch.testing.assert_close(a, b[some], rtol=0, atol=1e-5)
    assert len(data) == 11


@pytest.mark.parametrize("kind", ["token_sum", "last_token"])
def test_kept_features_give_the_scores_and_gradients_of_new_ones(tmp_path: Path, kind: str) -> None:
    scorer = model(tmp_path, kind)
    pairs = encoded(scorer)
    kept, fresh = (
        FeaturePairs(scorer, pairs, keep_features=keep, dtype="fp32") for keep in (True, False)
    )
    index = torch.tensor([1, 4, 9])
    gradients = []
    for data in (kept, fresh):
        scorer.head.zero_grad()
        torch.cat(data.scores(index)).square().sum().backward()
        gradients.append([p.grad.clone() for p in scorer.head.parameters()])
        assert all(p.grad is None for p in scorer.backbone.parameters())
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any(scores.requires_grad for scores in kept.all_scores())
    assert all(scores.requires_grad for scores in kept.scores(index))


def test_half_precision_is_for_the_language_model_alone(tmp_path: Path) -> None:
    scorer = model(tmp_path)
    full, half = (
        FeaturePairs(scorer, encoded(scorer), keep_features=True, dtype=dtype).all_scores()[0]
        for dtype in ("fp32", "bf16")
    )
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)


def test_rewards_are_those_of_the_pairs(tmp_path: Path) -> None:
    scorer = model(tmp_path)
    pairs = encoded(scorer)
    chosen, rejected = FeaturePairs(scorer, pairs, keep_features=False, dtype="fp32").rewards
    assert chosen.tolist() == [p.pair.chosen_reward for p in pairs]
    assert rejected.tolist() == [p.pair.rejected_reward for p in pairs]
    without = encoded(scorer, ToyPairs(rewarded=False))
    assert FeaturePairs(scorer, without, keep_features=False, dtype="fp32").rewards is None


SCORES = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([1.0, 1.5, 1.0])
REWARDS = torch.tensor([3.0, 2.0, 2.5]), torch.tensor([0.0, 1.0, 1.5])
RANK = sum(math.log(1 + math.exp(-margin)) for margin in (1.0, -1.0, 0.0)) / 3
SQUARES = (1.0 + 2.25 + 2.25 + 1.0 + 0.25 + 0.25) / 6


def test_loss_by_hand() -> None:
    assert pair_loss(SCORES, None, rank_coef=0.3).item() == pytest.approx(RANK)
    loss = pair_loss(SCORES, REWARDS, rank_coef=0.3).item()
    assert loss == pytest.approx(SQUARES + 0.3 * RANK)


def test_metrics_by_hand() -> None:
    metrics = pair_metrics(SCORES, REWARDS) | error_metrics(SCORES, REWARDS)
    # Ranks of the scores 2, 0.5, 1, 1, 1.5, 1 and of the rewards 3, 2, 2.5, 0, 1, 1.5.
    a, b = [6, 1, 3, 3, 5, 3], [6, 4, 5, 1, 2, 3]
    mean = 3.5
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = [math.sqrt(sum((x - mean) ** 2 for x in ranks)) for ranks in (a, b)]
    rewards = [3.0, 2.0, 2.5, 0.0, 1.0, 1.5]
    centre = sum(rewards) / 6
    assert metrics == pytest.approx(
        {
            "heldout/pair_accuracy": 1 / 3,  # a tie is no order
            "heldout/rank_loss": RANK,
            "heldout/mse": SQUARES,
            "heldout/reward_variance": sum((r - centre) ** 2 for r in rewards) / 6,
            "heldout/spearman": covariance / (spread[0] * spread[1]),
        },
        abs=1e-6,
    )
    assert set(pair_metrics(SCORES, None)) == {"heldout/pair_accuracy", "heldout/rank_loss"}


@pytest.mark.parametrize("rewarded", [True, False])
def test_rows_and_table_hold_texts_scores_and_known_rewards(tmp_path: Path, rewarded: bool) -> None:
    scorer = model(tmp_path)
    data = FeaturePairs(
        scorer, encoded(scorer, ToyPairs(rewarded=rewarded)), keep_features=False, dtype="fp32"
    )
    scores = torch.arange(11) + 0.25, torch.arange(11) - 0.25
    written = score_rows(data, scores)
    assert len(written) == 11
    pair = data.pairs[2].pair
    expected = {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "chosen_score": 2.25,
        "rejected_score": 1.75,
    }
    if rewarded:
        expected |= {"chosen_reward": pair.chosen_reward, "rejected_reward": pair.rejected_reward}
    assert written[2] == expected
    out = io.StringIO()
    print_pairs(written[2:3], Console(file=out, width=80))
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in out.getvalue().splitlines()
        if line.startswith("│")
    ]
    shown = [f"{reward:.2f}" if rewarded else "" for reward in
             (pair.chosen_reward or 0, pair.rejected_reward or 0)]  # fmt: skip
    assert lines == [
        [pair.prompt, "", ""],
        [pair.chosen.strip(), shown[0], "2.25"],
        [pair.rejected.strip(), shown[1], "1.75"],
    ]


def test_a_table_prints_answers_as_they_are() -> None:
    out = io.StringIO()
    row = {"prompt": "[red]?", "chosen": "[/bold] :smile:", "rejected": "[b]", "chosen_score": 1.0}
    print_pairs([{**row, "rejected_score": -1.0}], Console(file=out, width=80))
    assert all(text in out.getvalue() for text in ("[red]?", "[/bold] :smile:", "[b]"))
