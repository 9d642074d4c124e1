"""PPO in bf16: close to fp32, its weights in fp32, and its first ratios beside 1."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.types import Layout

from ..builders import ARCHITECTURES
from ..stages.test_resume import PHASES, Failing, files, run, timeless
from .fixed import fixed_completions, fixed_experience
from .test_objectives import REFERENCES, TASKS, started
from .toy import (
    CPU,
    RAGGED,
    collect,
    context,
    fast_pass,
    learn,
    parts,
    phase,
    ppo_with,
    saved_model,
    start,
)

SAMPLER = CachedSampler(gen_len=6, stop_at_eos=True, temperature=0.7)
DTYPES = ("fp32", "bf16")
# Weights of 0.3 in bf16 are 1e-3 apart: steps this small would be lost on them.
SMALL_STEPS = AdamWSettings(base_lr=2e-4, head_lr=2e-4, eps=1e-3)


def small(dtype: str, **options: object) -> PPO:
    # Whether a ratio is clipped may depend on how it is rounded.
    given = {"batch_size": 8, "num_minibatches": 2, "dtype": dtype, "clip_coef": 0.99, **options}
    return ppo_with(**given)


def moved(
    path: Path, ppo: PPO, task: str, kind: str, architecture: str, device: torch.device = CPU
) -> dict[str, Tensor]:
    """How far a phase on the fixed samples moves each trained parameter."""
    setup, state = started(
        path, task, REFERENCES[kind], ppo, SMALL_STEPS, scale=0.1, device=device,
        architecture=architecture, d_model=32,
    )  # fmt: skip
    experience = fixed_experience(ppo, setup, fixed_completions(setup))
    trained = {n: p for n, p in setup.policy.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    with setup.policy.working():
        list(learn(ppo, setup, state, experience))
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert all(p is trained[n] for n, p in setup.policy.named_parameters() if n in trained)
    return {n: (p - before[n]).detach().cpu() for n, p in trained.items()}


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("task", TASKS)
def test_a_phase_moves_the_weights_as_in_fp32(
    task: str, architecture: str, kind: str, tmp_path: Path
) -> None:
    exact, low = (moved(tmp_path, small(d), task, kind, architecture) for d in DTYPES)
    assert_alike(exact, low)


def assert_alike(exact: dict[str, Tensor], low: dict[str, Tensor]) -> None:
    """The moves differ, by what bf16 rounds away."""
    assert low.keys() == exact.keys()
    whole = torch.cat([move.flatten() for move in exact.values()])
    wrong = torch.cat([(low[n] - move).flatten() for n, move in exact.items()])
    assert 1e-3 * whole.norm() < wrong.norm() < 0.08 * whole.norm()
    for name, move in exact.items():
        assert (low[name] - move).norm() < 0.2 * (move.norm() + 0.05 * whole.norm()), name


def test_gradients_of_micro_batches_add_up(tmp_path: Path) -> None:
    exact = moved(tmp_path, small("fp32"), "ragged", "full", "gpt2")
    low = moved(tmp_path, small("bf16", micro_batch_size=1), "ragged", "full", "gpt2")
    assert_alike(exact, low)


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_phase_begins_at_ratio_1_and_at_its_reference(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    """Sampling by a cache, measuring and learning round in different places."""
    ppo = small("bf16", batch_size=16)
    setup, state = start(
        ppo, tmp_path, task=RAGGED, finetune=REFERENCES[kind], sampler=SAMPLER,
        model=Scratch(architecture=architecture, num_layers=2, d_model=32, num_heads=2),
        optimizer=AdamWSettings(base_lr=3e-3, head_lr=3e-3),
    )  # fmt: skip
    ppo.compute.prepare(setup)
    for number in range(2):
        with setup.policy.working():
            experience = collect(ppo, setup, state)
            rollout, mask = experience.rollout, experience.rollout.completions.mask
            layout = Layout.of(rollout.completions)
            given = (setup.policy, setup.reference, experience.rollout)
            with torch.no_grad():
                seen = fast_pass(*given, layout, temperature=SAMPLER.temperature)
            steps = [*learn(ppo, setup, state, experience)]
        assert not mask.all()
        assert (seen.logprobs - rollout.logprobs)[mask].abs().max() < 0.02
        assert (seen.values - rollout.values)[mask].abs().max() < 0.02
        kl = rollout.kl[mask].mean()
        assert kl.abs() < 1e-6 if number == 0 else kl > 1e-4
        assert steps[0]["policy/approxkl"] < 1e-5
        assert steps[-1]["policy/approxkl"] > 1e-4  # what was learned is what computes


def test_the_blocks_compute_in_bf16_and_the_rest_does_not(tmp_path: Path) -> None:
    ppo = small("bf16")
    setup, state = start(ppo, tmp_path, task=RAGGED, sampler=SAMPLER)
    ppo.compute.prepare(setup)
    seen: dict[str, set[torch.dtype]] = {}

    def note(kind: str, module: nn.Module, args: object, out: Tensor) -> None:
        seen.setdefault(kind, set()).add(out.dtype)

    for owner, model in (("policy", setup.policy), ("reference", setup.reference)):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D | nn.LayerNorm):
                kind = f"{owner} {name.rpartition('.')[-1]}"
                module.register_forward_hook(partial(note, kind))
    metrics = phase(ppo, setup, state)
    low, exact = {torch.bfloat16}, {torch.float32}
    for owner in ("policy", "reference"):
        for name in ("c_attn", "c_fc", "c_proj"):
            assert seen[f"{owner} {name}"] == low
        assert seen[f"{owner} ln_f"] == exact
    assert seen["policy 0"] == seen["policy 2"] == exact  # the value head
    assert all(math.isfinite(value) for value in metrics.values())
    experience = collect(ppo, setup, state)
    for name in ("logprobs", "values", "kl", "entropy", "ref_logprobs"):
        assert getattr(experience.rollout, name).dtype == torch.float32


def test_a_run_evaluates_and_saves_in_bf16_as_in_fp32(tmp_path: Path) -> None:
    model = Scratch(num_layers=2, d_model=32, num_heads=2, context_len=16)
    results = {}
    for dtype in DTYPES:
        ppo = small(dtype, total_phases=2, eval_every=1, eval_samples=64)
        given = parts(task=RAGGED, model=model, sampler=SAMPLER)
        results[dtype] = ppo.run(context(tmp_path / dtype), given)
        saved = load_file(tmp_path / dtype / "model" / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        assert len(set(saved["transformer.h.0.mlp.c_fc.weight"].flatten().tolist())) > 4000
        config = json.loads((tmp_path / dtype / "model" / "config.json").read_text())
        assert config["dtype"] == "float32"
    exact, low = results["fp32"], results["bf16"]
    assert abs(low.before["eval/kl"]) < 1e-6
    assert low.after["eval/kl"] == pytest.approx(exact.after["eval/kl"], rel=0.1)
    assert exact.after["eval/kl"] > 1e-4
    assert low.after != exact.after
    for when in ("before", "after"):
        entropy = exact.content()[when]["eval/entropy"]
        assert low.content()[when]["eval/entropy"] == pytest.approx(entropy, abs=1e-3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("gpt2", "full"), ("llama", "lora")],
)
def test_a_run_goes_on_bit_by_bit(architecture: str, kind: str, tmp_path: Path) -> None:
    model = saved_model(tmp_path / "base", architecture=architecture, num_layers=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    given = {"finetune": REFERENCES[kind], "sampler": SAMPLER}
    ppo = ppo_with(PHASES, dtype="bf16")
    run(whole, ppo, model, **given)
    with pytest.raises(KeyboardInterrupt):
        run(cut, ppo, model, reward=Failing(at=5), **given)
    run(cut, ppo, model, resume=True, **given)
    assert timeless(cut) == timeless(whole)
    assert files(cut) == files(whole)
    run(tmp_path / "exact", ppo_with(PHASES, dtype="fp32"), model, **given)
    assert files(tmp_path / "exact") != files(whole)
