"""Two distributions compared, against the equations for one thing at a time."""

import math

import torch

from rlhf_exp.functional.comparison import compare
from rlhf_exp.functional.logprobs import entropy, kl_divergence, token_logprobs


def draw() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logits, base = (3 * torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    tokens = torch.randint(5, (2, 3), generator=generator)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return logits, base, tokens, mask


def test_each_quantity_is_its_equation() -> None:
    logits, base, tokens, mask = draw()
    result = compare(logits, base, tokens, mask)
    expected = {
        "kl": kl_divergence(logits, base), "reverse_kl": kl_divergence(base, logits),
        "entropy": entropy(logits), "base_entropy": entropy(base),
        "surprise": -token_logprobs(logits, tokens),
        "base_surprise": -token_logprobs(base, tokens),
    }  # fmt: skip
    for name, values in expected.items():
        torch.testing.assert_close(getattr(result, name), values * mask, rtol=1e-5, atol=1e-6)


def test_terms_and_rises_sum_over_real_positions() -> None:
    logits, base, tokens, mask = draw()
    result = compare(logits, base, tokens, mask)
    p, q = logits.double().softmax(-1), base.double().softmax(-1)
    for token in range(5):
        real = [(0, 0), (0, 1), (0, 2), (1, 0)]
        term = sum(p[i, t, token] * math.log(p[i, t, token] / q[i, t, token]) for i, t in real)
        assert math.isclose(result.kl_terms[token], term, abs_tol=1e-5)
        assert math.isclose(result.probs[token], sum(p[i, t, token] for i, t in real), rel_tol=1e-5)
        last = p[1, 0, token] - q[1, 0, token]
        assert math.isclose(result.rise[1, token], last, abs_tol=1e-6)
    torch.testing.assert_close(result.kl_terms.sum(), result.kl.sum())
    torch.testing.assert_close(result.rise.sum(0), result.probs - result.base_probs)


def test_padding_changes_nothing() -> None:
    logits, base, tokens, mask = draw()
    dirty = torch.where(mask[..., None], logits, torch.nan)
    for clean, other in zip(
        compare(logits, base, tokens, mask), compare(dirty, base, tokens, mask), strict=True
    ):
        assert torch.equal(clean, other)


def test_impossible_tokens_contribute_nothing() -> None:
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]]])
    base = torch.tensor([[[0.5, 0.0, -torch.inf]]])
    tokens, mask = torch.tensor([[1]]), torch.tensor([[True]])
    full = compare(logits, base, tokens, mask)
    assert full.kl_terms[2] == 0
    two = compare(logits[..., :2], base[..., :2], tokens, mask)
    torch.testing.assert_close(full.kl, two.kl)
    torch.testing.assert_close(full.base_entropy, two.base_entropy)
