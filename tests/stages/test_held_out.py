"""The loss by hand, and what measures while a model trains and what at the end."""

import math
from collections.abc import Sequence

import pytest
import torch

from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rl.exact_answers import exact_match
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.held_out import HeldOut, held_out_loss, next_token_loss
from rlhf_exp.tasks.examples import Example, encode_demonstrations, pack, pad
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.training.seeding import make_generator

from ..builders import stretch
from ..rl.toy import EchoTask, ToyTask, echo_policy

MODEL = Scratch(num_layers=2, d_model=32, num_heads=2, context_len=16)
TEXTS = [
    Example(tokens=[1, 4, 5, 2], start=1),
    Example(tokens=[1, 6, 2], start=1),
    Example(tokens=[1, 7, 8, 9, 10, 2], start=1),
]
ANSWERS = [
    Example(tokens=[1, 4, 5, 6, 2], start=3),
    Example(tokens=[4, 2], start=1),
    Example(tokens=[1, 7, 8, 9, 10, 11, 2], start=5),
]


def network_of(architecture: str = "gpt2", *, dropout: float = 0.0) -> torch.nn.Module:
    model = Scratch(
        architecture=architecture, num_layers=2, d_model=16, num_heads=2, context_len=16,
        dropout=dropout,
    )  # fmt: skip
    network, _ = model.language_model(ToyTask().build_tokenizer, seed=0)
    stretch(network, seed=0)
    return network


