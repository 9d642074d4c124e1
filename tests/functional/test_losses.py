import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_exp.functional.losses import (
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    dpo_loss,
    ipo_loss,
    pairwise_rank_loss,
    policy_gradient,
    reward_mse,
    sequence_log_ratio,
    value_loss,
)

# Ratios on both sides of and inside the clip range, with advantages of both signs.
A = [
    [0.1, -0.5, 0.9, -0.05],
    [-0.7, 0.3, 9.0, 9.0],
    [0.15, 9.0, 9.0, 9.0],
    [9.0, 9.0, 9.0, 9.0],
]
B = [
    [0.0, 0.2, 0.25, 0.1],
    [-0.1, 0.9, 9.0, 9.0],
    [-0.6, 9.0, 9.0, 9.0],
    [9.0, 9.0, 9.0, 9.0],
]
C = [
    [1.5, -0.5, 2.0, -1.0],
    [0.75, 3.0, 9.0, 9.0],
    [-2.5, 9.0, 9.0, 9.0],
    [9.0, 9.0, 9.0, 9.0],
]
LENGTHS = [4, 2, 1, 0]
REAL = [(b, t) for b, length in enumerate(LENGTHS) for t in range(length)]

# Each with the number of tensors that it takes before the mask.
MASKED_LOSSES = {
    "clipped_surrogate": (3, lambda *args: clipped_surrogate(*args, clip_coef=0.2)),
    "dual clip": (3, lambda *args: clipped_surrogate(*args, clip_coef=0.2, dual_clip_coef=2.0)),
    "policy_gradient": (2, lambda x, a, mask: policy_gradient(x, x.detach(), a, mask)),
    "importance cap": (
        2,
        lambda x, a, mask: policy_gradient(x, x.detach(), a, mask, importance_cap=0.9),
    ),
    "sequence_log_ratio": (2, lambda *args: sequence_log_ratio(*args).sum()),
    "clip_fraction": (2, lambda *args: clip_fraction(*args, clip_coef=0.2)),
    "value_loss": (2, value_loss),
    "clipped_value_loss": (3, lambda *args: clipped_value_loss(*args, value_clip_coef=0.2)),
}
every_masked_loss = pytest.mark.parametrize(
    ("num_tensors", "loss"), MASKED_LOSSES.values(), ids=MASKED_LOSSES.keys()
)


def ragged(num_tensors: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor(x, dtype=dtype) for x in (A, B, C)[:num_tensors]]


def ragged_mask() -> Tensor:
    return torch.tensor([[t < length for t in range(4)] for length in LENGTHS])


def loss_and_gradients(loss: Callable, tensors: list[Tensor], mask: Tensor) -> list[Tensor]:
    tensors = [x.clone().requires_grad_() for x in tensors]
    value = loss(*tensors, mask)
    if not value.requires_grad:  # a count has no gradient
        return [value]
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def scalar(x: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(x, dtype=dtype)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "objective"),
    [
        (1.0, 1.0, 1.2),  # ratio e, clipped from above
        (1.0, -1.0, math.exp(-1)),  # ratio 1/e: a worse ratio is never clipped away
        (-1.0, 1.0, -math.e),  # nor here
        (-1.0, -1.0, -0.8),  # clipped from below
        (2.0, 0.1, 2 * math.exp(0.1)),  # inside the range
        (-2.0, 0.1, -2 * math.exp(0.1)),
    ],
)
def test_clipped_surrogate_golden(advantage, log_ratio, objective, dtype):
    # To be maximised: the losses -1.2, -0.3679, +2.7183 of the PPO paper's figure 1, negated.
    old_logprobs = torch.tensor([[-2.0]], dtype=dtype)
    value = clipped_surrogate(
        old_logprobs + log_ratio,
        old_logprobs,
        torch.tensor([[advantage]], dtype=dtype),
        torch.tensor([[True]]),
        clip_coef=0.2,
    )
    assert_close(value, scalar(objective, dtype))


