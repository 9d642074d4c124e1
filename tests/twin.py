"""PPO with a KL penalty as the papers write it: sample, score, measure, credit, learn.

Plain PyTorch on a Hugging Face causal language model: no cache, no kernels, all logits of all
positions. tests/test_twin.py holds the package to it, token by token and weight by weight. `tokens`
and `mask` are [batch, prompt + completion], padded on both sides; `scores` are [batch]. All else is
[batch, completion]: position t concerns completion token y_t, and `real` is False in the padding.
"""

import copy
from collections import namedtuple

import torch
from torch import nn

# Hyperparameters, named as in the package. An `eos` of -1 ends no completion.
Settings = namedtuple(
    "Settings",
    "total_phases batch_size num_minibatches batches_per_learning_phase gen_len eos"
    " gamma gae_lambda clip_coef vf_coef ent_coef kl_coef kl_penalty"
    " base_lr head_lr warmup_steps final_scale max_grad_norm",
)
Measured = namedtuple("Measured", "logprobs ref_logprobs kl entropy values")
Experience = namedtuple("Experience", "tokens mask real logprobs advantages returns")


class Policy(nn.Module):
    """A language model with a value head on its final hidden states."""

    def __init__(self, language_model, value_head):
        super().__init__()
        self.language_model, self.value_head = language_model, value_head

    def forward(self, tokens, mask):
        """Log-probs of the whole vocabulary after each token, and the value there."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # counted from the first real token
        output = self.language_model(
            tokens, attention_mask=mask.long(), position_ids=positions, output_hidden_states=True
        )
        return output.logits.log_softmax(-1), self.value_head(output.hidden_states[-1]).squeeze(-1)


def train(policy, prompts, prompt_mask, reward, settings, *, prompt_rng, sample_rng, minibatch_rng):
    """Trains the policy in place and yields the metrics of each phase."""
    reference = copy.deepcopy(policy)
    rates = (policy.language_model, settings.base_lr), (policy.value_head, settings.head_lr)
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in rates]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: warmup_decay(i, settings))
    num_samples = settings.total_phases * settings.batch_size
    orders = [torch.randperm(len(prompts), generator=prompt_rng) for _ in range(num_samples)]

    for rows in torch.cat(orders)[:num_samples].split(settings.batch_size):
        tokens, mask = sample(policy, prompts[rows], prompt_mask[rows], settings, sample_rng)
        completions, real = tokens[:, -settings.gen_len :], mask[:, -settings.gen_len :]
        scores = reward(completions, real)
        with torch.no_grad():
            rollout = measure(policy, reference, tokens, mask, settings)
        advantages, returns = credit(rollout, scores, real, settings)
        experience = Experience(tokens, mask, real, rollout.logprobs, advantages, returns)
        losses = learn(policy, reference, optimizer, experience, settings, minibatch_rng)

        schedule.step()
        sampled = {"scores": scores, "kl": rollout.kl[real], "entropy": rollout.entropy[real]}
        yield losses | {f"objective/{name}": x.mean().item() for name, x in sampled.items()}


@torch.no_grad()
def sample(policy, tokens, mask, settings, rng):
    """Tokens and mask of prompts and completions; a completion is real through its first EOS."""
    active = torch.ones(len(tokens), dtype=torch.bool)
    for uniforms in torch.rand(len(tokens), settings.gen_len, generator=rng).T:
        log_p, _ = policy(tokens, mask)
        cumulative = log_p[:, -1].double().softmax(-1).cumsum(-1)
        drawn = (cumulative <= uniforms[:, None]).sum(-1)  # inverts the CDF
        tokens = torch.cat([tokens, (drawn * active)[:, None]], dim=1)
        mask = torch.cat([mask, active[:, None]], dim=1)
        active = active & (drawn != settings.eos)
    return tokens, mask


def measure(policy, reference, tokens, mask, settings):
    """Log-probs of policy p and reference q, exact KL(p || q), entropy of p, and values."""
    before = slice(-settings.gen_len - 1, -1)  # the output at a token concerns the next one
    log_p, values = (x[:, before] for x in policy(tokens, mask))
    with torch.no_grad():
        log_q = reference(tokens, mask)[0][:, before]
    emitted = tokens[:, -settings.gen_len :, None]
    return Measured(
        logprobs=log_p.gather(-1, emitted).squeeze(-1),
        ref_logprobs=log_q.gather(-1, emitted).squeeze(-1),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1),
        entropy=-(log_p.exp() * log_p).sum(-1),
        values=values,
    )


def credit(rollout, scores, real, settings):
    """Advantages, by GAE and whitened over the real tokens, and returns."""
    rewards = torch.zeros_like(rollout.values)
    last = real.sum(1) - 1  # the score arrives with the last real token
    rewards[torch.arange(len(last)), last] = (scores - scores.mean()) / (scores.std() + 1e-5)
    if settings.kl_penalty == "reward":
        rewards -= settings.kl_coef * (rollout.logprobs - rollout.ref_logprobs) * real
    values = rollout.values * real  # 0 after the last real token
    advantages, advantage, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(settings.gen_len)):
        delta = rewards[:, t] + settings.gamma * next_value - values[:, t]
        advantages[:, t] = advantage = delta + settings.gamma * settings.gae_lambda * advantage
        next_value = values[:, t]
    variance, mean = torch.var_mean(advantages[real])
    whitened = (advantages - mean) / (variance + 1e-8).sqrt()
    has_signal = (rewards.sum(1) != rewards.sum(1)[0]).any()  # else A is the error of V alone
    return whitened * has_signal, advantages + values


def learn(policy, reference, optimizer, experience, settings, rng):
    """Several passes over the experience, one step per minibatch; returns the mean losses."""
    steps = []
    for _ in range(settings.batches_per_learning_phase):
        order = torch.randperm(settings.batch_size, generator=rng)
        for index in order.chunk(settings.num_minibatches):
            minibatch = Experience(*(x[index] for x in experience))
            losses = ppo_losses(policy, reference, minibatch, settings)
            optimizer.zero_grad()
            losses["total"].backward()
            nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
            optimizer.step()
            steps.append({f"loss/{name}": loss.item() for name, loss in losses.items()})
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def ppo_losses(policy, reference, old, settings):
    """The loss to minimise and its terms, means over the real tokens of a minibatch."""
    new, real = measure(policy, reference, old.tokens, old.mask, settings), old.real
    ratio = (new.logprobs - old.logprobs).exp()
    clipped = ratio.clamp(1 - settings.clip_coef, 1 + settings.clip_coef)
    surrogate = torch.minimum(ratio * old.advantages, clipped * old.advantages)[real].mean()
    value = ((new.values - old.returns) ** 2 / 2)[real].mean()
    kl, entropy = new.kl[real].mean(), new.entropy[real].mean()
    kl_coef = settings.kl_coef if settings.kl_penalty == "loss" else 0
    total = -surrogate + settings.vf_coef * value - settings.ent_coef * entropy + kl_coef * kl
    return {"total": total, "policy": -surrogate, "value": value, "kl": kl, "entropy": entropy}


def warmup_decay(phase, settings):
    """The multiplier of the learning rates: a linear rise to 1, then a fall to final_scale."""
    if phase < settings.warmup_steps:
        return (phase + 1) / settings.warmup_steps
    decay = (phase - settings.warmup_steps) / (settings.total_phases - settings.warmup_steps)
    return 1 - (1 - settings.final_scale) * decay
