"""Each preset differs from PPO as its paper does, and a stage's file gives its class's defaults."""

from typing import Any

import pytest

from rlhf_exp.app.run import ALLOWED_TARGETS, instantiate, to_container
from rlhf_exp.stages.best_of_n import BestOfN
from rlhf_exp.stages.dpo import DPO
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.stages.protocol import Stage
from tests.composed import compose

GROUP = "rlhf_exp.rl.estimators."
LOSS = "rlhf_exp.rl.objectives."
# Samples of a prompt are compared with each other, so that their scores need no scale.
FOUR, EIGHT = ({"samples_per_prompt": n, "normalize_reward": False} for n in (4, 8))
PAPERS: dict[str, dict[str, Any]] = {
    # Schulman et al. 2017, equations 7 and 11, section 6.1.
    "ppo": {
        "estimator._target_": f"{GROUP}GAE", "estimator.gae_lambda": 0.95,
        "objective._target_": f"{LOSS}PPOClip", "objective.aggregation": "token_mean",
        "clip_coef": 0.2, "objective.clip_coef_high": None, "objective.dual_clip_coef": None,
        "value_clip_coef": None, "kl_penalty": "loss",
    },
    # Ahmadian et al. 2024, section 3: the other samples are the baseline, the KL is in the reward.
    "rloo": {"estimator._target_": f"{GROUP}LeaveOneOut", "kl_penalty": "reward", **FOUR},
    # Shao et al. 2024, equations 3 and 4; kl_coef in section 4.2.
    "grpo": {
        "estimator._target_": f"{GROUP}GroupNormalized", "estimator.scale": "std",
        "objective.aggregation": "sequence_mean", "kl_penalty": "loss_k3", "kl_coef": 0.04,
        **EIGHT,
    },
    # Liu et al. 2025, section 3.2.
    "dr_grpo": {
        "estimator._target_": f"{GROUP}GroupNormalized", "estimator.scale": "none",
        "objective.aggregation": "constant", "kl_coef": 0.0, **EIGHT,
    },
    # Yu et al. 2025, equation 8 and section 4.1.
    "dapo": {
        "estimator._target_": f"{GROUP}GroupNormalized", "estimator.scale": "std",
        "estimator.equal_groups": "leave_out", "clip_coef": 0.2, "objective.clip_coef_high": 0.28,
        "objective.aggregation": "token_mean", "kl_coef": 0.0, **EIGHT,
    },
    # Williams 1992: one step of the policy that sampled.
    "reinforce": {
        "estimator._target_": f"{GROUP}Reinforce", "estimator.baseline": "batch_mean",
        "objective._target_": f"{LOSS}PolicyGradient", "objective.importance_cap": None,
        "num_minibatches": 1, "batches_per_learning_phase": 1,
    },
    # Dong et al. 2023, algorithm 1.
    "raft": {
        "estimator._target_": f"{GROUP}BestOfGroup", "objective._target_": f"{LOSS}PolicyGradient",
        "num_minibatches": 1, "batches_per_learning_phase": 1, "kl_coef": 0.0,
        "objective.importance_cap": None, **EIGHT,
    },
}  # fmt: skip


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted keys."""
    values = {}
    for key, value in config.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        values |= inner
    return values


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_is_its_papers(name: str) -> None:
    stage, ppo = (
        flat(to_container(compose("~experiment", f"stage={s}"))["stage"]) for s in (name, "ppo")
    )
    wanted = PAPERS[name]
    assert {key: stage[key] for key in wanted} == wanted
    changed = {key for key in stage.keys() & ppo.keys() if stage[key] != ppo[key]}
    assert changed <= {*wanted}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ppo", PPO()),
        ("dpo", DPO(log_every=10, checkpoint_every=100)),  # its updates are few and slow
        ("best_of_n", BestOfN()),
    ],
)
def test_a_stages_file_gives_the_defaults_of_its_class(name: str, expected: Stage[Any]) -> None:
    config, problems = to_container(compose("~experiment", f"stage={name}"))["stage"], []
    assert instantiate(config, "stage", problems, allowed=ALLOWED_TARGETS) == expected
    assert not problems
