"""The algorithm. A phase has six steps:

1. sample completions of a batch of prompts from the policy,
2. score them with the reward,
3. measure them: log-probs, exact KL to the reference, entropy,
4. credit each token with an advantage,
5. learn: passes over the batch in minibatches, with an optimizer step for each,
6. keep: metrics, guards, evaluation, checkpoint.

Each step is a function. stages/ppo.py puts them together and wraps timing, memory, threads, faults
and guards around them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from rlhf_exp.rl.guards import Verdict
from rlhf_exp.rl.learn import Minibatch, add_share
from rlhf_exp.rl.state import TrainState
from rlhf_exp.types import (
    Completions,
    Experience,
    Generation,
    LossOutput,
    Pass,
    PromptBatch,
    Rollout,
)

Scores = Callable[[], Tensor]  # [batch]; waits if the reward still computes them
Metrics = Mapping[str, Tensor]


def run_phase(
    state: TrainState,
    *,
    collect: Callable[[int], Rollout],
    credit: Callable[[Rollout], Experience],
    learn: Callable[[Experience], Sequence[Mapping[str, float]]],
    keep: Callable[[Experience, Sequence[Mapping[str, float]]], object],
) -> None:
    """One phase."""
    state.phase += 1
    with state.policy.working():
        rollout = collect(state.phase)  # 1 sample, 2 score, 3 measure
        experience = credit(rollout)  # 4 credit
        updates = learn(experience)  # 5 learn
    keep(experience, updates)  # 6 keep


def collect(
    state: TrainState,
    phase: int,
    *,
    sample: Callable[[PromptBatch, int], Generation],
    score: Callable[[Completions, int], Scores],
    measure: Callable[[Generation, int], Rollout],
) -> tuple[Rollout, Scores]:
    """Steps 1 to 3. The scores come apart from the rollout: a reward may compute them on a thread
    while the reference measures, and while the next batch is sampled."""
    prompts = next(state.prompts)
    generation = sample(prompts, phase)  # 1 sample
    scores = score(generation.completions, phase)  # 2 score
    rollout = measure(generation, phase)  # 3 measure
    return rollout, scores


def learn(
    state: TrainState,
    experience: Experience,
    *,
    minibatches: Callable[[Experience], Iterator[Minibatch]],
    micro_batches: Callable[[Minibatch], Iterator[Minibatch]],
    policy_pass: Callable[[Minibatch], Pass],
    objective: Callable[[Pass, Experience], LossOutput],
    optimizer_step: Callable[[Metrics], tuple[Metrics, Verdict]],
) -> Iterator[Metrics]:
    """Step 5. Yields the metrics of each minibatch, until a guard stops the phase."""
    for minibatch in minibatches(experience):
        state.optimizer.zero_grad(set_to_none=False)
        metrics: Metrics = {}
        for part in micro_batches(minibatch):
            output = objective(policy_pass(part), part.experience)
            (part.share * output.loss).backward()
            metrics = add_share(metrics, output.metrics, part.share)
        metrics, verdict = optimizer_step(metrics)
        yield metrics
        if verdict.stop:
            return
