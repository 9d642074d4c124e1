import inspect
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_exp.functional.logprobs import (
    completion_logits,
    entropy,
    kl_divergence,
    kl_estimate,
    logits_agree,
    token_logprobs,
)

INF = math.inf
# Two rows of three positions over a vocabulary of four, and the same for a reference.
LOGITS = [
    [[0.5, -1.0, 2.0, 0.0], [3.0, 3.0, -2.0, 1.0], [-0.5, 0.25, 0.0, 4.0]],
    [[1.0, 1.0, 1.0, 1.0], [0.0, -3.0, 5.0, 2.0], [2.5, 0.0, -1.5, 0.5]],
]
REF_LOGITS = [
    [[1.5, 0.0, 0.5, -2.0], [0.0, 1.0, 0.5, 0.25], [2.0, 0.25, 1.0, 1.0]],
    [[0.0, 2.0, -1.0, 1.0], [0.0, -3.0, 5.0, 2.0], [-1.0, 0.75, 3.5, 0.0]],
]
TOKENS = [[2, 0, 3], [1, 1, 2]]


def loop_log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    log_total = math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - top - log_total for x in row]


def loop_kl(row: list[float], ref_row: list[float]) -> float:
    pairs = zip(loop_log_softmax(row), loop_log_softmax(ref_row), strict=True)
    return math.fsum(math.exp(p) * (p - q) for p, q in pairs)


def logits_of(probs: list[float], dtype: torch.dtype) -> Tensor:
    """Logits [1 1 vocab] of given probabilities, off by a constant that softmax removes."""
    return torch.tensor([[[math.log(p) + 3.0 for p in probs]]], dtype=dtype)


def test_completion_logits_are_those_that_predict_the_completion():
    tokens = torch.tensor([[3, 1, 4, 1, 5, 2], [2, 6, 5, 3, 0, 4]])
    # The logits at position p - 1 point at the token at p; the last ones at token 7, in no row.
    target = torch.cat([tokens[:, 1:], torch.full((2, 1), 7)], dim=1)
    logits = torch.nn.functional.one_hot(target, 8).double()
    for prompt_len in range(1, 7):
        predicted = completion_logits(logits, prompt_len).argmax(dim=-1)
        assert predicted.tolist() == tokens[:, prompt_len:].tolist()


def test_completion_logits_cut_values_as_well():
    values = torch.tensor([[[10.0], [11.0], [12.0], [13.0]]])
    assert completion_logits(values, 2).tolist() == [[[11.0], [12.0]]]


@pytest.mark.parametrize("prompt_len", [-1, 0, 5])
def test_completion_logits_refuse_a_prompt_outside_the_sequence(prompt_len):
    with pytest.raises(ValueError, match=rf"prompt_len={prompt_len} must be in 1 \.\. 4"):
        completion_logits(torch.zeros(1, 4, 3), prompt_len)


def test_token_logprobs_against_a_loop(dtype):
    expected = [
        [loop_log_softmax(row)[token] for row, token in zip(rows, tokens, strict=True)]
        for rows, tokens in zip(LOGITS, TOKENS, strict=True)
    ]
    logprobs = token_logprobs(torch.tensor(LOGITS, dtype=dtype), torch.tensor(TOKENS))
    assert_close(logprobs, torch.tensor(expected, dtype=dtype))


def test_token_logprobs_against_gather(dtype, generator):
    logits = torch.randn(3, 5, 11, dtype=dtype, generator=generator)
    tokens = torch.randint(11, (3, 5), generator=generator)
    normalised = logits - logits.logsumexp(dim=-1, keepdim=True)
    expected = normalised.gather(-1, tokens[..., None])[..., 0]
    assert_close(token_logprobs(logits, tokens), expected)


def test_token_probabilities_sum_to_one(dtype):
    logits = torch.tensor(LOGITS, dtype=dtype)
    total = sum(token_logprobs(logits, torch.full((2, 3), v)).exp() for v in range(4))
    assert_close(total, torch.ones(2, 3, dtype=dtype))


