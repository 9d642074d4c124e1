"""The loss by hand, what measures while a model trains and what at the end, and the best kept."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rl.answers import exact_match, greedy
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.held_out import BestKept, HeldOut, held_out_loss, next_token_loss
from rlhf_exp.tasks.examples import Example, encode_demonstrations, pack, pad
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.training.context import TrainingError
from rlhf_exp.training.seeding import stream

from ..builders import stretch
from ..rl.toy import ECHO, EchoTask, ToyTask, context, echo_policy, rows

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
    generator = stream(seed, "held-out samples")
    prompts = encode_prompts(policy.tokenizer, texts, prepend_bos=True)
    if is_greedy:  # the sampled answers are drawn first
        exact_match(policy, EchoTask(), prompts, sampler, generator)
        sampler = greedy(sampler)
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


class Scripted(HeldOut):
    """Measures what it is told, one measurement after the other."""

    def script(self, measured: Sequence[dict[str, float]]) -> "Scripted":
        self._measured = iter(measured)
        return self

    def during(self) -> dict[str, float]:
        self.policy.language_model.eval()
        return next(self._measured)


def kept(
    path: Path,
    measured: Sequence[dict[str, float]],
    *,
    updates: int,
    eval_every: int | None = 2,
    stop_at: float | None = None,
    max_seconds: float | None = None,
) -> tuple[BestKept, list[bool], float]:
    """After so many updates, of which each adds 1 to a weight: the object, what it answered, and
    the weight after the best was restored."""
    network, tokenizer = ECHO.language_model(ToyTask().build_tokenizer, seed=0)
    policy = type(echo_policy())(network, tokenizer)
    weight = network.transformer.ln_f.bias
    assert weight[0] == 0
    held_out = Scripted(policy, TEXTS, num_samples=1, chooses=True, batch_size=1, seed=1).script(
        measured
    )
    best = BestKept(
        context(path), held_out, eval_every=eval_every, stop_at=stop_at, max_seconds=max_seconds
    )
    stops = []
    for update in range(1, updates + 1):
        with torch.no_grad():
            weight.add_(1)
        network.train()
        stops.append(best(update))
        assert network.training
    best.put_back()
    return best, stops, weight[0].item()


def exact(*rates: float) -> list[dict[str, float]]:
    """Measurements whose losses say the opposite of their rates."""
    return [{"heldout/loss": r, "heldout/exact_match": r} for r in rates]


def test_the_best_exact_match_is_kept_the_first_of_equals(tmp_path: Path) -> None:
    _, stops, weight = kept(tmp_path, exact(0.2, 0.5, 0.4, 0.5), updates=8)
    assert weight == 4
    assert stops == [False] * 8
    assert [row["phase"] for row in rows(tmp_path)] == [2, 4, 6, 8]
    assert [row["heldout/exact_match"] for row in rows(tmp_path)] == [0.2, 0.5, 0.4, 0.5]


def test_of_equal_rates_the_one_with_the_lower_loss_is_kept(tmp_path: Path) -> None:
    none_yet = [{"heldout/loss": loss, "heldout/exact_match": 0.0} for loss in (3.0, 1.0, 2.0)]
    assert kept(tmp_path, none_yet, updates=6)[2] == 4


def test_weights_that_could_never_be_measured_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"update 4: no held-out loss was finite; lower"):
        kept(tmp_path, [{"heldout/loss": math.nan}] * 2, updates=4)


def test_the_lowest_loss_is_kept_where_there_are_no_answers(tmp_path: Path) -> None:
    losses = [{"heldout/loss": loss} for loss in (3.0, 1.0, 2.0, 1.5)]
    assert kept(tmp_path, losses, updates=8)[2] == 4


def test_the_first_rate_that_is_enough_ends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, stops, weight = kept(tmp_path, exact(0.2, 0.7, 0.9), updates=4, stop_at=0.7)
    assert stops == [False, False, False, True]
    assert weight == 4
    assert "was not reached" not in caplog.text


def test_a_loss_is_no_rate_to_stop_at(tmp_path: Path) -> None:
    losses = [{"heldout/loss": loss} for loss in (9.0, 0.1)]
    assert kept(tmp_path, losses, updates=4, stop_at=0.5)[1] == [False] * 4


def test_the_last_update_is_measured_too_if_it_was_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best, _, weight = kept(tmp_path, exact(0.2, 0.5, 0.6), updates=5, stop_at=0.7)
    assert weight == 5
    assert best.best[0] == 0.6
    assert rows(tmp_path)[-1]["phase"] == 5
    assert (
        "stage.stop_at=0.7 was not reached: the best exact-match rate is 0.600 after 5 updates;"
        " raise stage.epochs or the caps on updates and seconds"
    ) in caplog.text
    assert kept(tmp_path, exact(0.2, 0.5, 0.3), updates=5)[2] == 4


def test_without_measurements_the_last_weights_stay(tmp_path: Path) -> None:
    _, stops, weight = kept(tmp_path, [], updates=3, eval_every=None)
    assert stops == [False] * 3
    assert weight == 3
    assert not [*tmp_path.iterdir()]


def test_the_best_is_known_to_a_run_that_goes_on(tmp_path: Path) -> None:
    best, _, weight = kept(tmp_path / "a", exact(0.2, 0.7), updates=4)
    assert weight == 4
    tensors, numbers = best.tensors(), json.loads(json.dumps(best.numbers()))
    other, _, _ = kept(tmp_path / "b", exact(0.1), updates=2)
    other.restore(tensors, numbers)
    assert other.best[0] == 0.7
    network = other.held_out.policy.language_model
    other.put_back()  # it was measured at update 4, so that it is not measured again
    assert network.transformer.ln_f.bias[0].item() == 4


def test_time_goes_on_where_it_was(tmp_path: Path) -> None:
    best, _, _ = kept(tmp_path / "a", [], updates=1, eval_every=None, max_seconds=1e6)
    numbers = {**best.numbers(), "seconds": 2e6}
    best.restore({}, numbers)
    assert best(2), "the seconds of the run before it was cut count too"


def test_time_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ticks = iter([100.0, 103.0, 105.0, 105.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    _, stops, weight = kept(tmp_path, exact(0.1, 0.2), updates=3, max_seconds=5.0)
    assert stops == [False, False, True]
    assert weight == 3
    assert caplog.text.count("stage.max_seconds is over at update 3") == 1
