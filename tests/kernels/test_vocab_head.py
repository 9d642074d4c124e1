"""Statistics from hidden states, held against the textbook's, which form all logits."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_exp.functional.logprobs import entropy, kl_divergence, token_logprobs
from rlhf_exp.kernels import vocab_head
from rlhf_exp.kernels.vocab_head import (
    Head,
    head_logits,
    head_logprobs,
    low_precision,
    rollout_statistics,
    token_statistics,
    unembed,
)
from tests.builders import assert_near


@pytest.fixture(params=["several tiles", "several tiles, kept", "one tile"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens a tile, the last one shorter, whose logits are computed again or kept; or the
    defaults: small vocabularies as a whole."""
    if request.param == "several tiles":
        monkeypatch.setattr(vocab_head, "KEPT", 0)
    if request.param != "one tile":
        monkeypatch.setattr(vocab_head, "CPU_TILE", 1)
        monkeypatch.setattr(vocab_head, "NARROWEST_TILE", 7)


class Case(NamedTuple):
    hidden: Tensor
    head: Head
    tokens: Tensor
    ref_hidden: Tensor
    ref_head: Head

    def statistics(self, temperature: float = 1.0) -> tuple[Tensor, ...]:
        return tuple(token_statistics(*self, temperature=temperature))

    def leaves(self) -> list[Tensor]:
        own = (self.hidden, self.head.weight, self.head.bias)
        return [x for x in own if x is not None and x.requires_grad]


def case(
    *, axes: tuple[int, ...] = (3, 4), d_model: int = 6, vocab: int = 50, bias: bool = True,
    level: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Case:  # fmt: skip
    """A policy and a reference some way off; logits of standard deviation 2 around `level`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, offset = randn(*axes, d_model), randn(vocab, d_model), randn(vocab)
    hidden[..., 0] = 4
    weight[:, 0] += level / 4
    weight[:, 1:] *= 2 / math.sqrt(d_model)
    ref_hidden = hidden + 0.3 * randn(*axes, d_model)
    ref_weight = weight + 0.1 * randn(*weight.shape)
    ref_hidden[..., 0] = 4
    ref_offset = offset + 0.2 * randn(vocab)

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    return Case(
        leaf(hidden),
        Head(leaf(weight), leaf(offset) if bias else None),
        torch.randint(0, vocab, axes, generator=generator),
        ref_hidden.to(dtype),
        Head(ref_weight.to(dtype), ref_offset.to(dtype) if bias else None),
    )


def logits_of(hidden: Tensor, head: Head, *, temperature: float) -> Tensor:
    logits = hidden @ head.weight.T
    logits = head.scale * (logits if head.bias is None else logits + head.bias)
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return logits / temperature


def textbook(of: Case, *, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, KL and the reference's log-probs in float64, of [rows, 1, vocab]."""
    rows = of.hidden.double().flatten(0, -2)[:, None]
    ref_rows = of.ref_hidden.double().flatten(0, -2)[:, None]
    head, ref_head = (
        h._replace(weight=h.weight.double(), bias=None if h.bias is None else h.bias.double())
        for h in (of.head, of.ref_head)
    )
    logits = logits_of(rows, head, temperature=temperature)
    ref_logits = logits_of(ref_rows, ref_head, temperature=temperature)
    tokens = of.tokens.flatten()[:, None]
    columns = (
        token_logprobs(logits, tokens), entropy(logits), kl_divergence(logits, ref_logits),
        token_logprobs(ref_logits, tokens),
    )  # fmt: skip
    return tuple(column.view(of.tokens.shape) for column in columns)


BY = (1.0, 0.7, -1.3)


def loss(columns: tuple[Tensor, ...], *, by: tuple[float, ...] = BY) -> Tensor:
    """A sum in which every position and every statistic has a weight of its own."""
    places = torch.linspace(0.5, 1.5, columns[0].numel(), dtype=torch.float64)
    terms = zip(by, columns[:3], strict=True)
    return sum(w * (places.view(c.shape) ** (i + 1) * c).sum() for i, (w, c) in enumerate(terms))


def assert_textbook(of: Case, *, temperature: float = 1.0, by: tuple[float, ...] = BY) -> None:
    """Equal to 2e-4, the bound in fp32, and the gradients to 2e-4 of their largest entry."""
    ours, expected = of.statistics(temperature), textbook(of, temperature=temperature)
    for column, wanted in zip(ours, expected[:3], strict=True):
        assert column.shape == of.tokens.shape
        assert column.dtype == of.hidden.dtype
        assert (column - wanted).abs().max() < 2e-4
    seen = torch.autograd.grad(loss(ours, by=by), of.leaves())
    wanted = torch.autograd.grad(loss(expected, by=by), of.leaves())
    for gradient, other in zip(seen, wanted, strict=True):
        assert other.abs().max() > 0
        assert (gradient - other).abs().max() <= 2e-4 * other.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.8])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_textbook_form(bias: bool, temperature: float, tiles: None) -> None:
    assert_textbook(case(bias=bias), temperature=temperature)


