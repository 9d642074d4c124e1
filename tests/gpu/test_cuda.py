"""The same promises on a CUDA device: `pytest -m gpu`. The default run leaves these out."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.functional.logprobs import completion_logits, token_logprobs
from rlhf_exp.models.engines import ENGINES
from rlhf_exp.models.fast_paths import with_fast_paths
from rlhf_exp.models.finetune import Finetune, Full, LastLayers, Lora
from rlhf_exp.models.loading import Pretrained, build_policy, load_policy
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.reward_model import load_reward_model
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.arithmetic import ArithmeticReward
from rlhf_exp.rewards.reward_model import LearnedReward, score_answers
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.folder import RunFolder
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.stages.preferences import Preferences
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.stages.reward_model import TrainRewardModel
from rlhf_exp.stages.sft import SFT
from rlhf_exp.tasks.arithmetic import Arithmetic
from rlhf_exp.tasks.pairs import PairsFile
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.seeding import make_generator
from tests.architectures import build, largest_error
from tests.builders import build_tokenizer
from tests.edited import CHANGES, settings
from tests.rl.fixed import perturb
from tests.rl.test_low_precision import assert_alike, moved, small
from tests.rl.test_objectives import REFERENCES as KINDS
from tests.rl.test_objectives import SMALL, compiled_beside_plain, learned
from tests.rl.toy import RAGGED, ToyTask, parts, parts_of, ppo_with, start

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
# Runs here are not compiled: the checks that tests put around functions cannot be.


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gpt_neox"])
def test_engines_are_equal(architecture: str) -> None:
    model = Scratch(architecture=architecture, d_model=32, num_heads=4, context_len=16)
    policy = build_policy(model, ToyTask().build_tokenizer, device=DEVICE, seed=0)
    tokens = torch.randint(16, (3, 8), device=DEVICE)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :3] = False
    fast = policy(tokens, mask)
    policy.engine = ENGINES["hooked"](policy)
    for a, b in zip(fast, policy(tokens, mask), strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama, eager", "gptj", "gpt_neo", "falcon with alibi", "lfm2"])
def test_graphs_are_used_where_they_are_right(name: str) -> None:
    policy = with_fast_paths(TransformerWithValueHead(build(name).to(DEVICE), build_tokenizer()))
    assert policy.fast_paths.static == (name in ("llama, eager", "gptj"))
    assert largest_error(policy, policy.frozen_reference(), static=False) < 1e-4


@pytest.mark.parametrize(("case", "positions"), CHANGES)
def test_graphs_hold_an_intervention(case: str, positions: str, tmp_path: Path) -> None:
    model = Scratch(d_model=16, num_heads=2, context_len=16)
    policy = build_policy(model, ToyTask().build_tokenizer, device=DEVICE, seed=0)
    prompts = encode_prompts(policy.tokenizer, RAGGED.prompts, prepend_bos=True, device=DEVICE)
    sampler = CachedSampler(gen_len=6)
    sampler(policy, prompts, make_generator(1, "samples", DEVICE))  # a graph of the plain policy
    settings(case, tmp_path, positions=positions).attach(policy)
    found, expected = (
        by(policy, prompts, make_generator(1, "samples", DEVICE))
        for by in (sampler, replace(sampler, cuda_graphs=False))
    )
    assert torch.equal(found.completions.tokens, expected.completions.tokens)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", [CachedSampler(gen_len=6), BridgeSampler(gen_len=6)])
def test_first_ratio_is_one(sampler: Sampler) -> None:
    model = Scratch(d_model=32, num_heads=4, context_len=16)
    policy = build_policy(model, ToyTask().build_tokenizer, device=DEVICE, seed=0)
    prompts = encode_prompts(policy.tokenizer, RAGGED.prompts, prepend_bos=True, device=DEVICE)
    generation = sampler(policy, prompts, make_generator(1, "samples", DEVICE))
    completions = generation.completions
    with torch.no_grad():
        logits, _ = policy(*completions.sequences)
    logprobs = token_logprobs(completion_logits(logits, completions.prompt_len), completions.tokens)
    assert ((logprobs - generation.logprobs).exp() - 1).abs().max() < 1e-4


def test_bandit_is_solved_and_its_policy_reloads(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=25, kl_coef=0.0, eval_every=25, compile="off")
    context = Context(folder=RunFolder(tmp_path), seed=1, device=DEVICE)
    after = ppo.run(context, parts(sampler=CachedSampler(gen_len=1))).after
    assert after["eval/score"] > 0.9
    assert load_policy(tmp_path, device=DEVICE).device.type == DEVICE.type


def test_the_four_steps_run_and_the_reward_model_scores_as_on_the_cpu(tmp_path: Path) -> None:
    task, sampler = Arithmetic(), CachedSampler(gen_len=15, stop_at_eos=True)
    optimizer = AdamWSettings(base_lr=3e-3, head_lr=3e-3)
    sft = Pretrained(base_model=str(tmp_path / "sft"))

    def run(name: str, stage: Stage[Any], **replaced: Any) -> StageResult:
        context = Context(folder=RunFolder(tmp_path / name), seed=1, device=DEVICE)
        return stage.run(context, parts_of(stage, optimizer=optimizer, **replaced))

    run(
        "sft",
        SFT(data="demonstrations", layout="pack", max_updates=60, dtype="auto"),
        task=task,
        model=Scratch(d_model=32, context_len=36),
    )
    run(
        "pairs",
        Preferences(num_pairs=400, num_held_out=200, dtype="auto"),
        task=task,
        model=sft,
        reward=ArithmeticReward(),
        sampler=sampler,
    )
    pairs = PairsFile(path=str(tmp_path / "pairs"))
    trains = TrainRewardModel(width=32, epochs=10, eval_every=10)
    after = run("reward", trains, task=pairs, model=sft).after
    assert after["heldout/pair_accuracy"] > 0.6
    some = pairs.pair_split().held_out[:20]
    prompts, answers = [pair.prompt for pair in some], [pair.chosen for pair in some]
    scores = [
        score_answers(load_reward_model(tmp_path / "reward", device=device), prompts, answers)
        for device in ("cpu", DEVICE)
    ]
    torch.testing.assert_close(scores[0], scores[1].cpu(), rtol=0, atol=1e-3)
    result = run(
        "ppo",
        ppo_with(total_phases=2, eval_every=1, eval_samples=32, compile="off"),
        task=task,
        model=sft,
        reward=LearnedReward(path=str(tmp_path / "reward")),
        sampler=sampler,
    )
    assert "eval/exact_match" in result.after


REFERENCES = [Full(), LastLayers(num_layers_unfrozen=1), Lora(rank=4)]


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: type(r).__name__)
def test_each_reference_resumes_where_it_was(reference: Finetune, tmp_path: Path) -> None:
    model = Scratch(num_layers=2, d_model=32, num_heads=4, context_len=16)
    ppo = ppo_with(
        total_phases=4, eval_every=4, eval_samples=32, checkpoint_every=2, micro_batch_size=3,
        rollout_batch_size=12, gradient_checkpointing=True, compile="off", dtype="fp32",
    )  # fmt: skip

    def run(path: Path, total_phases: int, *, resume: bool) -> Mapping[str, float | None]:
        context = Context(folder=RunFolder(path), seed=1, device=DEVICE, resume=resume)
        stage = replace(ppo, total_phases=total_phases)
        given = parts(model=model, finetune=reference, task=RAGGED)
        return stage.run(context, given).after

    whole = run(tmp_path / "whole", 4, resume=False)
    run(tmp_path / "half", 2, resume=False)
    resumed = run(tmp_path / "half", 4, resume=True)
    assert resumed["eval/kl"] > 1e-4
    # Not bit by bit: CUDA's reductions may add in another order.
    assert resumed["eval/kl"] == pytest.approx(whole["eval/kl"], rel=0.05)


def test_frozen_bf16_weights_train_adapters(tmp_path: Path) -> None:
    base = Scratch(num_layers=2, d_model=64, num_heads=4, context_len=16)
    save_policy(
        build_policy(base, ToyTask().build_tokenizer, device=torch.device("cpu"), seed=0),
        tmp_path / "base",
    )
    model = Pretrained(base_model=str(tmp_path / "base"), dtype="bf16")
    context = Context(folder=RunFolder(tmp_path / "run"), seed=1, device=DEVICE)
    result = ppo_with(total_phases=25, kl_coef=0.0, eval_every=25, compile="off").run(
        context,
        parts(
            model=model,
            finetune=Lora(rank=8),
            sampler=CachedSampler(gen_len=1),
            optimizer=AdamWSettings(base_lr=2e-2, head_lr=3e-3),
        ),
    )
    # The frozen output embedding is small as drawn, and bounds what adapters below it can do.
    assert result.after["eval/score"] > 3 * result.before["eval/score"]


@pytest.mark.parametrize("kind", ["full", "last_layers", "lora"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("task", ["shared", "ragged"])
def test_a_phase_on_fixed_samples_moves_the_weights_as_on_the_cpu(
    task: str, architecture: str, kind: str, tmp_path: Path
) -> None:
    given = (task, kind, architecture)
    here = moved(tmp_path, small("fp32", compile="off"), *given)
    there = moved(tmp_path, small("fp32", compile="off"), *given, DEVICE)
    whole = torch.cat([move.flatten() for move in here.values()])
    wrong = torch.cat([(there[n] - move).flatten() for n, move in here.items()])
    assert wrong.norm() < 1e-3 * whole.norm()
    assert_alike(here, moved(tmp_path, small("bf16", compile="off"), *given, DEVICE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["shared", "ragged"])
def test_a_phase_learns_what_the_textbook_does(task: str, kind: str, tmp_path: Path) -> None:
    given = (task, KINDS[kind], {"device": DEVICE})
    ppo = ppo_with(SMALL, compile="off")
    expected, _ = learned(tmp_path, ppo, *given, by_the_book=True)
    seen, _ = learned(tmp_path, ppo, *given, by_the_book=False)
    for a, b in zip(expected, seen, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()


def test_auto_is_bf16_and_compiled(tmp_path: Path) -> None:
    model = Scratch(d_model=32, num_heads=4, context_len=16)
    setup, _ = start(PPO(), tmp_path, device=DEVICE, model=model)
    PPO().prepare(setup)
    assert setup.policy.autocast_dtype == torch.bfloat16
    assert setup.policy.is_compiled


def test_a_compiled_phase_learns_the_same(tmp_path: Path) -> None:
    plain, compiled, apart, graphs = compiled_beside_plain(tmp_path, "cuda", "auto")
    for one, other in zip(plain, compiled, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4)
    assert apart < 1e-4
    assert graphs >= 1


@pytest.mark.parametrize("stop_at_eos", [True, False])
@pytest.mark.parametrize("prompts", [("w0 w1",) * 6, RAGGED.prompts], ids=["shared", "ragged"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gpt_neox"])
def test_greedy_samples_are_those_of_the_cpu(
    architecture: str, prompts: tuple[str, ...], stop_at_eos: bool
) -> None:
    sampler = CachedSampler(gen_len=12, top_k=1, temperature=0.7, stop_at_eos=stop_at_eos)
    model = Scratch(architecture=architecture, d_model=32, num_heads=4, context_len=24)
    seen = []
    for device in (torch.device("cpu"), DEVICE):
        policy = build_policy(model, ToyTask().build_tokenizer, device=device, seed=0)
        perturb(policy, scale=0.2, seed=1)
        batch = encode_prompts(policy.tokenizer, prompts, prepend_bos=True, device=device)
        seen.append(sampler(policy, batch, make_generator(1, "samples", device)))
    here, there = seen
    assert torch.equal(there.completions.tokens.cpu(), here.completions.tokens)
    assert torch.equal(there.completions.mask.cpu(), here.completions.mask)
    assert there.completions.texts == here.completions.texts
    for name in ("logprobs", "values", "hidden", "kept_mass"):
        expected = getattr(here, name)
        torch.testing.assert_close(getattr(there, name).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert len(set(here.completions.tokens.flatten().tolist())) > 1