def test_entropy_golden(dtype):
    # Uniform over V tokens: log V. (1/2, 1/4, 1/4): 1/2 log 2 + 2 1/4 log 4 = 3/2 log 2.
    for vocab in (1, 2, 50):
        uniform = torch.full((1, 1, vocab), -7.0, dtype=dtype)
        assert_close(entropy(uniform), torch.tensor([[math.log(vocab)]], dtype=dtype))
    skewed = logits_of([0.5, 0.25, 0.25], dtype)
    assert_close(entropy(skewed), torch.tensor([[1.5 * math.log(2)]], dtype=dtype))


def test_entropy_against_a_loop(dtype):
    expected = [
        [-math.fsum(math.exp(p) * p for p in loop_log_softmax(row)) for row in rows]
        for rows in LOGITS
    ]
    value = entropy(torch.tensor(LOGITS, dtype=dtype))
    assert_close(value, torch.tensor(expected, dtype=dtype))


def test_kl_divergence_goldens_of_trl(dtype):
    # TRL v0.11.4 tests/test_ppo_trainer.py, kl_penalty="full". Both pairs are permutations of each
    # other, so D(p || q) = D(q || p): they say nothing about the direction.
    near, far = logits_of([0.98, 0.01, 0.01], dtype), logits_of([0.01, 0.01, 0.98], dtype)
    edges, middle = logits_of([0.49, 0.02, 0.49], dtype), logits_of([0.01, 0.98, 0.01], dtype)
    for logits, ref_logits, quoted in ((near, far, 4.4474), (edges, middle, 3.7361)):
        expected = torch.tensor([[quoted]], dtype=dtype)
        assert_close(kl_divergence(logits, ref_logits), expected, atol=6e-5, rtol=0)
        assert_close(kl_divergence(ref_logits, logits), expected, atol=6e-5, rtol=0)


def test_kl_divergence_is_of_the_policy_from_the_reference(dtype):
    # D((1/2, 1/2) || (9/10, 1/10)) = log(1/2) - (log 9/10 + log 1/10) / 2 = log(5/3); the other
    # direction is 9/10 log 9/5 + 1/10 log 1/5 = 0.3681.
    policy, reference = logits_of([0.5, 0.5], dtype), logits_of([0.9, 0.1], dtype)
    expected = torch.tensor([[math.log(5 / 3)]], dtype=dtype)
    assert_close(kl_divergence(policy, reference), expected)
    reverse = torch.tensor([[0.9 * math.log(1.8) + 0.1 * math.log(0.2)]], dtype=dtype)
    assert_close(kl_divergence(reference, policy), reverse)


def test_kl_divergence_against_a_loop(dtype):
    expected = [
        [loop_kl(row, ref_row) for row, ref_row in zip(rows, ref_rows, strict=True)]
        for rows, ref_rows in zip(LOGITS, REF_LOGITS, strict=True)
    ]
    value = kl_divergence(torch.tensor(LOGITS, dtype=dtype), torch.tensor(REF_LOGITS, dtype=dtype))
    assert_close(value, torch.tensor(expected, dtype=dtype))


def test_kl_divergence_of_equal_distributions_is_zero(dtype):
    logits = torch.tensor(LOGITS, dtype=dtype)
    assert torch.equal(kl_divergence(logits, logits.clone()), torch.zeros(2, 3, dtype=dtype))
    shifted = kl_divergence(logits, logits + 5)
    assert_close(shifted, torch.zeros(2, 3, dtype=dtype))


def test_kl_divergence_is_never_negative(generator):
    # Float64: the sum of 11 terms rounds by less than 1e-15.
    for scale in (0.01, 1.0, 10.0):
        logits, ref_logits = scale * torch.randn(
            2, 50, 20, 11, dtype=torch.float64, generator=generator
        )
        assert kl_divergence(logits, ref_logits).min() > -1e-15