def by_hand(network: torch.nn.Module, examples: Sequence[Example]) -> float:
    """Mean over the tokens from `start` on, each example run by itself, in float64."""
    losses = []
    for example in examples:
        logits = network.eval()(input_ids=torch.tensor([example.tokens])).logits[0].double()
        for i in range(example.start, len(example)):
            losses.append(-logits[i - 1].log_softmax(-1)[example.tokens[i]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("examples", [TEXTS, ANSWERS], ids=["texts", "answers"])
def test_loss_is_the_mean_over_learned_tokens_padded_or_packed(
    examples: list[Example], architecture: str
) -> None:
    network = network_of(architecture).eval()
    expected = pytest.approx(by_hand(network, examples), abs=1e-5)
    assert next_token_loss(network, pad(examples)).item() == expected
    packed = pack(examples, limit=16)
    assert len(packed.tokens) == 1
    assert next_token_loss(network, packed).item() == expected
    assert next_token_loss(network, pack(examples, limit=9)).item() == expected


def test_nothing_is_learned_of_prompts_and_padding() -> None:
    network = network_of()
    seen = []
    network.lm_head.register_forward_hook(
        lambda module, args, logits: (logits.retain_grad(), seen.append(logits))[0]
    )
    next_token_loss(network, pad(ANSWERS)).backward()
    learned = seen[0].grad.abs().sum(dim=-1) > 0
    for row, example in enumerate(ANSWERS):
        wanted = [example.start - 1 <= i < len(example) - 1 for i in range(7)]
        assert learned[row].tolist() == wanted


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("examples", [TEXTS, ANSWERS], ids=["texts", "answers"])
def test_held_out_loss_does_not_depend_on_batches(examples: list[Example], batch_size: int) -> None:
    network = network_of().eval()
    loss = held_out_loss(network, examples, batch_size=batch_size)
    assert loss == pytest.approx(by_hand(network, examples), abs=1e-5)


def echo_held_out(num_samples: int, *, seed: int = 1, answers: bool = True) -> HeldOut:
    split = EchoTask().demonstration_split()
    examples = encode_demonstrations(
        echo_policy().tokenizer, split.train, prepend_bos=True, limit=16
    )
    held_out = HeldOut(
        echo_policy(), examples, num_samples=num_samples, chooses=True, batch_size=10, seed=seed
    )
    if answers:
        held_out.with_answers(EchoTask(), [d.prompt for d in split.train])
    return held_out


def rate(examples: Sequence[Example], *, is_greedy: bool, seed: int = 1) -> float:
    policy = echo_policy()
    texts = [policy.tokenizer.decode(e.tokens[1 : e.start]) for e in examples]
    sampler = CachedSampler(gen_len=3, stop_at_eos=True)
    generator = make_generator(seed, "held-out samples")
    prompts = encode_prompts(policy.tokenizer, texts, prepend_bos=True)
    if is_greedy:  # the sampled answers are drawn first
        exact_match(policy, EchoTask(), prompts, sampler, generator)
        sampler = sampler.greedy
    return exact_match(policy, EchoTask(), prompts, sampler, generator)


def test_while_it_trains_the_first_examples_measure_and_at_the_end_others() -> None:
    held_out = echo_held_out(30)
    first, unseen = held_out.examples[:30], held_out.examples[30:]
    others = unseen[:60]
    during, final = held_out.during(), held_out.final()
    network = echo_policy().language_model
    assert set(during) == {"heldout/loss", "heldout/exact_match"}
    assert during["heldout/loss"] == pytest.approx(by_hand(network, first), abs=1e-5)
    assert during["heldout/exact_match"] == rate(first, is_greedy=False)
    assert set(final) == {
        "heldout/loss", "heldout/perplexity", "heldout/exact_match", "heldout/greedy_exact_match",
    }  # fmt: skip
    assert final["heldout/loss"] == pytest.approx(by_hand(network, unseen), abs=1e-5)
    assert final["heldout/perplexity"] == pytest.approx(math.exp(final["heldout/loss"]))
    held_out.chooses = False  # then all of them are measures of weights that were not chosen
    whole = by_hand(network, held_out.examples)
    assert held_out.final()["heldout/loss"] == pytest.approx(whole, abs=1e-5)
    assert final["heldout/exact_match"] == rate(others, is_greedy=False)
    assert final["heldout/greedy_exact_match"] == rate(others, is_greedy=True)
    assert held_out.during() == during


@pytest.mark.parametrize("num_samples", [96, 200])
def test_without_others_the_same_examples_measure_at_the_end(num_samples: int) -> None:
    held_out = echo_held_out(num_samples)
    greedily = held_out.final()["heldout/greedy_exact_match"]
    assert greedily == rate(held_out.examples, is_greedy=True)
    assert held_out.during()["heldout/exact_match"] == held_out.final()["heldout/exact_match"]


def test_without_answers_the_loss_alone_is_measured() -> None:
    held_out = echo_held_out(30, answers=False)
    assert set(held_out.during()) == {"heldout/loss"}
    assert set(held_out.final()) == {"heldout/loss", "heldout/perplexity"}


def test_the_order_is_the_seeds() -> None:
    first, again, other = (echo_held_out(5, seed=seed).examples for seed in (1, 1, 2))
    assert first == again != other
    assert first[:5] != echo_held_out(5).examples[:5][::-1]
    assert sorted(e.tokens for e in first) == sorted(e.tokens for e in other)


def test_dropout_is_off_while_measuring() -> None:
    network, tokenizer = Scratch(
        num_layers=1, d_model=16, num_heads=2, context_len=16, dropout=0.5
    ).language_model(ToyTask().build_tokenizer, seed=0)
    stretch(network, seed=0)
    policy = type(echo_policy())(network, tokenizer)
    held_out = HeldOut(policy, TEXTS, num_samples=9, chooses=True, batch_size=2, seed=1)
    network.train()
    expected = pytest.approx(by_hand(network, TEXTS), abs=1e-5)
    network.train()
    assert held_out.during()["heldout/loss"] == expected
    network.train()
    assert held_out.final()["heldout/loss"] == expected


def test_a_measurement_is_said_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    held_out = echo_held_out(5, answers=False)
    metrics = held_out.measure(7)
    assert held_out.policy.language_model.training
    assert metrics == held_out.during()
    assert caplog.messages == [f"update 7: heldout/loss {metrics['heldout/loss']:.3f}"]
