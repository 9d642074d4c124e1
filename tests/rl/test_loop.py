"""PPO: its objective against a loop in float64, and its invariants."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_exp.functional.logprobs import completion_logits, token_logprobs
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.length import Length
from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import settings
from rlhf_exp.types import Completions, Experience

from ..builders import ARCHITECTURES
from .toy import RAGGED, collect, experience_of, learn, loss, phase, ppo_with, start

SAMPLERS = [
    CachedSampler(gen_len=6),
    CachedSampler(gen_len=6, temperature=0.7, stop_at_eos=True),
    CachedSampler(gen_len=6, top_k=3),
    BridgeSampler(gen_len=6, temperature=1.3, stop_at_eos=True),
]


@pytest.mark.parametrize("engine", ["fast", "hooked"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["plain", "eos", "top_k", "bridge"])
def test_first_ratio_of_a_phase_is_one(
    sampler: Sampler, architecture: str, engine: str, tmp_path: Path
) -> None:
    model = Scratch(
        architecture=architecture, num_layers=2, d_model=16, num_heads=2, context_len=16,
        dropout=0.3, engine=engine,
    )  # fmt: skip
    ppo = ppo_with(batch_size=16)
    setup, state = start(ppo, tmp_path, model=model, sampler=sampler, task=RAGGED)
    for _ in range(2):  # a phase that has learned must satisfy it as well
        experience = collect(ppo, setup, state)
        rollout, completions = experience.rollout, experience.rollout.completions
        with torch.no_grad():
            logits, values = setup.policy(*completions.sequences)
        logits = completion_logits(logits, completions.prompt_len) / sampler.temperature
        ratio = (token_logprobs(logits, completions.tokens) - rollout.logprobs).exp()
        seen_values = values[:, completions.prompt_len - 1 : -1]
        mask = completions.mask
        assert (ratio[mask] - 1).abs().max() < 1e-5
        assert (seen_values - rollout.values)[mask].abs().max() < 1e-5
        list(learn(ppo, setup, state, experience))


def test_approxkl_and_clipfrac_of_the_first_update_are_zero(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=16, num_minibatches=2)
    setup, state = start(ppo, tmp_path, task=RAGGED)
    experience = collect(ppo, setup, state)
    updates = list(learn(ppo, setup, state, experience))
    assert updates[0]["policy/approxkl"] < 1e-10
    assert updates[0]["policy/clipfrac"] == 0
    assert updates[-1]["policy/approxkl"] > 1e-6


@pytest.mark.parametrize("kl_penalty", ["loss", "reward"])
@pytest.mark.parametrize("value_clip_coef", [None, 0.05])
def test_loss_equals_a_loop_over_tokens(
    kl_penalty: str, value_clip_coef: float | None, tmp_path: Path
) -> None:
    ppo = ppo_with(
        batch_size=8, kl_coef=0.7, ent_coef=0.05, vf_coef=0.3, clip_coef=0.1,
        kl_penalty=kl_penalty, value_clip_coef=value_clip_coef,
    )  # fmt: skip
    temperature = 0.8
    sampler = CachedSampler(gen_len=5, temperature=temperature, stop_at_eos=True)
    setup, state = start(ppo, tmp_path, task=RAGGED, sampler=sampler)
    list(learn(ppo, setup, state, collect(ppo, setup, state)))
    experience = collect(ppo, setup, state)
    list(learn(ppo, setup, state, experience))
    output = loss(ppo, setup, experience)

    rollout, completions = experience.rollout, experience.rollout.completions
    tokens, mask = completions.sequences
    with torch.no_grad():
        logits, values = setup.policy(tokens, mask)
        ref_logits = setup.reference.unembed(setup.reference.hidden_states(tokens, mask))
    total, count, start_at = 0.0, 0, completions.prompt_len - 1
    for row in range(8):
        for t in range(int(completions.mask[row].sum())):
            p = (logits[row, start_at + t].double() / temperature).softmax(-1).tolist()
            q = (ref_logits[row, start_at + t].double() / temperature).softmax(-1).tolist()
            token = int(completions.tokens[row, t])
            ratio = math.exp(math.log(p[token]) - rollout.logprobs[row, t].item())
            advantage = experience.advantages[row, t].item()
            clipped = min(max(ratio, 0.9), 1.1)
            value, target = values[row, start_at + t].item(), experience.returns[row, t].item()
            error = (value - target) ** 2
            if value_clip_coef is not None:
                old = rollout.values[row, t].item()
                near = old + min(max(value - old, -value_clip_coef), value_clip_coef)
                error = max(error, (near - target) ** 2)
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            total += min(ratio * advantage, clipped * advantage) - 0.3 * 0.5 * error
            total += 0.05 * -sum(a * math.log(a) for a in p)
            total -= (0.7 if kl_penalty == "loss" else 0.0) * kl
            count += 1
    assert output.loss.item() == pytest.approx(-total / count, abs=2e-5)


def test_reward_penalty_charges_each_token_its_log_ratio(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=8, kl_coef=0.5, kl_penalty="reward", normalize_reward=False)
    setup, state = start(ppo, tmp_path, task=RAGGED, sampler=CachedSampler(gen_len=5))
    list(learn(ppo, setup, state, collect(ppo, setup, state)))
    experience = collect(ppo, setup, state)
    rollout = experience.rollout
    for row in range(8):
        for t in range(5):
            charge = 0.5 * (rollout.logprobs[row, t] - rollout.ref_logprobs[row, t]).item()
            score = rollout.scores[row].item() if t == 4 else 0.0
            assert experience.rewards[row, t].item() == pytest.approx(score - charge, abs=1e-6)
    assert rollout.kl.sum() > 0


def test_lambda_zero_without_whitening_is_one_step(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=8, gae_lambda=0.0, whiten_advantages="none", normalize_reward=False)
    setup, state = start(ppo, tmp_path)
    experience = collect(ppo, setup, state)
    values, scores = experience.rollout.values, experience.rollout.scores
    one_step = torch.cat([values[:, 1:], scores[:, None]], dim=1)
    assert torch.equal(experience.advantages, one_step - values)
    torch.testing.assert_close(experience.returns, one_step)


def test_scores_are_normalised_over_the_batch_when_asked(tmp_path: Path) -> None:
    ppo, raw = ppo_with(batch_size=16), ppo_with(batch_size=16, normalize_reward=False)
    setup, state = start(ppo, tmp_path, reward=Length(target_tokens=3), sampler=SAMPLERS[1])
    experience = collect(ppo, setup, state)
    scores, mask = experience.rollout.scores, experience.rollout.completions.mask
    last = mask.sum(dim=1) - 1
    rows = torch.arange(16)
    normalised = (scores - scores.mean()) / (scores.std() + 1e-5)
    torch.testing.assert_close(experience.rewards[rows, last], normalised)
    assert torch.equal(experience_of(raw, experience.rollout).rewards[rows, last], scores)
    assert experience.rewards.count_nonzero() == 16
    assert scores.std() > 0.1


def test_advantages_are_whitened_once_over_the_batch_and_returns_are_not(tmp_path: Path) -> None:
    plain, white = ppo_with(batch_size=16, whiten_advantages="none"), ppo_with(batch_size=16)
    setup, state = start(plain, tmp_path, task=RAGGED)
    experience = collect(plain, setup, state)
    whitened = experience_of(white, experience.rollout)
    flat = experience.advantages[experience.rollout.completions.mask]
    expected = (flat - flat.mean()) / flat.std()
    torch.testing.assert_close(
        whitened.advantages.flatten(), expected.flatten(), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(whitened.returns, experience.returns)


def test_minibatch_whitening_whitens_each_minibatch(tmp_path: Path) -> None:
    each = ppo_with(batch_size=16, batches_per_learning_phase=1, whiten_advantages="minibatch")
    none = ppo_with(batch_size=16, batches_per_learning_phase=1, whiten_advantages="none")
    sampler = CachedSampler(gen_len=6, stop_at_eos=True)
    weights, seen = [], []
    for ppo, by_hand in ((each, False), (none, True), (none, False)):
        setup, state = start(ppo, tmp_path, task=RAGGED, sampler=sampler)
        experience = collect(ppo, setup, state)
        assert not experience.rollout.completions.mask.all()
        if by_hand:
            order = torch.randperm(16, generator=copy_of(state.minibatch_generator))
            advantages = experience.advantages.clone()
            for index in order.split(4):
                mask = experience.rollout.completions.mask[index]
                real = advantages[index][mask]
                advantages[index] = (advantages[index] - real.mean()) / real.std()
            experience = replace(experience, advantages=advantages)
        learned = learn(ppo, setup, state, experience)
        seen.append([update["loss/policy"].item() for update in learned])
        weights.append(torch.cat([p.detach().flatten() for p in setup.policy.parameters()]))
    assert seen[0] == pytest.approx(seen[1], abs=1e-5)
    # Adam makes a step of a gradient of any size, one that is 0 but for rounding included.
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)
    assert (weights[0] - weights[2]).abs().max() > 1e-3
    assert seen[0] != pytest.approx(seen[2], abs=1e-3)


def copy_of(generator: torch.Generator) -> torch.Generator:
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other


def test_garbage_in_the_padding_changes_no_gradient(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=8)
    sampler = CachedSampler(gen_len=6, stop_at_eos=True)
    setup, state = start(ppo, tmp_path, task=RAGGED, sampler=sampler)
    clean = collect(ppo, setup, state)
    mask = clean.rollout.completions.mask
    assert not mask.all()

    def gradients(experience: Experience) -> list[torch.Tensor]:
        setup.policy.zero_grad()
        loss(ppo, setup, experience).loss.backward()
        return [p.grad.clone() for p in setup.policy.parameters() if p.grad is not None]

    def dirty(x: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, x, torch.full_like(x, torch.nan))

    rollout = clean.rollout
    spoiled = Experience(
        rollout=type(rollout)(
            completions=type(rollout.completions)(
                prompts=rollout.completions.prompts,
                tokens=torch.where(mask, rollout.completions.tokens, 5),
                mask=mask,
                texts=rollout.completions.texts,
            ),
            logprobs=dirty(rollout.logprobs),
            ref_logprobs=dirty(rollout.ref_logprobs),
            ref_hidden=rollout.ref_hidden,
            values=dirty(rollout.values),
            kl=dirty(rollout.kl),
            entropy=dirty(rollout.entropy),
            kept_mass=dirty(rollout.kept_mass),
            scores=rollout.scores,
        ),
        rewards=dirty(clean.rewards),
        advantages=dirty(clean.advantages),
        returns=dirty(clean.returns),
    )
    for a, b in zip(gradients(clean), gradients(spoiled), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_phase_measures_at_the_samplers_temperature(tmp_path: Path) -> None:
    ppo = ppo_with(batch_size=16)
    sampler = CachedSampler(gen_len=6, temperature=0.3, stop_at_eos=True)
    twins = [start(ppo, tmp_path, sampler=sampler, task=RAGGED) for _ in range(2)]
    rollout = collect(ppo, *twins[0]).rollout
    setup, state = twins[1]
    metrics = phase(ppo, setup, state)
    entropy = rollout.entropy[rollout.completions.mask].mean().item()
    assert metrics["objective/entropy"] == pytest.approx(entropy, abs=1e-6)
    assert entropy < 2.75  # at temperature 1 it is 2.770


def test_gradients_are_clipped_and_logged_as_they_were(tmp_path: Path) -> None:
    moves, norms = [], []
    for max_grad_norm in (1e9, 1e-9):
        ppo = ppo_with(batch_size=16, num_minibatches=1, max_grad_norm=max_grad_norm)
        setup, state = start(ppo, tmp_path)
        experience = collect(ppo, setup, state)
        before = [p.clone() for p in setup.policy.parameters()]
        norms.append(next(learn(ppo, setup, state, experience)))
        pairs = zip(before, setup.policy.parameters(), strict=True)
        moves.append(max((a - b).abs().max().item() for a, b in pairs))
    assert norms[0]["grad_norm/base"] == norms[1]["grad_norm/base"] > 1e-3
    # Adam divides by the gradient's own size, but not below its eps of 1e-5.
    assert moves[1] < 1e-3 * moves[0]


def test_the_reference_is_the_same_after_a_run(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=2)
    setup, state = start(ppo, tmp_path)
    before = [p.clone() for p in setup.reference.parameters()]
    phase(ppo, setup, state)
    assert all(torch.equal(a, b) for a, b in zip(before, setup.reference.parameters(), strict=True))
    assert all(p.grad is None for p in setup.reference.parameters())
    trained = setup.policy.language_model.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    ppo = ppo_with(total_phases=2)
    setup, state = start(ppo, tmp_path)
    state.phase = 6
    with torch.no_grad():
        setup.policy.value_head[2].bias.fill_(math.nan)
    message = r"phase 7, step 1: the loss is not finite .*loss/value nan"
    with pytest.raises(TrainingError, match=message):
        phase(ppo, setup, state)


@settings
class Fixed:
    """The scores 1, 2, 3, ... in the order of the batch, less `charge` for rows without EOS."""

    charge: float = 0.0

    def load(self, device: torch.device) -> RewardFunction:
        def score(completions: Completions) -> torch.Tensor:
            tokens = completions.tokens.tolist()
            return torch.tensor([i - self.charge * (2 not in r) for i, r in enumerate(tokens, 1)])

        return score


@pytest.mark.parametrize("penalty", [None, 0.0, 2.5])
def test_an_answer_that_does_not_end_is_charged(tmp_path: Path, penalty: float | None) -> None:
    ppo = ppo_with(batch_size=8, missing_eos_penalty=penalty)
    given = {
        "task": RAGGED,
        "sampler": CachedSampler(gen_len=6, stop_at_eos=True, temperature=3.0),
        "reward": Fixed(),
    }
    setup, state = start(ppo, tmp_path, **given)
    tokens = collect(ppo, setup, state).rollout.completions.tokens
    # 2 is EOS; what follows it is 0, so that it is nowhere in a row that was cut off.
    cut_off = sum(2 not in row for row in tokens.tolist())
    assert 0 < cut_off < 8
    setup, state = start(ppo, tmp_path, **given)
    metrics = phase(ppo, setup, state)
    assert metrics["objective/scores"] == pytest.approx(4.5 - (penalty or 0.0) * cut_off / 8)


def test_the_penalty_is_as_if_the_reward_had_charged_it(tmp_path: Path) -> None:
    weights = []
    for penalty, charge in ((2.5, 0.0), (None, 2.5), (None, 0.0)):
        ppo = ppo_with(batch_size=8, missing_eos_penalty=penalty)
        sampler = CachedSampler(gen_len=6, stop_at_eos=True, temperature=3.0)
        reward = Fixed(charge=charge)
        setup, state = start(ppo, tmp_path, task=RAGGED, sampler=sampler, reward=reward)
        phase(ppo, setup, state)
        weights.append(torch.cat([p.flatten() for p in setup.policy.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert (weights[0] - weights[2]).abs().max() > 1e-3
