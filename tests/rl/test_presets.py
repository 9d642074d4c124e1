"""Each preset differs from PPO as its paper does."""

from typing import Any

import pytest

from rlhf_exp.app.run import to_container
from tests.composed import compose

GROUP = "rlhf_exp.rl.estimators."
LOSS = "rlhf_exp.rl.objectives."
PAPERS: dict[str, dict[str, Any]] = {
    # Ahmadian et al. 2024, section 3: the other samples are the baseline, the KL is in the reward.
    "rloo": {"estimator._target_": f"{GROUP}LeaveOneOut", "kl_penalty": "reward"},
    # Shao et al. 2024, equations 3 and 4; kl_coef in section 4.2.
    "grpo": {
        "estimator._target_": f"{GROUP}GroupNormalized", "estimator.scale": "std",
        "objective.aggregation": "sequence_mean", "kl_penalty": "loss_k3", "kl_coef": 0.04,
    },
    # Liu et al. 2025, section 3.2.
    "dr_grpo": {
        "estimator._target_": f"{GROUP}GroupNormalized", "estimator.scale": "none",
        "objective.aggregation": "constant", "kl_coef": 0.0,
    },
    # Yu et al. 2025, equation 8 and section 4.1.
    "dapo": {
        "estimator._target_": f"{GROUP}GroupNormalized", "estimator.scale": "std",
        "estimator.equal_groups": "leave_out", "clip_coef": 0.2, "objective.clip_coef_high": 0.28,
        "objective.aggregation": "token_mean", "kl_coef": 0.0,
    },
    # Williams 1992: one step of the policy that sampled.
    "reinforce": {
        "estimator._target_": f"{GROUP}Reinforce", "objective._target_": f"{LOSS}PolicyGradient",
        "num_minibatches": 1, "batches_per_learning_phase": 1,
    },
    # Dong et al. 2023, algorithm 1.
    "raft": {
        "estimator._target_": f"{GROUP}BestOfGroup", "objective._target_": f"{LOSS}PolicyGradient",
        "num_minibatches": 1, "batches_per_learning_phase": 1, "kl_coef": 0.0,
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
    stage, ppo = (flat(to_container(compose(f"stage={s}"))["stage"]) for s in (name, "ppo"))
    wanted = PAPERS[name]
    assert {key: stage[key] for key in wanted} == wanted
    ours = {"samples_per_prompt", "normalize_reward"}  # groups compare raw scores
    changed = {key for key in stage.keys() & ppo.keys() if stage[key] != ppo[key]}
    assert changed - {*wanted} <= ours
