"""The expected gradient of each form of the KL penalty, over all completions of a tiny policy:
three tokens from a vocabulary of three, with a free logit for each token after each prefix."""

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from rlhf_exp.rl.estimators import GAE, BestOfGroup, GroupNormalized, LeaveOneOut, token_rewards
from rlhf_exp.rl.objectives import Objective, PolicyGradient, PPOClip
from rlhf_exp.types import Completions, Pass, PromptBatch, Rollout

from .toy import ppo_with

VOCAB, LENGTH, KL_COEF = 3, 3, 0.7
COMPLETIONS = [*itertools.product(range(VOCAB), repeat=LENGTH)]
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(VOCAB), repeat=n)]
RANDOM = torch.Generator().manual_seed(3)
REFERENCE = torch.randn(len(PREFIXES), VOCAB, generator=RANDOM, dtype=torch.float64).log_softmax(-1)
SCORES = torch.randn(len(COMPLETIONS), generator=RANDOM, dtype=torch.float64)
TOKENS = torch.tensor(COMPLETIONS)
# The row of REFERENCE that each token of each completion was drawn from.
STATES = torch.tensor([[PREFIXES.index(y[:t]) for t in range(LENGTH)] for y in COMPLETIONS])
VALUES = torch.randn(len(PREFIXES), generator=RANDOM, dtype=torch.float64)[STATES]  # any baseline


UNCLIPPED = PolicyGradient()


def table() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(len(PREFIXES), VOCAB, generator=generator, dtype=torch.float64)
    return logits.requires_grad_()


def pass_of(logits: Tensor) -> Pass:
    """Log-probs and exact KL of every completion."""
    policy = logits.log_softmax(dim=-1)
    kl = (policy.exp() * (policy - REFERENCE)).sum(dim=-1)
    logprobs = policy[STATES].gather(2, TOKENS[..., None])[..., 0]
    return Pass(logprobs=logprobs, entropy=torch.zeros_like(logprobs), kl=kl[STATES], values=None)


def exact_gradient() -> Tensor:
    """Of the mean score minus KL_COEF times the KL of whole completions, by enumeration."""
    logits = table()
    new = pass_of(logits)
    logprob = new.logprobs.sum(dim=1)
    log_ratio = logprob - REFERENCE[STATES].gather(2, TOKENS[..., None])[..., 0].sum(dim=1)
    objective = (logprob.exp() * (SCORES - KL_COEF * log_ratio)).sum()
    return torch.autograd.grad(objective, logits)[0]


def gradients(kl_penalty: Any, objective: Objective = UNCLIPPED) -> tuple[Tensor, Tensor]:
    """Of minus the loss of one completion, summed over its tokens: the mean over all completions,
    by their probability, and the mean of the square."""
    logits = table()
    old = pass_of(logits.detach())
    prompt = PromptBatch(
        tokens=torch.zeros(1, 1, dtype=torch.long), mask=torch.ones(1, 1, dtype=torch.bool),
        rows=({"prompt": ""},),
    )  # fmt: skip
    coefs = ppo_with(kl_coef=KL_COEF, ent_coef=0.0, kl_penalty=kl_penalty, whiten_advantages="none")
    mean, square = torch.zeros_like(logits), torch.zeros_like(logits)
    for i in range(len(COMPLETIONS)):
        row = slice(i, i + 1)
        mask = torch.ones(1, LENGTH, dtype=torch.bool)
        rollout = Rollout(
            completions=Completions(prompts=prompt, tokens=TOKENS[row], mask=mask, texts=("",)),
            logprobs=old.logprobs[row],
            ref_logprobs=REFERENCE[STATES[row]].gather(2, TOKENS[row, :, None])[..., 0],
            ref_hidden=torch.zeros(1, LENGTH, 1), values=VALUES[row], kl=old.kl[row],
            entropy=old.entropy[row], kept_mass=torch.ones(1, LENGTH), scores=SCORES[row],
        )  # fmt: skip
        rewards = token_rewards(rollout, kl_coef=KL_COEF, kl_penalty=kl_penalty, normalize=False)
        experience = GAE(gae_lambda=1.0, whiten_advantages="none")(rollout, rewards)
        new = pass_of(logits)
        part = new._replace(logprobs=new.logprobs[row], entropy=new.entropy[row], kl=new.kl[row])
        loss = objective(part, experience, coefs.coefficients(KL_COEF)).loss
        gradient = -LENGTH * torch.autograd.grad(loss, logits)[0]
        probability = old.logprobs[i].sum().exp()
        mean, square = mean + probability * gradient, square + probability * gradient**2
    return mean, square


@pytest.mark.parametrize("objective", [UNCLIPPED, PPOClip()])
@pytest.mark.parametrize("kl_penalty", ["reward", "return"])
def test_two_forms_have_the_gradient_of_the_whole_kl(kl_penalty: str, objective: Objective) -> None:
    found, _ = gradients(kl_penalty, objective)
    assert_close(found, exact_gradient(), rtol=0, atol=1e-10)


def test_in_the_loss_a_token_has_no_credit_for_the_kl_of_later_ones() -> None:
    (found, _), exact = gradients("loss"), exact_gradient()
    last = [len(prefix) == LENGTH - 1 for prefix in PREFIXES]
    assert_close(found[last], exact[last], rtol=0, atol=1e-10)  # nothing comes later
    assert (found - exact)[0].abs().max() > 0.01


def test_the_gradient_of_k3_in_the_loss_is_not_that_of_the_kl() -> None:
    (found, _), exact = gradients("loss_k3"), exact_gradient()
    last = [len(prefix) == LENGTH - 1 for prefix in PREFIXES]
    assert (found - exact)[last].abs().max() > 0.01


def test_the_return_has_less_variance_than_the_reward() -> None:
    of_reward, of_return = (gradients(name)[1].sum() for name in ("reward", "return"))
    assert of_return < 0.9 * of_reward


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"whiten_advantages": "batch"}, "set estimator.whiten_advantages=none"),
        ({"whiten_advantages": "minibatch"}, "set estimator.whiten_advantages=none"),
        ({"estimator": GroupNormalized()}, "set estimator.scale=none"),
        ({"estimator": BestOfGroup()}, "choose another estimator"),
    ],
)
def test_advantages_that_are_scaled_are_refused(options: dict[str, Any], fix: str) -> None:
    with pytest.raises(ValidationError, match=f"kl_penalty=return: .*: {fix}"):
        ppo_with(kl_penalty="return", samples_per_prompt=4, **options)
    for estimator in (GroupNormalized(scale="none"), LeaveOneOut()):
        ppo_with(kl_penalty="return", samples_per_prompt=4, estimator=estimator)