@pytest.mark.parametrize("clip_coef", [0.05, 0.2, 0.5])
def test_clipped_surrogate_and_clip_fraction_against_a_loop(clip_coef, dtype):
    total, outside = 0.0, 0
    for b, t in REAL:
        ratio = math.exp(A[b][t] - B[b][t])
        bounded = min(max(ratio, 1 - clip_coef), 1 + clip_coef)
        total += min(ratio * C[b][t], bounded * C[b][t])
        outside += not 1 - clip_coef <= ratio <= 1 + clip_coef
    logprobs, old_logprobs, advantages = ragged(3, dtype)
    mask = ragged_mask()
    value = clipped_surrogate(logprobs, old_logprobs, advantages, mask, clip_coef=clip_coef)
    assert_close(value, scalar(total / len(REAL), dtype))
    fraction = clip_fraction(logprobs, old_logprobs, mask, clip_coef=clip_coef)
    assert_close(fraction, scalar(outside / len(REAL), dtype))


def test_ratio_one_gives_the_mean_advantage_and_the_policy_gradient(dtype):
    logprobs, _, advantages = ragged(3, dtype)
    mask, old_logprobs = ragged_mask(), logprobs.clone()
    logprobs.requires_grad_()
    value = clipped_surrogate(logprobs, old_logprobs, advantages, mask, clip_coef=0.2)
    value.backward()
    assert_close(value, scalar(math.fsum(C[b][t] for b, t in REAL) / 7, dtype))
    # d objective / d logprob = A / n where the ratio is 1.
    expected = [[C[b][t] / 7 if (b, t) in REAL else 0.0 for t in range(4)] for b in range(4)]
    assert_close(logprobs.grad, torch.tensor(expected, dtype=dtype))
    assert clip_fraction(logprobs, old_logprobs, mask, clip_coef=0.2) == 0
    assert clip_fraction(logprobs, old_logprobs, mask, clip_coef=0.0) == 0


def test_a_clipped_token_has_no_gradient(dtype):
    logprobs = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=dtype, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]], dtype=dtype)
    mask = torch.ones(1, 4, dtype=torch.bool)
    clipped_surrogate(
        logprobs, torch.zeros_like(advantages), advantages, mask, clip_coef=0.2
    ).backward()
    # Only the pessimistic side moves: d(ratio A / 4) = ratio A / 4.
    expected = torch.tensor([[0.0, 0.0, -math.e / 4, math.exp(-1) / 4]], dtype=dtype)
    assert_close(logprobs.grad, expected)


def test_clip_fraction_golden(dtype):
    # Ratios 1.21, 1.19, 0.81, 0.79 and, in the padding, 3.
    ratios = torch.tensor([[1.21, 1.19, 0.81, 0.79, 3.0]], dtype=dtype)
    mask = torch.tensor([[True, True, True, True, False]])
    old_logprobs = torch.full_like(ratios, -4.0)
    fraction = clip_fraction(ratios.log() - 4, old_logprobs, mask, clip_coef=0.2)
    assert_close(fraction, scalar(0.5, dtype))


def test_value_loss_against_a_loop(dtype):
    values, returns = ragged(2, dtype)
    expected = math.fsum((A[b][t] - B[b][t]) ** 2 / 2 for b, t in REAL) / len(REAL)
    assert_close(value_loss(values, returns, ragged_mask()), scalar(expected, dtype))


@pytest.mark.parametrize(
    ("value", "old_value", "target", "loss"),
    [
        (1.0, 0.0, 1.0, 0.32),  # clipped to 0.2, which is 0.8 off: 0.64 / 2
        (1.0, 0.0, -1.0, 2.0),  # the value itself is farther off: 4 / 2
        (-1.0, 0.0, -1.0, 0.32),  # clipped to -0.2
        (0.1, 0.0, 1.0, 0.405),  # inside the range: 0.81 / 2
    ],
)
def test_clipped_value_loss_golden(value, old_value, target, loss, dtype):
    tensors = [torch.tensor([[x]], dtype=dtype) for x in (value, old_value, target)]
    clipped = clipped_value_loss(*tensors, torch.tensor([[True]]), value_clip_coef=0.2)
    assert_close(clipped, scalar(loss, dtype))


