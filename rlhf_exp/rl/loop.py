"""The algorithm. A phase has six steps:

1. sample completions of a batch of prompts from the policy,
2. score them with the reward,
3. measure them: log-probs, exact KL to the reference, entropy,
4. credit each token with an advantage,
5. learn: passes over the batch in minibatches, with an optimizer step for each,
6. keep: metrics, guards, evaluation, checkpoint.

Each step is a function. phases.py fills them with the settings of a stage, and wraps timing,
explanations of memory, threads and failing rewards around them.
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

PendingScores = Callable[[], Tensor]  # [batch]; blocks until the reward has computed them
Metrics = Mapping[str, Tensor]
Updates = Sequence[Mapping[str, float]]  # the metrics of each minibatch of a phase


def run_phase(
    state: TrainState,
    *,
    collect: Callable[[int], Rollout],
    credit: Callable[[Rollout], Experience],
    learn: Callable[[Experience], Updates],
    summarize: Callable[[Experience, Updates], Mapping[str, float]],
    advance: Callable[[Mapping[str, float]], None],
    keep: Callable[[Mapping[str, float]], None],
) -> None:
    """One phase, in the policy's working precision. `collect` and `learn` stand for
    `collect_rollout` and `update_policy` below."""
    state.phase += 1
    with state.policy.working():
        rollout = collect(state.phase)  # 1 sample, 2 score, 3 measure
        experience = credit(rollout)  # 4 credit
        updates = learn(experience)  # 5 learn
    metrics = summarize(experience, updates)
    advance(metrics)  # learning rates and KL coefficient of the next phase, if there is one
    keep(metrics)  # 6 keep


def collect_rollout(
    state: TrainState,
    phase: int,
    *,
    sample: Callable[[PromptBatch, int], Generation],
    score: Callable[[Completions, int], PendingScores],
    measure: Callable[[Generation, int], Rollout],
) -> tuple[Rollout, PendingScores]:
    """Steps 1 to 3. A reward may compute on a thread while the reference measures and while the
    next batch is sampled, so the scores come beside the rollout, whose own are NaN until then."""
    prompts = next(state.prompts)
    generation = sample(prompts, phase)  # 1 sample
    scores = score(generation.completions, phase)  # 2 score
    rollout = measure(generation, phase)  # 3 measure
    return rollout, scores


def update_policy(
    state: TrainState,
    experience: Experience,
    *,
    minibatches: Callable[[Experience], Iterator[Minibatch]],
    micro_batches: Callable[[Minibatch], Iterator[Minibatch]],
    policy_pass: Callable[[Minibatch], Pass],
    objective: Callable[[Pass, Experience], LossOutput],
    optimizer_step: Callable[[Metrics], tuple[Metrics, Verdict]],
) -> Iterator[Metrics]:
    """Step 5. `minibatches` makes several passes over the batch. Yields the metrics of each
    minibatch, until a guard stops the phase."""
    for minibatch in minibatches(experience):
        state.optimizer.zero_grad(set_to_none=False)  # the kernels add to gradients in place
        metrics: Metrics = {}
        for part in micro_batches(minibatch):
            output = objective(policy_pass(part), part.experience)
            (part.share * output.loss).backward()
            metrics = add_share(metrics, output.metrics, part.share)
        metrics, verdict = optimizer_step(metrics)
        yield metrics
        if verdict.stop:
            return
