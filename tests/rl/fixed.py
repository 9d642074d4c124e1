"""Experience whose samples are written down, and the textbook's way to learn from it."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlhf_exp.functional.losses import clipped_surrogate, value_loss
from rlhf_exp.functional.masking import masked_mean
from rlhf_exp.models.lora import adapter_off, has_adapter
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.state import TrainState
from rlhf_exp.rollout.measure import measure
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.tasks.prompts import take
from rlhf_exp.types import Completions, Experience, Generation, Layout

from .toy import experience_of, textbook_pass

LENGTHS = (5, 1, 3, 4, 2, 5, 1, 3)  # in 7 columns, of which the last two are padding everywhere


def perturb(model: nn.Module, *, scale: float, seed: int, trained: bool = True) -> None:
    """Moves what is trained, or everything, by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not trained:
                noise = scale * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.device))


def fixed_completions(
    setup: Setup, *, lengths: Sequence[int] = LENGTHS, width: int = 7
) -> Completions:
    """Random words of these lengths after the training prompts in turn."""
    batch, device = len(lengths), setup.policy.device
    rows = torch.arange(batch, device=device) % len(setup.train_prompts.rows)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    vocab = setup.policy.head.weight.shape[0]
    tokens = torch.randint(4, vocab, (batch, width), generator=generator) * mask
    return Completions(
        prompts=take(setup.train_prompts, rows),
        tokens=tokens.to(device),
        mask=mask.to(device),
        texts=("",) * batch,
    )


def fixed_experience(ppo: PPO, setup: Setup, completions: Completions) -> Experience:
    """What a policy near the present one would have measured of the completions."""
    old = copy.deepcopy(setup.policy)
    perturb(old, scale=0.02, seed=5)
    mask, start = completions.mask, completions.prompt_len
    temperature = setup.sampler.temperature
    with torch.no_grad():
        hidden = old.hidden_states(*completions.sequences)[:, start - 1 : -1]
        logprobs = (old.unembed(hidden) / temperature).log_softmax(dim=-1)
        values = old.values(hidden)
        generation = Generation(
            completions=completions,
            logprobs=logprobs.gather(-1, completions.tokens[..., None])[..., 0] * mask,
            values=None if values is None else values * mask,
            hidden=hidden * mask[..., None],
            kept_mass=mask.float(),
        )
    scores = torch.arange(len(mask), device=mask.device) % 3.0
    rollout = measure(old, setup.reference, generation, scores, temperature=temperature)
    return experience_of(ppo, rollout)


def off_the_reference(setup: Setup, *, scale: float) -> None:
    """Makes the reference's weights so large that an error shows, and the policy's others. What
    both share stays shared."""
    perturb(setup.policy.language_model, scale=scale, seed=1, trained=False)
    reference = setup.reference
    if isinstance(reference, nn.Module):
        theirs = dict(reference.named_parameters())
        with torch.no_grad():
            for name, parameter in setup.policy.named_parameters():
                if name in theirs:
                    theirs[name].copy_(parameter)
    perturb(setup.policy, scale=0.05, seed=2)


def reference_states(setup: Setup, completions: Completions) -> Tensor:
    """The reference's hidden states by a plain pass over whole sequences."""
    start = completions.prompt_len
    with torch.no_grad():
        if has_adapter(setup.policy.language_model):
            with adapter_off(setup.policy.language_model):
                hidden = setup.policy.hidden_states(*completions.sequences)
        else:
            hidden = setup.reference.hidden_states(*completions.sequences)
    return hidden[:, start - 1 : -1]


def textbook_phase(
    ppo: PPO, setup: Setup, state: TrainState, experience: Experience
) -> list[Mapping[str, Tensor]]:
    """The steps of one phase, by the textbook pass and an AdamW that is not fused."""
    adamw = torch.optim.AdamW(
        [{k: g[k] for k in ("params", "lr", "weight_decay")} for g in state.optimizer.param_groups],
        betas=state.optimizer.defaults["betas"],
        eps=state.optimizer.defaults["eps"],
        foreach=False,
    )
    trained = [p for p in setup.policy.parameters() if p.requires_grad]
    seen = []
    for _ in range(ppo.batches_per_learning_phase):
        order = torch.randperm(ppo.batch_size, generator=state.minibatch_generator)
        for index in order.split(ppo.minibatch_size):
            batch = experience[index]
            mask, old = batch.rollout.completions.mask, batch.rollout.logprobs
            new = textbook_pass(
                setup.policy,
                setup.reference,
                batch.rollout,
                temperature=setup.sampler.temperature,
            )
            surrogate = clipped_surrogate(
                new.logprobs, old, batch.advantages, mask, clip_coef=ppo.clip_coef
            )
            value = value_loss(new.values, batch.returns, mask)
            kl, ent = masked_mean(new.kl, mask), masked_mean(new.entropy, mask)
            loss = ppo.vf_coef * value + ppo.kl_coef * kl - ppo.ent_coef * ent - surrogate
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, ppo.max_grad_norm)
            adamw.step()
            seen.append({"loss/total": loss.detach(), "loss/kl": kl.detach()})
    return seen


def layout_of(completions: Completions) -> Layout:
    """Its layout, with fewer columns than there are."""
    layout = Layout.of(completions)
    assert layout.num_columns < completions.mask.shape[1]
    return layout