def test_kl_divergence_is_infinite_where_the_reference_cannot_follow(dtype):
    logits = torch.tensor([[[0.0, 0.0]]], dtype=dtype)
    ref_logits = torch.tensor([[[0.0, -INF]]], dtype=dtype)
    assert kl_divergence(logits, ref_logits).item() == INF
    # The other way round only the first token counts: 1 (log 1 - log 1/2).
    assert_close(kl_divergence(ref_logits, logits), torch.tensor([[math.log(2)]], dtype=dtype))


# (policy, reference, D(policy || reference), entropy of the policy), worked by hand.
EXTREMES = {
    "spread of 2e4": ([1e4, -1e4, -1e4], [0.0, 0.0, 0.0], math.log(3), 0.0),
    "large and equal": ([1e4, 1e4, -1e4], [-1e4, -1e4, -1e4], math.log(1.5), math.log(2)),
    "far apart": ([1e4, -1e4, -1e4], [-1e4, 1e4, -1e4], 2e4, 0.0),
    "policy filtered": ([0.0, 0.0, -INF], [0.0, 0.0, 0.0], math.log(1.5), math.log(2)),
    "both filtered": ([0.0, 0.0, -INF], [0.0, 0.0, -INF], 0.0, math.log(2)),
    # exp(-2e4) is 0 while its logarithm is finite: 0 times an infinite ratio.
    "underflow where filtered": ([1e4, 1e4, -1e4], [0.0, 0.0, -INF], 0.0, math.log(2)),
}


@pytest.mark.parametrize(
    ("policy", "reference", "kl", "policy_entropy"), EXTREMES.values(), ids=EXTREMES.keys()
)
def test_extreme_logits_stay_finite(policy, reference, kl, policy_entropy, dtype):
    logits = torch.tensor([[policy]], dtype=dtype, requires_grad=True)
    ref_logits = torch.tensor([[reference]], dtype=dtype, requires_grad=True)
    logprob = token_logprobs(logits, torch.tensor([[0]]))
    values = (kl_divergence(logits, ref_logits), entropy(logits), logprob)
    for value, expected in zip(values, (kl, policy_entropy, -policy_entropy), strict=True):
        # The first token's probability is 1 or 1/2, so its log is minus the entropy.
        assert_close(value, torch.tensor([[expected]], dtype=dtype))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert torch.isfinite(gradient).all()
    (ref_gradient,) = torch.autograd.grad(kl_divergence(logits, ref_logits).sum(), ref_logits)
    assert torch.isfinite(ref_gradient).all()


def test_nan_logits_are_not_hidden(dtype):
    logits = torch.tensor([[[0.0, 1.0], [math.nan, 1.0]]], dtype=dtype)
    ref_logits = torch.zeros(1, 2, 2, dtype=dtype)
    for value in (
        kl_divergence(logits, ref_logits),
        kl_divergence(ref_logits, logits),
        entropy(logits),
        token_logprobs(logits, torch.tensor([[1, 1]])),
    ):
        assert value.isnan().tolist() == [[False, True]]


def test_permuting_the_batch_permutes_the_output(dtype):
    logits, ref_logits = (torch.tensor(x, dtype=dtype) for x in (LOGITS, REF_LOGITS))
    tokens = torch.tensor(TOKENS)
    for function, other in (
        (token_logprobs, tokens),
        (kl_divergence, ref_logits),
        (lambda x, _: entropy(x), tokens),
    ):
        assert_close(function(logits.flip(0), other.flip(0)), function(logits, other).flip(0))
        # A batch of one, too.
        assert_close(function(logits[1:], other[1:]), function(logits, other)[1:])


def test_gradcheck(generator):
    logits, ref_logits = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=generator)
    tokens = torch.randint(5, (2, 3), generator=generator)
    logits, ref_logits = logits.requires_grad_(), ref_logits.requires_grad_()
    assert torch.autograd.gradcheck(kl_divergence, (logits, ref_logits))
    assert torch.autograd.gradcheck(entropy, (logits,))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens), (logits,))


