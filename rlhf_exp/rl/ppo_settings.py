"""The settings of PPO, and of its relatives that differ in estimator or objective."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_exp.rl.compute import Compute
from rlhf_exp.rl.estimators import GAE, Estimator, KLPenalty, Reinforce
from rlhf_exp.rl.eval_text import TextFile
from rlhf_exp.rl.guards import Guards
from rlhf_exp.rl.kl_coefficient import KLCoefficient
from rlhf_exp.rl.objectives import Coefficients, Objective, PPOClip
from rlhf_exp.rl.snapshots import OneKind, SnapshotDtype, SnapshotPhases
from rlhf_exp.settings import Count, NonNegative, OpenFraction, Positive, Text, settings


@settings
class PPOSettings:
    """The algorithm's settings. Objective = policy term - vf_coef value loss + ent_coef entropy
    - kl_coef KL, the last unless kl_penalty="reward"."""

    total_phases: Count = 100
    """Phases; each is one rollout and learning from it."""
    batch_size: Count = 32
    """Completions a phase; a multiple of num_minibatches and samples_per_prompt."""
    samples_per_prompt: Count = 1
    """Completions sampled for each prompt, 1-64; they form a group."""
    num_minibatches: Count = 4
    """Optimizer steps a pass, 1-16."""
    batches_per_learning_phase: Count = 2
    """Passes over the rollout, 1-4."""
    clip_coef: OpenFraction = 0.2
    """The ratio is clipped to 1 +- this, 0.1-0.3."""
    vf_coef: NonNegative = 0.15
    """Weight of the value loss, 0.1-1; unused without values."""
    value_clip_coef: Positive | None = None
    """The value loss clips values to the rollout's +- this; null: no clipping."""
    value_model: Literal["shared", "separate"] = "shared"
    """shared: the value head reads the policy's hidden states; separate: those of a trained copy
    of the model, which takes as much memory and time again."""
    value_detach: bool = False
    """true: the value loss has no gradient for the policy's model."""
    ent_coef: NonNegative = 0.001
    """Weight of the entropy bonus (nats), 0-0.01."""
    kl_coef: NonNegative = 0.2
    """Weight of the KL to the reference (nats a token), 0.03-3."""
    kl_penalty: KLPenalty = "loss"
    """loss: exact KL in the loss; loss_k3: its k3 estimate there (GRPO); reward: -kl_coef (log p -
    log q) on each token's reward; return: as loss, and -kl_coef times the exact KL of later tokens
    in each token's return."""
    adaptive_kl_target: Positive | None = None
    """Target KL of a phase (nats a completion, 1-20; 6 in Ziegler et al. 2019), reached by adapting
    kl_coef; null: kl_coef is constant."""
    kl_horizon: Positive = 10000.0
    """kl_coef changes by at most 20 % over this many completions, 1000-100000."""
    normalize_reward: bool = True
    """Shifts and scales scores to mean 0 and standard deviation 1 over the batch."""
    missing_eos_penalty: NonNegative | None = None
    """Subtracted from the score of a completion that does not end with EOS, 0.5-2; null: none."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm over all parameters."""
    average_weights: OpenFraction | None = None
    """Decay of an exponential average of the weights over phases, 0.9-0.99; evaluations and the
    saved model have the average, at the cost of another copy of what is trained; null: none."""
    eval_every: Count = 25
    """Phases between evaluations."""
    eval_samples: Count = 512
    """Completions an evaluation."""
    eval_text: Text | None = None
    """A file with a text a line, on which evaluations measure the KL of the reference to the
    policy and the policy's loss; null: none."""
    limit_samples: Annotated[Count, Field(ge=16)] | None = None
    """Completions of each evaluation prompt, sampled before training, that tell the least KL which
    a score must cost, 64-1024; null: not measured."""
    histograms_every: Count | None = 25
    """Phases between histograms of advantages, ratios and token KL; null: none."""
    checkpoint_every: Count | None = 50
    """Phases between checkpoints, besides those at the best evaluation and at the end; null: only
    when asked to stop."""
    snapshots: Annotated[SnapshotPhases | None, OneKind] = None
    """Phases after which the trained weights are kept in snapshots/, to look at the run: log (0, 1,
    2, 4, 8 ... and the last), every so many and the last, or a list; null: none."""
    snapshot_dtype: SnapshotDtype = "fp32"
    """Dtype of snapshots: fp32; bf16 halves them and rounds away small changes of weights."""
    on_phase: Text | None = None
    """A function of yours, FILE.py:FUNCTION or MODULE:FUNCTION, that looks at policy, phase and
    rollout after phases; its numbers are logged as own/NAME; null: none."""
    on_phase_every: Count = 10
    """Phases between calls of on_phase, which is also called after the last."""
    estimator: Estimator = GAE()
    """How rewards become advantages: stage/estimator=gae, one_step, leave_one_out,
    group_normalized, reinforce or best_of_group."""
    objective: Objective = PPOClip()
    """What learning maximises: stage/objective=ppo_clip, sequence_ratio or policy_gradient."""
    guards: Guards = Guards()
    """Limits on KL, steps that are not finite, and failing rewards."""
    compute: Compute = Compute()
    """Precision, compilation and memory."""

    @model_validator(mode="after")
    def _agrees(self) -> "PPOSettings":
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self

    @property
    def text_file(self) -> TextFile | None:
        """The file of eval_text."""
        return None if self.eval_text is None else TextFile(self.eval_text)

    @property
    def minibatch_size(self) -> int:
        """Completions per optimizer step."""
        return self.batch_size // self.num_minibatches

    @property
    def kl_coefficient(self) -> KLCoefficient:
        """The weight of the KL, constant or adapted."""
        return KLCoefficient(
            start=self.kl_coef, target=self.adaptive_kl_target, horizon=self.kl_horizon,
            batch_size=self.batch_size,
        )  # fmt: skip

    def coefficients(self, kl_coef: float) -> Coefficients:
        """The weights of the loss's terms, with `kl_coef` for the KL."""
        return Coefficients(
            clip_coef=self.clip_coef, vf_coef=self.vf_coef, value_clip_coef=self.value_clip_coef,
            ent_coef=self.ent_coef, kl_coef=0.0 if self.kl_penalty == "reward" else kl_coef,
            kl_term="k3" if self.kl_penalty == "loss_k3" else "exact",
        )  # fmt: skip