def test_clipped_value_loss_against_a_loop(dtype):
    terms = []
    for b, t in REAL:
        value, old_value, target = A[b][t], B[b][t], C[b][t]
        bounded = min(max(value, old_value - 0.3), old_value + 0.3)
        terms.append(max((value - target) ** 2, (bounded - target) ** 2) / 2)
    clipped = clipped_value_loss(*ragged(3, dtype), ragged_mask(), value_clip_coef=0.3)
    assert_close(clipped, scalar(math.fsum(terms) / len(REAL), dtype))


def test_clipped_value_loss_with_a_wide_range_is_the_value_loss(dtype):
    values, old_values, returns = ragged(3, dtype)
    mask = ragged_mask()
    clipped = clipped_value_loss(values, old_values, returns, mask, value_clip_coef=100.0)
    assert_close(clipped, value_loss(values, returns, mask))


def test_reward_mse_golden(dtype):
    # (1 + 4 + 0.25) / 3
    pred = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)
    target = torch.tensor([2.0, 1.0, 0.0], dtype=dtype)
    assert_close(reward_mse(pred, target), scalar(1.75, dtype))


def test_pairwise_rank_loss_golden(dtype):
    # -log sigmoid of the margins 0, 1 and -2: log 2, log(1 + 1/e), log(1 + e^2).
    chosen = torch.tensor([3.0, 0.5, -1.0], dtype=dtype)
    rejected = torch.tensor([3.0, -0.5, 1.0], dtype=dtype)
    terms = [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(2))]
    assert_close(pairwise_rank_loss(chosen, rejected), scalar(sum(terms) / 3, dtype))


def test_pairwise_rank_loss_is_finite_at_any_margin(dtype):
    # Right by 2e4: 0 with no gradient. Wrong by 2e4: the margin itself, gradient -1 (of two).
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    loss = pairwise_rank_loss(chosen, rejected)
    loss.backward()
    assert_close(loss, scalar(1e4, dtype))
    assert chosen.grad.tolist() == [0.0, -0.5]
    assert rejected.grad.tolist() == [0.0, 0.5]


# Log-probs of whole answers: chosen and rejected, under the policy and under the reference.
PAIRS = [[-3.0, -8.0, -1.5], [-4.0, -2.0, -1.5], [-3.5, -7.0, -2.5], [-2.0, -2.5, -2.5]]


def pairs(dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor(x, dtype=dtype) for x in PAIRS]


def by_a_loop(kind: str, *, beta: float, label_smoothing: float = 0.0) -> float:
    total = 0.0
    for chosen, rejected, ref_chosen, ref_rejected in zip(*PAIRS, strict=True):
        h = (chosen - ref_chosen) - (rejected - ref_rejected)
        if kind == "ipo":
            total += (h - 1 / (2 * beta)) ** 2
        else:
            right, wrong = 1 / (1 + math.exp(-beta * h)), 1 / (1 + math.exp(beta * h))
            total -= (1 - label_smoothing) * math.log(right) + label_smoothing * math.log(wrong)
    return total / len(PAIRS[0])


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_preference_losses_are_those_of_a_loop(beta, dtype):
    assert_close(dpo_loss(*pairs(dtype), beta=beta), scalar(by_a_loop("dpo", beta=beta), dtype))
    assert_close(ipo_loss(*pairs(dtype), beta=beta), scalar(by_a_loop("ipo", beta=beta), dtype))
    for smoothing in (0.0, 0.25):
        options = {"beta": beta, "label_smoothing": smoothing}
        expected = scalar(by_a_loop("dpo", **options), dtype)
        assert_close(dpo_loss(*pairs(dtype), **options), expected)


