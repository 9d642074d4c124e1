"""PPO, SFT and sampling on models whose logits are scaled or soft-capped, against the logits of the
models themselves."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from rlhf_exp.functional.logprobs import completion_logits, entropy, kl_divergence, token_logprobs
from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.held_out import HeldOut, next_token_loss
from rlhf_exp.tasks.examples import encode_demonstrations, pad
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.types import Pass

from ..builders import assert_near, stretch
from .fixed import fixed_completions, fixed_experience, layout_of, off_the_reference
from .toy import RAGGED, EchoTask, ToyTask, collect, fast_pass, phase, ppo_with, start

TEMPERATURE = 0.7
SHAPE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "granite": hf.GraniteConfig(**SHAPE, logits_scaling=8.0),
    "cohere": hf.CohereConfig(**SHAPE, logit_scale=0.25),
    "gemma2": hf.Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=3.0),
}
SMALL = ppo_with(batch_size=8, num_minibatches=2, batches_per_learning_phase=2, dtype="fp32")
SAMPLER = CachedSampler(gen_len=7, temperature=TEMPERATURE)


def drawn(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[name])


def saved(name: str, path: Path) -> Pretrained:
    model = drawn(name)
    stretch(model, seed=0)
    model.save_pretrained(path)
    ToyTask().build_tokenizer().save_pretrained(path)
    return Pretrained(base_model=str(path))


def model_logits(of: CausalTransformer, tokens: Tensor, mask: Tensor) -> Tensor:
    """From a forward pass of the Hugging Face module as its documentation has it."""
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    network = of.language_model
    return network(input_ids=tokens, attention_mask=mask.long(), position_ids=positions).logits


def weighted_gradients(policy: TransformerWithValueHead, of: Pass, mask: Tensor) -> list[Tensor]:
    """Of a sum of everything, each entry with a weight of its own; they are taken away."""
    generator = torch.Generator().manual_seed(7)
    columns = (of.logprobs, of.entropy, of.kl)
    weights = (torch.randn(mask.shape, generator=generator) for _ in columns)
    terms = [(c * w)[mask].sum() for c, w in zip(columns, weights, strict=True)]
    torch.stack(terms).sum().backward()
    gradients = [p.grad.clone() for p in policy.language_model.parameters()]
    policy.zero_grad()
    return gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_ppo_learns_from_the_models_own_logits(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "model")
    setup, _ = start(SMALL, tmp_path / "run", task=RAGGED, model=model, sampler=SAMPLER)
    off_the_reference(setup, scale=0.1)
    policy, completions = setup.policy, fixed_completions(setup)
    experience, mask = fixed_experience(SMALL, setup, completions), completions.mask
    fast = fast_pass(
        policy,
        setup.reference,
        experience.rollout,
        layout_of(completions),
        temperature=TEMPERATURE,
    )
    seen = weighted_gradients(policy, fast, mask)
    logits, ref_logits = (
        completion_logits(model_logits(of, *completions.sequences), completions.prompt_len)
        / TEMPERATURE
        for of in (policy, setup.reference)
    )
    book = Pass(
        logprobs=token_logprobs(logits, completions.tokens),
        entropy=entropy(logits),
        kl=kl_divergence(logits, ref_logits.detach()),
        values=fast.values,
    )
    assert book.kl[mask].mean() > 1e-3
    for column in ("logprobs", "entropy", "kl"):
        assert_near(getattr(fast, column)[mask], getattr(book, column)[mask])
    expected = weighted_gradients(policy, book, mask)
    assert max(gradient.abs().max() for gradient in expected) > 0.1
    for gradient, other in zip(seen, expected, strict=True):
        assert_near(gradient, other, tolerance=3e-5)


@pytest.mark.parametrize("reference", [Full(), LastLayers(num_layers_unfrozen=1), Lora()])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rollout_has_the_models_own_log_probs(
    name: str, reference: object, tmp_path: Path
) -> None:
    setup, state = start(
        SMALL, tmp_path / "run", task=RAGGED, model=saved(name, tmp_path / "model"),
        sampler=SAMPLER, finetune=reference,
    )  # fmt: skip
    rollout = collect(SMALL, setup, state).rollout
    completions, mask = rollout.completions, rollout.completions.mask
    with torch.no_grad():
        logits = model_logits(setup.policy, *completions.sequences) / TEMPERATURE
    logits = completion_logits(logits, completions.prompt_len)
    expected = token_logprobs(logits, completions.tokens)
    assert_near(rollout.logprobs[mask], expected[mask])
    assert_near(rollout.ref_logprobs[mask], expected[mask])
    assert rollout.kl.abs().max() < 1e-6
    metrics = phase(SMALL, setup, state)
    assert metrics["policy/approxkl"] < 1
    assert metrics["loss/kl"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_matches_are_as_frequent_as_the_model_says(name: str) -> None:
    network, tokenizer = drawn(name), EchoTask().build_tokenizer()
    split = EchoTask().demonstration_split().train
    examples = encode_demonstrations(tokenizer, split, prepend_bos=True, limit=16)
    adamw = AdamWSettings(base_lr=1e-2).build(network)
    for _ in range(60):
        next_token_loss(network, pad(examples)).backward()
        adamw.step()
        adamw.zero_grad()
    policy = TransformerWithValueHead(network, tokenizer)
    with torch.no_grad():
        logprobs = [
            token_logprobs(network(input_ids=tokens[None]).logits[:, :-1], tokens[None, 1:])[
                0, example.start - 1 :
            ].sum()
            for example in examples
            for tokens in [torch.tensor(example.tokens)]
        ]
    expected = torch.stack(logprobs).exp().mean().item()
    assert 0.05 < expected < 0.95
    rates = []
    for seed in range(4):
        held_out = HeldOut(policy, examples, num_samples=96, chooses=True, batch_size=96, seed=seed)
        held_out.with_answers(EchoTask(), [d.prompt for d in split])
        rates.append(held_out.during()["heldout/exact_match"])
    # Four standard deviations of 384 samples are .1 at most.
    assert sum(rates) / 4 == pytest.approx(expected, abs=0.1)