def test_log_probs_without_a_reference_are_the_textbooks(tiles: None) -> None:
    of = case()
    ours = head_logprobs(of.hidden, of.head, of.tokens)
    expected = textbook(of, temperature=1.0)[0]
    assert (ours - expected).abs().max() < 2e-4
    seen = torch.autograd.grad(loss((ours,), by=(1.0,)), of.leaves())
    wanted = torch.autograd.grad(loss((expected,), by=(1.0,)), of.leaves())
    for gradient, other in zip(seen, wanted, strict=True):
        assert (gradient - other).abs().max() <= 2e-4 * other.abs().max()


@pytest.mark.parametrize("by", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_each_statistic_has_its_own_gradient(by: tuple[float, ...], tiles: None) -> None:
    assert_textbook(case(seed=1), temperature=0.8, by=by)


def test_tiles_as_they_are_by_default() -> None:
    # 300 positions of 5,000 tokens are five tiles of 1024 or fewer.
    assert_textbook(case(axes=(300,), d_model=8, vocab=5000))


def test_logits_as_large_as_gpt2s(tiles: None) -> None:
    # GPT-2's are around -100, where fp32 has steps of 1e-5 and bf16 of one half.
    for vocab in (50, 700):
        assert_textbook(case(level=-100, vocab=vocab, d_model=16), temperature=0.9)


@pytest.mark.parametrize("shape", ["rising", "falling", "peak", "valley"])
def test_the_largest_logit_may_be_in_any_tile(shape: str, tiles: None) -> None:
    # Bias of a range that exp cannot hold: in most tiles all probabilities underflow.
    of = case(vocab=40)
    ramp = torch.linspace(-150, 150, 40)
    bias = {"rising": ramp, "falling": -ramp, "peak": -ramp.abs(), "valley": ramp.abs()}[shape]
    with torch.no_grad():
        of.head.bias.copy_(bias)
        of.ref_head.bias.copy_(bias.roll(2))
    tokens = {"rising": 39, "falling": 0, "peak": 20, "valley": 39}[shape]
    of = of._replace(tokens=torch.full_like(of.tokens, tokens))
    assert_textbook(of, temperature=2.0)


def test_gradients_in_float64(tiles: None) -> None:
    of = case(axes=(2, 2), d_model=3, vocab=17, dtype=torch.float64)

    def statistics(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return of._replace(hidden=hidden, head=Head(weight, bias)).statistics(0.7)

    assert torch.autograd.gradcheck(statistics, of.leaves())
    # And float64 stays float64.
    for ours, expected in zip(of.statistics(0.7), textbook(of, temperature=0.7), strict=False):
        assert_close(ours, expected, rtol=0, atol=1e-12)


SCALE_AND_CAP = [(0.125, None), (6.0, None), (1.0, 3.0), (0.125, 0.5), (6.0, 30.0)]


@pytest.mark.parametrize(("scale", "cap"), SCALE_AND_CAP)
@pytest.mark.parametrize("bias", [True, False])
def test_a_scale_and_a_soft_cap_in_float64(
    scale: float, cap: float | None, bias: bool, tiles: None
) -> None:
    of = case(axes=(2, 2), d_model=3, vocab=17, bias=bias, dtype=torch.float64)
    # A reference of another shape, so that neither is taken for the other.
    ref_head = of.ref_head._replace(scale=0.5, cap=4.0)
    of = of._replace(head=of.head._replace(scale=scale, cap=cap), ref_head=ref_head)
    expected = textbook(of, temperature=0.7)
    for ours, wanted in zip(of.statistics(0.7), expected, strict=False):
        assert_close(ours, wanted, rtol=0, atol=1e-12)
    ref_logprobs = rollout_statistics(*of, temperature=0.7).ref_logprobs
    assert_close(ref_logprobs, expected[3], rtol=0, atol=1e-12)
    for by in (BY, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        seen = torch.autograd.grad(loss(of.statistics(0.7), by=by), of.leaves())
        wanted = torch.autograd.grad(loss(textbook(of, temperature=0.7), by=by), of.leaves())
        for gradient, other in zip(seen, wanted, strict=True):
            assert other.abs().max() > 1e-4
            assert_close(gradient, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), *SCALE_AND_CAP])
def test_a_scale_and_a_soft_cap_in_whole_logits(scale: float, cap: float | None) -> None:
    of = case(dtype=torch.float64)
    head = of.head._replace(scale=scale, cap=cap)
    expected = logits_of(of.hidden, head, temperature=1.0)
    assert_close(head_logits(of.hidden, head), expected.detach(), rtol=0, atol=1e-12)
    logits = unembed(of.hidden, head)
    assert_close(logits, expected, rtol=0, atol=1e-12)
    seen, wanted = (torch.autograd.grad(x.square().sum(), of.leaves()) for x in (logits, expected))
    for gradient, other in zip(seen, wanted, strict=True):
        assert_close(gradient, other, rtol=1e-9, atol=1e-9)


def test_whole_logits_are_not_rounded_under_autocast() -> None:
    of = case(level=-100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = unembed(of.hidden, of.head)
    assert torch.equal(logits, of.hidden @ of.head.weight.T + of.head.bias)


def test_a_backward_pass_can_be_repeated(tiles: None) -> None:
    of = case()
    total = loss(of.statistics(0.8))
    first, second = (torch.autograd.grad(total, of.leaves(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen: str, tiles: None) -> None:
    of = case()
    expected = torch.autograd.grad(loss(of.statistics()), of.leaves())
    leaves = {"hidden": of.hidden, "weight": of.head.weight, "bias": of.head.bias}
    leaves[frozen].requires_grad_(False)
    loss(of.statistics()).backward()
    for (name, leaf), gradient in zip(leaves.items(), expected, strict=True):
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, gradient)


def test_a_sink_takes_the_gradient_of_the_weights(tiles: None) -> None:
    of = case()
    expected = torch.autograd.grad(loss(of.statistics(0.8)), of.leaves())
    sink = torch.ones_like(of.head.weight)
    with_sink = of._replace(head=of.head._replace(gradient=sink))
    for times in (1, 2):  # it is added to what is there, as autograd does
        loss(with_sink.statistics(0.8)).backward()
        assert_close(sink, 1 + times * expected[1], rtol=1e-5, atol=1e-5)
    assert of.head.weight.grad is None
    assert_close(of.hidden.grad, 2 * expected[0])
    assert_close(of.head.bias.grad, 2 * expected[2])


def test_tied_weights_get_the_gradient_of_both_uses(tiles: None) -> None:
    of = case(bias=False)
    embedding = nn.Embedding.from_pretrained(of.head.weight.detach().clone(), freeze=False)
    weight, read = embedding.weight, torch.randint(0, 50, of.tokens.shape)

    def tied(head: Head) -> Tensor:
        return loss(of._replace(hidden=embedding(read).tanh(), head=head).statistics())

    (expected,) = torch.autograd.grad(tied(Head(weight)), weight)
    (above,) = torch.autograd.grad(tied(Head(weight.detach())), weight)
    assert above.abs().max() > 0.1
    weight.grad = torch.zeros_like(weight)
    sink = weight.grad
    embedding.sparse = True
    tied(Head(weight, None, sink)).backward()
    assert weight.grad is sink
    assert_close(sink, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [0.0, -100.0])
def test_a_policy_is_at_no_distance_from_itself(level: float, tiles: None) -> None:
    of = case(level=level, vocab=300, d_model=16)
    twin = of._replace(
        ref_hidden=of.hidden.detach(), ref_head=Head(*map(Tensor.detach, of.head[:2]))
    )
    _, entropies, kl = twin.statistics(0.9)
    assert entropies.max() > 1
    assert kl.abs().max() < 1e-6
    gradients = torch.autograd.grad(loss(twin.statistics(0.9), by=(0.0, 0.0, 1.0)), of.leaves())
    # Of terms of order 1 that cancel; around -100 each logit is rounded by up to 4e-6.
    assert max(gradient.abs().max() for gradient in gradients) < 2e-5


def test_a_small_distance_is_not_rounded_away(tiles: None) -> None:
    # KL of 1e-5 between logits of 100, where fp32 has steps of 8e-6.
    of = case(axes=(64,), level=-100, vocab=300, d_model=16)
    hidden = of.hidden.detach()
    near = of._replace(ref_hidden=hidden + 0.01 * (of.ref_hidden - hidden), ref_head=of.head)
    expected = textbook(near, temperature=1.0)[2].detach()
    assert expected.mean().item() == pytest.approx(1.1e-5, rel=0.1)
    assert (near.statistics()[2] - expected).abs().max() < 1.5e-6


def test_the_order_of_the_vocabulary_does_not_matter(tiles: None) -> None:
    of = case()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    heads = [Head(h.weight[order], h.bias[order]) for h in (of.head, of.ref_head)]
    there = order.argsort()[of.tokens]
    other = Case(of.hidden, heads[0], there, of.ref_hidden, heads[1])
    for ours, expected in zip(other.statistics(), of.statistics(), strict=True):
        assert_close(ours, expected)


def test_positions_do_not_depend_on_one_another(tiles: None) -> None:
    of = case(axes=(9,))
    whole = of.statistics()
    for i in range(9):
        one = of._replace(
            hidden=of.hidden[i], tokens=of.tokens[i], ref_hidden=of.ref_hidden[i]
        ).statistics()
        assert_close(torch.stack(one), torch.stack(whole)[:, i])


def test_no_positions() -> None:
    of = case(axes=(0,))
    statistics = rollout_statistics(*of, temperature=1.0)
    assert [column.tolist() for column in (*statistics, *of.statistics())] == [[]] * 7
    sum(column.sum() for column in of.statistics()).backward()
    assert of.hidden.grad.shape == (0, 6)
    assert not of.head.weight.grad.any()
    assert not of.head.bias.grad.any()


def test_rollout_statistics_have_the_references_log_probs(tiles: None) -> None:
    of = case()
    ours = rollout_statistics(*of, temperature=0.7)
    for column, expected in zip(ours, textbook(of, temperature=0.7), strict=True):
        assert (column - expected).abs().max() < 2e-5
        assert not column.requires_grad
    assert (ours.logprobs - ours.ref_logprobs).abs().max() > 0.1
    for column, other in zip(ours[:3], of.statistics(0.7), strict=True):
        assert torch.equal(column, other)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("function", [token_statistics, rollout_statistics])
def test_a_temperature_that_is_not_positive_is_refused(function: Any, temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"^temperature={temperature} must be > 0$"):
        function(*case(), temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_head_logits_are_the_logits(dtype: torch.dtype) -> None:
    of = case(level=-100, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    head = Head(*(x.double() for x in of.head[:2]))
    expected = logits_of(of.hidden.double(), head, temperature=1.0)
    logits = head_logits(of.hidden, of.head)
    assert logits.dtype == wide
    assert not logits.requires_grad
    assert_close(logits, expected.to(wide), rtol=1e-6, atol=0)
    assert_close(
        head_logits(of.hidden, of.head.weight), (expected - head.bias).to(wide), rtol=1e-6, atol=0
    )
    # fp32 states over weights in bf16 are not rounded to them.
    mixed = head_logits(of.hidden.float() + 1e-3, of.head)
    expected = logits_of(of.hidden.double() + 1e-3, head, temperature=1.0)
    assert_close(mixed.double(), expected, rtol=1e-6, atol=1e-5)


def test_a_trained_model_in_bf16(tiles: None) -> None:
    of = case(dtype=torch.bfloat16)
    columns = of.statistics()
    for column, expected in zip(columns, textbook(of, temperature=1.0), strict=False):
        assert column.dtype == torch.float32
        assert (column - expected).abs().max() < 2e-5
    seen = torch.autograd.grad(loss(columns), of.leaves())
    wanted = torch.autograd.grad(loss(textbook(of, temperature=1.0)), of.leaves())
    for gradient, other in zip(seen, wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert_near(gradient.float(), other.float(), tolerance=1e-2)  # bf16 has steps of 2^-8


def test_under_autocast_only_the_gradients_are_rounded(tiles: None) -> None:
    of = case(level=-100, vocab=200, d_model=16)
    assert low_precision(of.hidden) is None
    expected, wanted = (
        of.statistics(0.8),
        torch.autograd.grad(loss(of.statistics(0.8)), of.leaves()),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert low_precision(of.hidden) == torch.bfloat16
        columns = of.statistics(0.8)
        logits = head_logits(of.hidden, of.head)
    assert torch.equal(logits, head_logits(of.hidden, of.head))
    for column, other in zip(columns, expected, strict=True):
        assert column.dtype == torch.float32
        assert_close(column, other, rtol=0, atol=1e-5)
    seen = torch.autograd.grad(loss(columns), of.leaves())
    for gradient, other in zip(seen, wanted, strict=True):
        assert gradient.dtype == torch.float32
        # 2^-8 a term, of which those along the common direction of the weights cancel.
        assert (gradient - other).norm() < 4e-2 * other.norm()
    # The products are in bf16, which is what makes them fast.
    assert not torch.allclose(seen[1], wanted[1], rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Keeps the most numbers of a tensor that an operation has returned, and counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.calls = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(output) if isinstance(x, Tensor)]
        self.numel, self.calls = max(self.numel, *sizes, 0), self.calls + 1
        self.products += func is torch.ops.aten.mm.default
        return output


@pytest.mark.parametrize(("tile", "narrowest"), [(1, 160), (2**14, 8), (None, None)])
@pytest.mark.parametrize("low", [False, True])
def test_no_tensor_has_the_size_of_the_logits(
    tile: int | None, narrowest: int | None, low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = case(axes=(16, 4), d_model=2, vocab=20_000, bias=False)
    monkeypatch.setattr(vocab_head, "KEPT", 0)
    if tile is not None:
        monkeypatch.setattr(vocab_head, "CPU_TILE", tile)
        monkeypatch.setattr(vocab_head, "NARROWEST_TILE", narrowest)
    sink = torch.zeros_like(of.head.weight)
    of = of._replace(head=of.head._replace(gradient=sink))
    with Largest() as largest, torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        columns = of.statistics()
        forward = largest.calls
        loss(columns).backward()
        assert largest.calls > 1.5 * forward  # the backward pass is seen as well
    # The weights themselves, or a tile of the default size; the logits would be 1,280,000.
    allowed = 2 * 20_000 if tile is not None else 2**18
    assert largest.numel <= allowed
    assert sink.any()


def test_logits_are_kept_up_to_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_head, "NARROWEST_TILE", 50)
    monkeypatch.setattr(vocab_head, "CPU_TILE", 1)
    products, gradients = [], []
    for budget in (2 * 64 * 500, 2 * 64 * 500 - 1):
        monkeypatch.setattr(vocab_head, "KEPT", budget)
        of = case(axes=(64,), d_model=4, vocab=500, bias=False)
        with Largest() as largest:
            loss(of.statistics()).backward()
        products.append(largest.products)
        gradients.append(of.hidden.grad)
    # Ten tiles: two products forward, two for the gradients, and two to compute logits again.
    assert products == [40, 60]
    assert_near(gradients[0], gradients[1])


def test_more_tiles_take_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(axes=(64,), d_model=2, vocab=4096, bias=False)
    sizes = []
    monkeypatch.setattr(vocab_head, "NARROWEST_TILE", 1)
    for tile in (2**18, 2**16, 2**14):
        monkeypatch.setattr(vocab_head, "CPU_TILE", tile)
        with Largest() as largest:
            loss(of.statistics()).backward()
        sizes.append(largest.numel)
    assert sizes == [2**18, 2**16, 2**14]