def test_preference_losses_by_hand(dtype):
    # h = (-1 + 2) - (-5 + 3) = 3.
    pair = [torch.tensor([x], dtype=dtype) for x in (-1.0, -5.0, -2.0, -3.0)]
    assert_close(dpo_loss(*pair, beta=0.5), scalar(math.log1p(math.exp(-1.5)), dtype))
    assert_close(ipo_loss(*pair, beta=0.5), scalar((3 - 1) ** 2, dtype))
    # Labels that are wrong in a quarter of the cases: the loss is least at p = 3/4.
    losses = [
        dpo_loss(*(torch.tensor([x]) for x in (h, 0.0, 0.0, 0.0)), beta=1.0, label_smoothing=0.25)
        for h in (math.log(3) - 0.1, math.log(3), math.log(3) + 0.1)
    ]
    assert losses[1] < min(losses[0], losses[2])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_at_the_reference_the_loss_is_log_two(label_smoothing, dtype):
    chosen, rejected, *_ = pairs(dtype)
    loss = dpo_loss(chosen, rejected, chosen, rejected, beta=0.3, label_smoothing=label_smoothing)
    assert_close(loss, scalar(math.log(2), dtype))
    assert_close(ipo_loss(chosen, rejected, chosen, rejected, beta=0.25), scalar(4.0, dtype))


def test_dpo_loss_is_finite_at_any_margin(dtype):
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(2, dtype=dtype)
    loss = dpo_loss(chosen, zeros, zeros, zeros, beta=2.0)
    loss.backward()
    assert_close(loss, scalar(1e4, dtype))
    assert chosen.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("loss", [reward_mse, pairwise_rank_loss], ids=lambda f: f.__name__)
def test_losses_of_pairs_do_not_depend_on_the_order(loss, dtype):
    left = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=dtype)
    right = torch.tensor([1.5, 0.75, -2.0, 1.0], dtype=dtype)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(loss(left[order], right[order]), loss(left, right))
    # One pair weighs as much as each of two equal ones.
    assert_close(loss(left[:1].repeat(2), right[:1].repeat(2)), loss(left[:1], right[:1]))


@every_masked_loss
@pytest.mark.parametrize("garbage", [1e9, math.inf, -math.inf, math.nan])
def test_padding_reaches_neither_loss_nor_gradients(num_tensors, loss, garbage, dtype):
    mask = ragged_mask()
    clean = ragged(num_tensors, dtype)
    expected = loss_and_gradients(loss, clean, mask)
    for dirty_one in range(num_tensors):  # alone, and together with the others before it
        dirty = [
            x.masked_fill(~mask, garbage) if i <= dirty_one else x for i, x in enumerate(clean)
        ]
        alone = [
            x.masked_fill(~mask, garbage) if i == dirty_one else x for i, x in enumerate(clean)
        ]
        for tensors in (dirty, alone):
            actual = loss_and_gradients(loss, tensors, mask)
            for got, want in zip(actual, expected, strict=True):
                assert torch.equal(got, want)
                assert torch.isfinite(got).all()
            assert all((gradient[~mask] == 0).all() for gradient in actual[1:])


@every_masked_loss
def test_extra_padding_changes_nothing(num_tensors, loss, dtype):
    tensors, mask = ragged(num_tensors, dtype), ragged_mask()
    wide = [torch.nn.functional.pad(x, (0, 3), value=math.nan) for x in tensors]
    assert_close(loss(*wide, torch.nn.functional.pad(mask, (0, 3))), loss(*tensors, mask))


@every_masked_loss
def test_the_order_of_the_batch_does_not_matter(num_tensors, loss, dtype):
    tensors, mask = ragged(num_tensors, dtype), ragged_mask()
    order = torch.tensor([2, 0, 3, 1])
    assert_close(loss(*(x[order] for x in tensors), mask[order]), loss(*tensors, mask))


@every_masked_loss
def test_without_a_real_token_loss_and_gradients_are_zero(num_tensors, loss, dtype):
    mask = torch.zeros(4, 4, dtype=torch.bool)
    for result in loss_and_gradients(loss, ragged(num_tensors, dtype), mask):
        assert (result == 0).all()


