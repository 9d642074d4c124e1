import pytest

from rlhf_exp.functional.kl_controller import adapted_kl_coef


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        # 0.15 (1 + e 64 / 10000) with e = clip(kl / 6 - 1, -0.2, 0.2).
        (6.0, 0.15),
        (6.6, 0.150096),
        (9.0, 0.150192),
        (100.0, 0.150192),
        (5.7, 0.149952),
        (0.0, 0.149808),
        (-1.0, 0.149808),
    ],
)
def test_a_table_with_the_settings_of_the_paper(kl, coef):
    given = adapted_kl_coef(0.15, kl, target=6.0, num_completions=64, horizon=1e4)
    assert given == pytest.approx(coef, rel=1e-12)


def test_over_a_horizon_it_changes_by_about_a_fifth():
    up = down = 0.2
    for _ in range(100):
        up = adapted_kl_coef(up, 50.0, target=6.0, num_completions=100, horizon=1e4)
        down = adapted_kl_coef(down, 0.1, target=6.0, num_completions=100, horizon=1e4)
    # (1 +- 0.2 / 100)^100, beside e^0.2 = 1.2214 and e^-0.2 = 0.8187.
    assert up / 0.2 == pytest.approx(1.22116, abs=1e-5)
    assert down / 0.2 == pytest.approx(0.81857, abs=1e-5)


@pytest.mark.parametrize("bad", [{"target": 0.0}, {"horizon": -1.0}])
def test_a_target_or_horizon_of_zero_is_refused(bad):
    given = {"target": 6.0, "horizon": 1e4, "num_completions": 8, **bad}
    with pytest.raises(ValueError, match="must be above 0"):
        adapted_kl_coef(0.1, 1.0, **given)
