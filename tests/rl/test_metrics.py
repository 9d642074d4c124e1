import math
import statistics

import pytest
import torch

from rlhf_exp.rl.metrics import (
    distinct_n,
    explained_variance,
    mean_metrics,
    read_metrics,
    rollout_metrics,
)
from rlhf_exp.types import Completions, Experience, PromptBatch, Rollout

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
TOKENS = torch.tensor([[5, 6, 5, 0], [5, 6, 5, 6], [5, 0, 0, 0]])
NAN = float("nan")


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, 2 / 8),  # 5, 6 of 3 + 4 + 1 tokens
        (2, 2 / 5),  # 56, 65 of 2 + 3
        (3, 2 / 3),  # 565, 656 of 1 + 2
        (4, 1.0),  # 5656
        (5, 0.0),  # none
    ],
)
def test_distinct_n_counts_grams_within_real_tokens(n, expected):
    assert distinct_n(TOKENS, MASK, n=n) == pytest.approx(expected)
    garbage = torch.where(MASK, TOKENS, torch.arange(12).view(3, 4) + 100)
    assert distinct_n(garbage, MASK, n=n) == pytest.approx(expected)


def test_grams_do_not_run_from_one_row_into_the_next():
    tokens = torch.tensor([[1, 2], [3, 4]])
    assert distinct_n(tokens, torch.ones_like(tokens, dtype=torch.bool), n=3) == 0


def test_explained_variance_by_hand():
    # Returns 1, 2, 3, 6 vary by (4 + 1 + 0 + 9) / 3; the errors 1, -1, 1, -1 by 4 / 3.
    returns = torch.tensor([[1.0, 2.0], [3.0, 6.0], [NAN, NAN]])
    values = torch.tensor([[0.0, 3.0], [2.0, 7.0], [NAN, 9.0]])
    mask = torch.tensor([[1, 1], [1, 1], [0, 0]], dtype=torch.bool)
    assert explained_variance(values, returns, mask) == pytest.approx(1 - 4 / 14)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 2.0, 6.0], 1.0), ([6.0, 7.0, 11.0], 1.0), ([3.0, 3.0, 3.0], 0.0), ([9, 8, 4], -3.0)],
    ids=["perfect", "off by a constant", "constant", "opposite"],
)
def test_explained_variance_at_its_marks(values, expected):
    values, returns = torch.tensor([values]).float(), torch.tensor([[1.0, 2.0, 6.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(values, returns, mask) == pytest.approx(expected)


def test_explained_variance_of_constant_returns_is_0():
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(torch.tensor([[1.0, 2.0, 4.0]]), torch.full((1, 3), 0.1), mask) == 0


def test_metrics_are_read_row_by_row():
    rows = [{"b": torch.tensor(float(i)), "a": torch.tensor(i * 10.0)} for i in (1, 2, 6)]
    expected = [{"b": 1.0, "a": 10.0}, {"b": 2.0, "a": 20.0}, {"b": 6.0, "a": 60.0}]
    read = read_metrics(iter(rows))
    assert read == expected
    assert [list(row) for row in read] == [["b", "a"]] * 3
    assert all(type(value) is float for row in read for value in row.values())
    # By name, in whatever order a row has them.
    assert read_metrics([rows[0], dict(reversed(rows[1].items()))]) == expected[:2]
    assert read_metrics([{"a": torch.tensor(NAN)}, {"a": torch.tensor(-torch.inf)}]) == [
        {"a": pytest.approx(NAN, nan_ok=True)},
        {"a": -torch.inf},
    ]


def test_metrics_are_averaged_each_by_itself():
    rows = [{"a": float(i), "b": i * 10.0} for i in (1, 2, 6)]
    assert mean_metrics(rows) == {"a": 3.0, "b": 30.0}
    assert mean_metrics(rows[1:2]) == {"a": 2.0, "b": 20.0}


def experience() -> Experience:
    """Three completions of 3, 4 and 1 tokens; padding holds garbage wherever it may."""
    per_token = torch.tensor([[0.1, 0.2, 0.3, 9], [0.4, 0.5, 0.6, 0.7], [0.8, 9, 9, 9]])
    zeros = torch.zeros(3, 4)
    prompts = PromptBatch(
        tokens=torch.ones(3, 1, dtype=torch.long),
        mask=torch.ones(3, 1, dtype=torch.bool),
        rows=({"prompt": "a"},) * 3,
    )
    rollout = Rollout(
        completions=Completions(prompts=prompts, tokens=TOKENS, mask=MASK, texts=("x",) * 3),
        logprobs=zeros,
        ref_logprobs=0.4 - per_token,
        ref_hidden=torch.zeros(3, 4, 2),
        values=torch.tensor([[1.0, 2, 3, 9], [1, 2, 3, 4], [8, 9, 9, 9]]),
        kl=per_token * MASK,  # summed whole, so it holds 0 there, as `measure` makes it
        entropy=per_token * 2,
        kept_mass=per_token,
        scores=torch.tensor([1.0, 2.0, 6.0]),
    )
    returns = torch.tensor([[2.0, 1, 4, 0], [0, 3, 2, 5], [7, 0, 0, 0]])
    return Experience(rollout=rollout, rewards=zeros, advantages=zeros, returns=returns)


def test_rollout_metrics_by_hand():
    kl = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7], [0.8]]
    mean_kl = sum(map(sum, kl)) / 8
    differences = [x - 0.4 for row in kl for x in row]  # of log p and log q
    estimates = {
        "k1": differences,
        "k2": [d * d / 2 for d in differences],
        "k3": [math.exp(-d) - 1 + d for d in differences],
    }
    returns, errors = [2.0, 1, 4, 0, 3, 2, 5, 7], [1.0, -1, 1, -1, 1, -1, 1, -1]
    variance = sum((r - 3) ** 2 for r in returns) / 7
    assert rollout_metrics(experience(), truncates=False) == pytest.approx(
        {
            "objective/scores": 3.0,
            "objective/scores_std": ((4 + 1 + 9) / 3) ** 0.5,
            "objective/kl": mean_kl,
            "objective/kl_sum": sum(map(sum, kl)) / 3,
            **{f"objective/kl_{n}": statistics.mean(x) for n, x in estimates.items()},
            **{f"objective/kl_{n}_var": statistics.variance(x) for n, x in estimates.items()},
            "objective/entropy": 2 * mean_kl,
            "val/explained_variance": 1 - (sum(e * e for e in errors) / 7) / variance,
            "sample/len_mean": 8 / 3,
            "sample/distinct_3": 2 / 3,
        }
    )
    truncated = rollout_metrics(experience(), truncates=True)
    assert truncated["sample/kept_mass"] == pytest.approx(mean_kl)


def test_one_sample_has_no_spread():
    assert rollout_metrics(experience()[torch.tensor([1])], truncates=False)[
        "objective/scores_std"
    ] == pytest.approx(0)