# Not the clip fraction: it counts comparisons, in which a NaN is never outside the range.
@pytest.mark.parametrize("name", ["clipped_surrogate", "value_loss", "clipped_value_loss"])
def test_nan_at_a_real_token_is_not_hidden(name, dtype):
    num_tensors, loss = MASKED_LOSSES[name]
    for broken in range(num_tensors):
        tensors = ragged(num_tensors, dtype)
        tensors[broken][1, 1] = math.nan
        assert loss(*tensors, ragged_mask()).isnan()


@every_masked_loss
def test_a_batch_of_one(num_tensors, loss, dtype):
    # Row 1 has two real tokens: alone it gives what it gives without its padding.
    tensors = [x[1:2] for x in ragged(num_tensors, dtype)]
    unpadded = loss(*(x[:, :2] for x in tensors), torch.ones(1, 2, dtype=torch.bool))
    assert_close(loss(*tensors, ragged_mask()[1:2]), unpadded)


def test_gradcheck_away_from_the_kinks(generator):
    # log ratios of +-0.1 and +-0.5 at clip_coef 0.2: none within 0.08 of log 0.8 or log 1.2.
    log_ratio = torch.tensor([[0.1, -0.1, 0.5, -0.5], [0.5, -0.5, 0.1, -0.1]], dtype=torch.float64)
    old_logprobs = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    advantages = torch.tensor([[1.0, -2, 3, -1], [-1, 2, -1, 1]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    tensors = [old_logprobs + log_ratio, old_logprobs, advantages]
    tensors = [x.detach().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda *args: clipped_surrogate(*args, mask, clip_coef=0.2), tensors
    )
    assert torch.autograd.gradcheck(lambda *args: value_loss(*args, mask), tensors[:2])
    assert torch.autograd.gradcheck(
        lambda *args: clipped_value_loss(*args, mask, value_clip_coef=0.2), tensors
    )
    rows = [x[0].detach().requires_grad_() for x in tensors[:2]]
    assert torch.autograd.gradcheck(pairwise_rank_loss, rows)
    assert torch.autograd.gradcheck(reward_mse, rows)
    answers = [x.requires_grad_() for x in pairs(torch.float64)[:2]]
    references = pairs(torch.float64)[2:]
    assert torch.autograd.gradcheck(lambda *a: ipo_loss(*a, *references, beta=0.2), answers)
    assert torch.autograd.gradcheck(
        lambda *a: dpo_loss(*a, *references, beta=0.2, label_smoothing=0.1), answers
    )


AGGREGATIONS = {
    # The weight of each of the 7 real tokens, in 4 rows of 4 positions with 4, 2, 1 and none.
    "token_mean": [1 / 7] * 7,
    "sequence_mean": [1 / 16] * 4 + [1 / 8] * 2 + [1 / 4],
    "constant": [1 / 16] * 7,
}


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("aggregation", "weights"), AGGREGATIONS.items())
def test_aggregations_weight_the_tokens(aggregation, weights, dtype):
    logprobs, old_logprobs, advantages = ragged(3, dtype)
    mask = ragged_mask()
    ratios = [math.exp(A[b][t] - B[b][t]) for b, t in REAL]
    terms = [
        min(ratio * C[b][t], min(max(ratio, 0.8), 1.28) * C[b][t])
        for ratio, (b, t) in zip(ratios, REAL, strict=True)
    ]
    found = clipped_surrogate(
        logprobs, old_logprobs, advantages, mask,
        clip_coef=0.2, clip_coef_high=0.28, aggregation=aggregation,
    )  # fmt: skip
    assert_close(found, scalar(dot(weights, terms), dtype))
    outside = [not 0.8 <= ratio <= 1.28 for ratio in ratios]
    fraction = clip_fraction(
        logprobs, old_logprobs, mask, clip_coef=0.2, clip_coef_high=0.28, aggregation=aggregation
    )
    assert_close(fraction, scalar(dot(weights, outside), dtype))
    squares = [(A[b][t] - B[b][t]) ** 2 / 2 for b, t in REAL]
    found = value_loss(logprobs, old_logprobs, mask, aggregation=aggregation)
    assert_close(found, scalar(dot(weights, squares), dtype))
    found = clipped_value_loss(
        logprobs, advantages, old_logprobs, mask, value_clip_coef=99.0, aggregation=aggregation
    )
    assert_close(found, scalar(dot(weights, squares), dtype))


def test_the_upper_limit_of_the_ratio_is_its_own(dtype):
    ratios = torch.tensor([[0.79, 0.81, 1.25, 1.29]], dtype=dtype)
    logprobs, mask = ratios.log(), torch.ones(1, 4, dtype=torch.bool)
    for high, fraction in ((None, 0.75), (0.28, 0.5), (0.5, 0.25)):
        found = clip_fraction(
            logprobs, torch.zeros_like(ratios), mask, clip_coef=0.2, clip_coef_high=high
        )
        assert found == fraction


@pytest.mark.parametrize("dual_clip_coef", [1.1, 3.0])
def test_dual_clip_against_a_loop(dual_clip_coef, dtype):
    total = 0.0
    for b, t in REAL:
        ratio = math.exp(A[b][t] - B[b][t])
        term = min(ratio * C[b][t], min(max(ratio, 0.8), 1.2) * C[b][t])
        total += max(term, dual_clip_coef * C[b][t]) if C[b][t] < 0 else term
    found = clipped_surrogate(
        *ragged(3, dtype), ragged_mask(), clip_coef=0.2, dual_clip_coef=dual_clip_coef
    )
    assert_close(found, scalar(total / 7, dtype))


@pytest.mark.parametrize("importance_cap", [None, 1.1])
def test_policy_gradient_against_a_loop(importance_cap, dtype):
    weights = {
        (b, t): 1.0 if importance_cap is None else min(math.exp(A[b][t] - B[b][t]), importance_cap)
        for b, t in REAL
    }
    total = math.fsum(weights[b, t] * A[b][t] * C[b][t] for b, t in REAL)
    logprobs, old_logprobs, advantages = ragged(3, dtype)
    logprobs.requires_grad_()
    found = policy_gradient(
        logprobs, old_logprobs, advantages, ragged_mask(), importance_cap=importance_cap
    )
    assert_close(found, scalar(total / 7, dtype))
    found.backward()
    # The cap is a weight: no gradient goes through the ratio.
    expected = [
        [weights[b, t] * C[b][t] / 7 if (b, t) in REAL else 0.0 for t in range(4)] for b in range(4)
    ]
    assert_close(logprobs.grad, torch.tensor(expected, dtype=dtype))


def test_the_sequence_ratio_is_the_geometric_mean_of_its_tokens(dtype):
    logprobs, old_logprobs, _ = ragged(3, dtype)
    found = sequence_log_ratio(logprobs, old_logprobs, ragged_mask()).exp()
    expected = [
        math.prod(math.exp(A[b][t] - B[b][t]) for t in range(n)) ** (1 / n) if n else 1.0
        for b, n in enumerate(LENGTHS)
    ]
    assert_close(found.squeeze(1), torch.tensor(expected, dtype=dtype))


def test_at_ratio_one_all_objectives_have_the_gradient_of_reinforce(dtype):
    logprobs, _, advantages = ragged(3, dtype)
    mask, old_logprobs = ragged_mask(), logprobs.clone()
    advantages = advantages[:, :1].expand(4, 4)  # one a completion, as groups give
    gradients = []
    for objective in ("clip", "sequence", "gradient"):
        new = logprobs.clone().requires_grad_()
        if objective == "gradient":
            value = policy_gradient(
                new, old_logprobs, advantages, mask, aggregation="sequence_mean"
            )
        else:
            ratios = new, old_logprobs
            if objective == "sequence":
                of_tokens = sequence_log_ratio(new, old_logprobs, mask).expand(4, 4)
                ratios = of_tokens, torch.zeros_like(of_tokens)
            value = clipped_surrogate(
                *ratios, advantages, mask, clip_coef=0.2, aggregation="sequence_mean"
            )
        gradients += torch.autograd.grad(value, new)
    assert gradients[0].abs().max() > 0.1
    assert_close(gradients[1], gradients[0])
    assert_close(gradients[2], gradients[0])
