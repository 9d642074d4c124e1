"""The fast pass is the textbook's: its numbers, its gradients, and what a phase learns from it. The
objectives are those of a loop over tokens."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from rlhf_exp.models.finetune import Finetune, Full, LastLayers, Lora
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rl.objectives import (
    Coefficients,
    Objective,
    PolicyGradient,
    PPOClip,
    SequenceRatio,
)
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.sweeps.isolation import call_in_process
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.types import Experience, Layout, Pass

from ..builders import ARCHITECTURES, assert_near
from .fixed import (
    fixed_completions,
    fixed_experience,
    layout_of,
    off_the_reference,
    reference_states,
    textbook_phase,
)
from .toy import (
    CPU,
    RAGGED,
    ToyTask,
    fast_pass,
    learn,
    loss,
    pass_shape,
    ppo_with,
    start,
    textbook_pass,
)

TEMPERATURE = 0.7
TASKS = {
    # Eleven tokens with BOS, beside completions of at most five: it pays to run them once.
    "shared": ToyTask(prompts=("w0 w1 w2 w3 w4 w5 w6 w7 w8 w9",)),
    "ragged": RAGGED,
}
REFERENCES = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(rank=4, alpha=8),
}
# Adam divides by the gradient's own size, so that rounding would decide about a step where the
# gradient is 0, as it is for the biases of attention's keys; with this eps it does not.
SMOOTH = AdamWSettings(base_lr=1e-2, head_lr=1e-2, eps=1e-3)
SMALL = ppo_with(batch_size=8, num_minibatches=2, batches_per_learning_phase=2, dtype="fp32")


def started(
    path: Path, task: str, reference: Finetune, ppo: PPO = SMALL,
    optimizer: AdamWSettings = SMOOTH, scale: float = 0.3, device: torch.device = CPU,
    **shape: object,
) -> tuple[Setup, TrainState]:  # fmt: skip
    """A policy off its reference, both with weights far from their small initial ones."""
    given = {"num_layers": 2, "d_model": 16, "num_heads": 2, "context_len": 24, **shape}
    setup, state = start(
        ppo, path, task=TASKS[task], model=Scratch(**given), finetune=reference,
        sampler=CachedSampler(gen_len=7, temperature=TEMPERATURE), optimizer=optimizer,
        device=device,
    )  # fmt: skip
    off_the_reference(setup, scale=scale)
    ppo.compute.prepare(setup)
    return setup, state


def columns_of(given: Pass, mask: Tensor) -> dict[str, Tensor]:
    return {name: column[mask] for name, column in given._asdict().items()}


def gradients(setup: Setup, given: Pass, mask: Tensor) -> dict[str, Tensor]:
    """Of a sum of everything, each entry with a weight of its own; they are taken away."""
    generator = torch.Generator().manual_seed(7)
    weights = (torch.randn(mask.shape, generator=generator) for _ in given)
    torch.stack([(c * w)[mask].sum() for c, w in zip(given, weights, strict=True)]).sum().backward()
    named = setup.policy.named_parameters()
    seen = {n: p.grad.clone() for n, p in named if p.grad is not None}
    setup.policy.zero_grad()
    return seen


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fast_pass_is_the_textbooks(
    architecture: str, tied: bool, kind: str, task: str, tmp_path: Path
) -> None:
    shape = {"architecture": architecture, "tie_embeddings": tied}
    setup, _ = started(tmp_path, task, REFERENCES[kind], **shape)
    policy, completions = setup.policy, fixed_completions(setup)
    experience, mask = fixed_experience(SMALL, setup, completions), completions.mask
    assert_near(
        experience.rollout.ref_hidden[mask], reference_states(setup, completions)[mask]
    )  # what both are given

    rows = []
    hook = policy.language_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(pass_shape(kwargs)), with_kwargs=True
    )
    fast = fast_pass(
        policy,
        setup.reference,
        experience.rollout,
        layout_of(completions),
        temperature=TEMPERATURE,
    )
    hook.remove()
    width = completions.prompt_len
    assert rows == ([(1, width), (8, 4)] if task == "shared" else [(8, width + 4)])
    fast_columns, seen = columns_of(fast, mask), gradients(setup, fast, mask)
    book = textbook_pass(policy, setup.reference, experience.rollout, temperature=TEMPERATURE)
    assert book.kl[mask].mean() > 1e-3
    for name, column in columns_of(book, mask).items():
        assert_near(fast_columns[name], column)
        assert not getattr(fast, name)[~mask].any()

    expected = gradients(setup, book, mask)
    assert seen.keys() == expected.keys()
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert expected.keys() == trained
    for name, gradient in expected.items():
        assert_near(seen[name], gradient, tolerance=3e-5)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1


def test_gradients_add_up_over_passes(tmp_path: Path) -> None:
    # The head adds its own to the weights' as it goes, and so does an embedding tied to it.
    setup, _ = started(tmp_path, "ragged", Full(), tie_embeddings=True)
    experience = fixed_experience(SMALL, setup, fixed_completions(setup))
    for passes in (1, 2):
        for _ in range(passes):
            layout = Layout.of(experience.rollout.completions)
            loss(SMALL, setup, experience, layout=layout).loss.backward()
        grads = [p.grad.clone() for p in setup.policy.parameters()]
        setup.policy.zero_grad(set_to_none=False)
        if passes == 1:
            once = grads
    for a, b in zip(once, grads, strict=True):
        assert_near(b, 2 * a, tolerance=1e-6)


def learned(path: Path, ppo: PPO, *given: object, by_the_book: bool) -> tuple[list, list]:
    """The trained parameters after a phase on the fixed samples, and the losses of its steps."""
    setup, state = started(path, *given[:2], ppo, **given[2])
    experience = fixed_experience(ppo, setup, fixed_completions(setup))
    before = [p.clone() for p in setup.policy.parameters()]
    if by_the_book:
        steps = textbook_phase(ppo, setup, state, experience)
    else:
        steps = [*learn(ppo, setup, state, experience)]
    after = [p.detach() for p in setup.policy.parameters()]
    moves = [(a - b).abs().max().item() for a, b in zip(before, after, strict=True)]
    assert max(moves) > 1e-2
    return after, [[s["loss/total"].item(), s["loss/kl"].item()] for s in steps]


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_phase_learns_what_the_textbook_does(
    architecture: str, kind: str, task: str, micro_batch_size: int | None, tmp_path: Path
) -> None:
    # GPT-2's embeddings are tied, Llama's are not.
    ppo = ppo_with(SMALL, micro_batch_size=micro_batch_size)
    given = (task, REFERENCES[kind], {"architecture": architecture})
    expected, losses = learned(tmp_path, SMALL, *given, by_the_book=True)
    seen, fast_losses = learned(tmp_path, ppo, *given, by_the_book=False)
    assert len(losses) == 4
    for a, b in zip(losses, fast_losses, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    for a, b in zip(expected, seen, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def learn_compiled(path: Path, device: str, mode: str, backend: str) -> None:
    """In a process without the checks that tests put around functions: they cannot be compiled."""
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend=backend)
    given = ("ragged", Full(), {"num_layers": 1, "device": torch.device(device)})
    weights, losses = zip(
        *(
            learned(path, ppo_with(SMALL, compile=compile), *given, by_the_book=False)
            for compile in ("off", mode)
        ),
        strict=True,
    )
    apart = max(((a - b).norm() / a.norm()).item() for a, b in zip(*weights, strict=True))
    print(json.dumps([*losses, apart, counters["stats"]["unique_graphs"]]))


def compiled_beside_plain(
    path: Path, device: str, mode: str, *, backend: str = "inductor"
) -> tuple[list, list, float, int]:
    """The losses of a phase's steps plain and compiled, how far apart the weights are then, and
    how many graphs were compiled."""
    log = path / "log"
    code = call_in_process(learn_compiled, path / "run", device, mode, backend, log=log)
    assert code == 0, log.read_text()[-2000:]
    return json.loads(log.read_text().splitlines()[-1])


# aot_eager captures the graphs of both directions as inductor does and calls PyTorch's own kernels;
# to have them compiled from C++ takes half a minute.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_a_compiled_phase_learns_the_same(backend: str, tmp_path: Path) -> None:
    given = compiled_beside_plain(tmp_path, "cpu", "on", backend=backend)
    plain, compiled, apart, graphs = given
    assert len(plain) == len(compiled) == 4
    for one, other in zip(plain, compiled, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
    assert 0 < apart < 1e-5
    assert graphs >= 1


OBJECTIVES: dict[str, Objective] = {
    "ppo_clip": PPOClip(clip_coef_high=0.3, dual_clip_coef=1.5),
    "sequence_ratio": SequenceRatio(clip_coef_high=0.3),
    "policy_gradient": PolicyGradient(),
    "importance_cap": PolicyGradient(importance_cap=1.2),
}


def random_pass(setup: Setup) -> tuple[Pass, Experience]:
    """Random numbers in float64 for each token, the padding included."""
    generator = torch.Generator().manual_seed(3)
    fixed = fixed_experience(SMALL, setup, fixed_completions(setup))
    shape = fixed.advantages.shape

    def draw(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    old, ref = draw() - 3, draw() - 3
    rollout = replace(fixed.rollout, logprobs=old, ref_logprobs=ref, values=draw())
    batch = replace(fixed, rollout=rollout, advantages=draw(), returns=draw())
    columns = (old + draw(0.5), draw(), draw(), draw())
    return Pass(*(column.requires_grad_() for column in columns)), batch


def loop_loss(name: str, new: Pass, batch: Experience, coefs: Coefficients, how: str) -> Tensor:
    """The loss token by token, with weights by `how`."""
    rollout, objective = batch.rollout, OBJECTIVES[name]
    assert new.values is not None
    assert rollout.values is not None
    assert batch.returns is not None
    lengths = rollout.completions.mask.sum(dim=1).tolist()
    total = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths):
        log_ratios = [new.logprobs[b, t] - rollout.logprobs[b, t] for t in range(length)]
        for t in range(length):
            advantage, ratio = batch.advantages[b, t], log_ratios[t].exp()
            if name == "sequence_ratio":
                ratio = (sum(log_ratios) / length).exp()
            term = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
            if isinstance(objective, PPOClip) and advantage < 0:
                term = torch.maximum(term, 1.5 * advantage)
            if isinstance(objective, PolicyGradient):
                weight = min(ratio.item(), 1.2) if name == "importance_cap" else 1.0
                term = weight * advantage * new.logprobs[b, t]
            value, target = new.values[b, t], batch.returns[b, t]
            old, clip = rollout.values[b, t], coefs.value_clip_coef
            near = value if clip is None else old + (value - old).clamp(-clip, clip)
            term = term - 0.3 * torch.maximum((value - target) ** 2, (near - target) ** 2) / 2
            difference = new.logprobs[b, t] - rollout.ref_logprobs[b, t]
            kl = (-difference).exp() - 1 + difference if coefs.kl_term == "k3" else new.kl[b, t]
            term = term + 0.05 * new.entropy[b, t] - 0.7 * kl
            total = total - share(how, batch, b) * term
    return total


def share(how: str, batch: Experience, row: int) -> float:
    """The weight of each token of a row."""
    mask = batch.rollout.completions.mask
    weights = {
        "token_mean": 1 / mask.sum(),
        "sequence_mean": 1 / mask[row].sum() / len(mask),
        "constant": 1 / mask.numel(),
    }
    return float(weights[how])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_that_of_a_loop(name: str, tmp_path: Path) -> None:
    setup, _ = started(tmp_path, "ragged", Full())
    new, batch = random_pass(setup)
    for kl_term, value_clip_coef in (("exact", None), ("k3", 0.4)):
        coefs = Coefficients(
            clip_coef=0.2, vf_coef=0.3, value_clip_coef=value_clip_coef, ent_coef=0.05, kl_coef=0.7,
            kl_term=kl_term,
        )  # fmt: skip
        for how in ("token_mean", "sequence_mean", "constant"):
            loss = replace(OBJECTIVES[name], aggregation=how)(new, batch, coefs).loss
            expected = loop_loss(name, new, batch, coefs, how)
            torch.testing.assert_close(loss, expected)
            gradients, wanted = (
                torch.autograd.grad(x, [*new], allow_unused=True, materialize_grads=True)
                for x in (loss, expected)
            )
            for gradient, by_hand in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("name", ["ppo_clip", "sequence_ratio"])
def test_what_is_measured_of_ratios_is_not_scaled_by_padding(name: str, tmp_path: Path) -> None:
    setup, _ = started(tmp_path, "ragged", Full())
    new, batch = random_pass(setup)
    coefs = SMALL.coefficients(0.0)
    changes = new.logprobs.detach() - batch.rollout.logprobs
    for how, weights in (
        ("token_mean", "token_mean"),
        ("sequence_mean", "sequence_mean"),
        ("constant", "sequence_mean"),
    ):
        clipped = moved = 0.0
        for b, length in enumerate(batch.rollout.completions.mask.sum(dim=1).tolist()):
            row = changes[b, :length]
            ratios = (row if name == "ppo_clip" else row.mean().expand(length)).exp().tolist()
            weight = share(weights, batch, b)
            clipped += weight * sum(not 0.8 <= ratio <= 2 for ratio in ratios)
            moved += weight * sum(change**2 / 2 for change in row.tolist())
        objective = replace(OBJECTIVES[name], aggregation=how, clip_coef_high=1.0)
        metrics = objective(new, batch, coefs).metrics
        assert metrics["policy/clipfrac"].item() == pytest.approx(clipped)
        assert metrics["policy/approxkl"].item() == pytest.approx(moved)
        assert 0 < clipped < 1
