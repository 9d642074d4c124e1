"""The controller of kl_coef that keeps the KL near a target. Knows numbers, not policies."""

CLIP = 0.2


def adapted_kl_coef(
    kl_coef: float, kl: float, *, target: float, num_completions: int, horizon: float
) -> float:
    """The coefficient after `num_completions` samples whose KL to the reference is `kl`.

    kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_completions / horizon), with `kl` and `target`
    in nats a completion and `horizon` in completions. Source: Ziegler et al. 2019, arXiv
    1909.08593, section 2.2; the gain of 0.1 a batch there is num_completions / horizon here, as in
    their code (lm_human_preferences/train_policy.py, AdaptiveKLController). Raises ValueError
    unless target and horizon are above 0.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"target={target} and horizon={horizon} must be above 0")
    error = min(max(kl / target - 1, -CLIP), CLIP)
    return kl_coef * (1 + error * num_completions / horizon)
