"""Interventions while tokens are sampled: every way to sample gives what one full pass gives."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.transformer import FastPaths
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler, prefill
from rlhf_exp.rollout.measure import measure
from rlhf_exp.rollout.sampler import eos_token_id
from rlhf_exp.rollout.static import StaticDecoder
from rlhf_exp.types import Generation, PromptBatch
from tests.architectures import learning_logprobs
from tests.builders import assert_near, prompts, tiny_policy, with_engine
from tests.edited import CHANGES, pass_by_hand, settings
from tests.rollout.oracles import RAGGED, SHARED, assert_empty_padding

TEXTS = {"ragged": RAGGED, "shared": SHARED}
SAMPLER = CachedSampler(gen_len=12, stop_at_eos=True)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@torch.no_grad()
def assert_by_hand(
    generation: Generation, policy: TransformerWithValueHead, case: str | None, positions: str
) -> None:
    """Log-probs, values and hidden states are those of one pass with hooks put on by hand."""
    completions = generation.completions
    tokens, mask = completions.sequences
    width = completions.prompt_len
    change = {"prompt_len": width, "positions": positions}
    logits, values, hidden = pass_by_hand(policy, case, tokens, mask, **change)
    logprobs = logits[:, width - 1 : -1].double().log_softmax(dim=-1)
    logprobs = logprobs.gather(-1, completions.tokens[..., None]).squeeze(-1)
    real = completions.mask
    assert_near(generation.logprobs[real].double(), logprobs[real])
    assert_near(generation.values[real], values[:, width - 1 : -1][real])
    assert_near(generation.hidden[real], hidden[:, width - 1 : -1][real])
    assert_empty_padding(generation)


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize(("case", "positions"), CHANGES)
def test_sampling_with_a_cache_gives_what_one_pass_gives(
    architecture: str, case: str, positions: str, texts: str, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    batch = prompts(policy, TEXTS[texts])
    plain = SAMPLER(policy, batch, generator())
    settings(case, tmp_path, positions=positions).attach(policy)
    generation = SAMPLER(policy, batch, generator())
    assert_by_hand(generation, policy, case, positions)
    first = (generation.hidden - plain.hidden)[:, 0].abs().max()
    assert (first == 0) if positions == "completion" else (first > 0.1)
    # PPO's first ratio is 1: log-probs by the pass that learns are those at sampling.
    assert_near(learning_logprobs(policy, generation), generation.logprobs)


@pytest.mark.parametrize(("case", "positions"), CHANGES[:3])
def test_sampling_without_a_cache(
    architecture: str, case: str, positions: str, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    policy.fast_paths = FastPaths(cache=False, one_prompt=False, static=False)
    settings(case, tmp_path, positions=positions).attach(policy)
    generation = SAMPLER(policy, prompts(policy, RAGGED), generator())
    assert_by_hand(generation, policy, case, positions)


@pytest.mark.parametrize(("case", "positions"), CHANGES[1::2])
def test_transformerlens_samples_under_it(
    architecture: str, case: str, positions: str, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    settings(case, tmp_path, positions=positions).attach(policy)
    batch = prompts(policy, RAGGED)
    sampler = BridgeSampler(gen_len=6, top_k=1)
    generation = sampler(policy, batch, generator())
    assert_by_hand(generation, policy, case, positions)
    greedy = CachedSampler(gen_len=6, top_k=1)(policy, batch, generator())
    assert torch.equal(generation.completions.tokens, greedy.completions.tokens)
    slow = with_engine(policy, "hooked")
    settings(case, tmp_path, positions=positions).attach(slow)
    again = sampler(slow, batch, generator())
    assert torch.equal(generation.completions.tokens, again.completions.tokens)


def static_generation(
    policy: TransformerWithValueHead, batch: PromptBatch, uniforms: Tensor, decoder: StaticDecoder
) -> Generation:
    seen = None if batch.mask.all() else batch.mask
    eos = eos_token_id(policy, stop_at_eos=True)
    with torch.no_grad():
        width = batch.tokens.shape[1]
        cache, hidden = prefill(policy, batch, seen, width + SAMPLER.gen_len)
        assert cache is not None
        return decoder.run(batch, cache, hidden, uniforms, eos=eos)


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize(("case", "positions"), CHANGES[::2])
def test_static_steps_give_what_the_loop_gives(
    architecture: str, case: str, positions: str, texts: str, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    batch = prompts(policy, TEXTS[texts])
    rows, width = batch.tokens.shape
    before = SAMPLER.decoder(policy, rows, width)
    settings(case, tmp_path, positions=positions).attach(policy)
    expected = SAMPLER(policy, batch, generator())
    uniforms = torch.rand((rows, SAMPLER.gen_len), generator=generator())
    decoder = SAMPLER.decoder(policy, rows, width)
    assert decoder is not before  # whose graph, on a GPU, is of steps without it
    found = static_generation(policy, batch, uniforms, decoder)
    assert torch.equal(found.completions.tokens, expected.completions.tokens)
    for name in ("logprobs", "values", "hidden"):
        assert_near(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("kind", ["full", "last_layers", "lora"])
@pytest.mark.parametrize("case", ["add", "mean"])
def test_the_kl_is_from_the_policy_under_it_to_the_model_without(
    architecture: str, case: str, kind: str, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    kinds = {"full": Full(), "lora": Lora(rank=2), "last_layers": LastLayers()}
    reference = kinds[kind].attach(policy, seed=0)
    settings(case, tmp_path).attach(policy)
    generation = SAMPLER(policy, prompts(policy, RAGGED), generator())
    rollout = measure(policy, reference, generation, torch.zeros(len(RAGGED)), temperature=1.0)
    tokens, mask = generation.completions.sequences
    width = generation.completions.prompt_len
    with torch.no_grad():
        p, q = (
            pass_by_hand(policy, edits, tokens, mask, prompt_len=width)[0][:, width - 1 : -1]
            .double()
            .log_softmax(dim=-1)
            for edits in (case, None)
        )
    real = generation.completions.mask
    expected = (p.exp() * (p - q)).sum(dim=-1)[real]
    assert expected.min() > 1e-3
    assert_near(rollout.kl[real].double(), expected)
    ref_logprobs = q.gather(-1, generation.completions.tokens[..., None]).squeeze(-1)
    assert_near(rollout.ref_logprobs[real].double(), ref_logprobs[real])