def test_kl_estimate_goldens_of_trl(dtype):
    # TRL v0.11.4 tests/test_ppo_trainer.py: kl_penalty="kl" is k1, "mse" is k2.
    logprobs = torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.2, 0.1]], dtype=dtype)
    ref_logprobs = torch.tensor([[0.4, 0.3, 0.0], [0.7, 0.1, 0.3]], dtype=dtype)
    k1 = torch.tensor([[0.1, -0.1, 0.1], [-0.1, 0.1, -0.2]], dtype=dtype)
    k2 = torch.tensor([[0.005, 0.005, 0.005], [0.005, 0.005, 0.02]], dtype=dtype)
    assert_close(kl_estimate(logprobs, ref_logprobs, "k1"), k1)
    assert_close(kl_estimate(logprobs, ref_logprobs, "k2"), k2)


def test_k3_golden(dtype):
    # q/p - 1 - log(q/p): log 2 - 1/2 for q = p/2, 1 - log 2 for q = 2p.
    logprobs = torch.tensor([[math.log(0.5), math.log(0.25), -1.0]], dtype=dtype)
    ref_logprobs = torch.tensor([[math.log(0.25), math.log(0.5), -1.0]], dtype=dtype)
    expected = torch.tensor([[math.log(2) - 0.5, 1 - math.log(2), 0.0]], dtype=dtype)
    assert_close(kl_estimate(logprobs, ref_logprobs, "k3"), expected)


def test_k3_is_never_negative_not_even_by_rounding(dtype):
    # exp(-d) - 1 + d as written comes out at -6e-8 in float32.
    size = torch.logspace(-10, 1, 20001, dtype=dtype)
    difference = torch.cat([size, -size])[None]
    estimate = kl_estimate(difference, torch.zeros_like(difference), "k3")
    assert estimate.min() >= 0
    # d^2 / 2 - d^3 / 6 to within 1e-7 relative at d = 1e-3.
    small = torch.tensor([[1e-3]], dtype=torch.float64)
    expected = torch.tensor([[0.5e-6 - 1e-9 / 6]], dtype=torch.float64)
    value = kl_estimate(small, torch.zeros_like(small), "k3")
    assert_close(value, expected, rtol=1e-6, atol=0)


def test_k1_and_k3_are_unbiased():
    # Samples of the policy over three tokens; D is 0.37 this way round and 0.42 the other.
    policy, reference = [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]
    exact = math.fsum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    num_samples = 200_000
    sampled = torch.multinomial(
        torch.tensor(policy, dtype=torch.float64),
        num_samples,
        replacement=True,
        generator=torch.Generator().manual_seed(1),
    )
    logprobs = torch.tensor(policy, dtype=torch.float64).log()[sampled][None]
    ref_logprobs = torch.tensor(reference, dtype=torch.float64).log()[sampled][None]
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(logprobs, ref_logprobs, estimator)
        standard_error = estimates.std().item() / math.sqrt(num_samples)
        assert standard_error < 0.002  # four of them still tell the two directions apart
        assert abs(estimates.mean().item() - exact) < 4 * standard_error
        assert (estimates < 0).any() == (estimator == "k1")


def test_an_unknown_estimator_is_refused():
    # Unwrapped, because under test beartype refuses the Literal before the function can.
    with pytest.raises(ValueError, match="estimator='k4' must be one of k1, k2, k3"):
        inspect.unwrap(kl_estimate)(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def test_logits_agree_if_each_row_does_up_to_a_constant():
    expected = torch.tensor(LOGITS)
    shifts = torch.tensor([[[1.0], [-50.0], [0.0]], [[9.0], [100.0], [-3.0]]])
    assert logits_agree(expected + shifts, expected, dtype=torch.float32)
    one_differs = expected.clone()
    one_differs[1, 2, 0] += 0.1
    assert not logits_agree(one_differs, expected, dtype=torch.float32)
    assert logits_agree(one_differs, expected, dtype=torch.bfloat16)  # 0.03 of the row's norm