def _contradictions(ppo: PPOSettings) -> Iterator[str]:
    for name in ("num_minibatches", "samples_per_prompt"):
        if ppo.batch_size % (count := getattr(ppo, name)):
            yield f"batch_size={ppo.batch_size} must be a multiple of {name}={count}"
    name, samples = type(ppo.estimator).__name__, ppo.samples_per_prompt
    if samples < (least := ppo.estimator.min_samples_per_prompt):
        yield f"samples_per_prompt={samples}: {name} needs at least {least}; set it {2 * least}"
    baseline = ppo.estimator.baseline if isinstance(ppo.estimator, Reinforce) else "batch_mean"
    if ppo.normalize_reward and baseline != "batch_mean":
        yield (
            f"normalize_reward=true subtracts the batch's mean before estimator.baseline={baseline}"
            " does: set it false"
        )
    if ppo.kl_penalty == "return" and (change := ppo.estimator.to_keep_scale):
        yield (
            f"kl_penalty=return: {name} scales advantages, and with them the KL in the returns, but"
            f" not the KL in the loss: {change}"
        )
    if isinstance(ppo.snapshots, tuple) and (late := max(ppo.snapshots, default=0)) > (
        last := ppo.total_phases
    ):
        yield f"snapshots: phase {late} is above total_phases={last}"
    if not ppo.estimator.needs_values:
        if ppo.value_clip_coef is not None:
            yield f"value_clip_coef={ppo.value_clip_coef:g}: {name} has no values; set it null"
        if ppo.value_model == "separate":
            yield f"value_model=separate: {name} has no values; set it shared"
        if ppo.value_detach:
            yield f"value_detach=true: {name} has no values; set it false"
    elif ppo.value_model == "separate" and ppo.value_detach:
        yield "value_detach=true: value_model=separate leaves no shared weights; set it false"
    yield from ppo.compute.too_large(batch=ppo.batch_size, minibatch=ppo.minibatch_size)
    yield from ppo.kl_coefficient.problems()
