import itertools
import subprocess
import sys

import numpy as np
import pytest

from rlhf_exp.report.importance import INSTALL, measure_importance


def grid(**levels):
    return [dict(zip(levels, v, strict=True)) for v in itertools.product(*levels.values())]


def test_an_additive_grid_by_hand():
    # a: -1, 1; b: -2, 2: sums of squares over the eight runs 8 and 32; seeds add -.5 and .5, so 2
    # on 4 degrees of freedom: mean square .5, total 42. (8 - .5) / 42, (32 - .5) / 42; interaction
    # (0 - .5) / 42 -> 0; noise .5 * 7 / 42.
    runs = grid(a=[0, 1], b=[None, "x"], seed=[0, 1])
    scores = [
        (2 * r["a"] - 1) + (2 if r["b"] else -2) + (r["seed"] - 0.5) for r in runs
    ]  # fmt: skip
    found = measure_importance(runs, scores, ["a", "b"])
    assert found.parameters == [
        ("b", pytest.approx(31.5 / 42, rel=1e-9)),
        ("a", pytest.approx(7.5 / 42, rel=1e-9)),
    ]
    assert found.pairs == [("a", "b", 0.0)]
    assert found.noise == pytest.approx(3.5 / 42, rel=1e-9)
    assert "between seeds" in found.note


def test_an_interaction_alone_by_hand():
    # Exclusive or: +1 where a == b, else -1; seeds as above. 8 of total 8 + 2; (8 - .5) / 10.
    runs = grid(a=[0, 1], b=[0, 1], seed=[0, 1])
    scores = [(1 if r["a"] == r["b"] else -1) + r["seed"] - 0.5 for r in runs]
    found = measure_importance(runs, scores, ["a", "b"])
    assert found.pairs == [("a", "b", pytest.approx(0.75, rel=1e-9))]
    assert [share for _, share in found.parameters] == [0.0, 0.0]


def test_three_parameters_share_the_whole_with_the_noise():
    random = np.random.default_rng(0)
    runs = grid(a=[1, 2, 3], b=[1, 2], c=[1, 2, 3, 4], seed=range(4))
    scores = [r["a"] * r["b"] + random.normal(0, 0.5) for r in runs]
    found = measure_importance(runs, scores, ["a", "b", "c"])
    shares = dict(found.parameters)
    assert shares["a"] > 0.4
    assert shares["b"] > 0.2
    assert shares["c"] < 0.02
    assert found.pairs[0][:2] == ("a", "b")
    whole = sum(shares.values()) + sum(share for *_, share in found.pairs) + found.noise
    assert whole == pytest.approx(1, abs=0.02)  # but for three at once, and shares below 0


def test_a_grid_with_holes_is_decomposed_as_well():
    random = np.random.default_rng(1)
    runs = grid(a=[1, 2, 3], b=[1, 2, 3], seed=range(3))[2:-2]
    scores = [2 * r["a"] + random.normal(0, 0.1) for r in runs]
    found = measure_importance(runs, scores, ["a", "b"])
    # Not quite 1: where cells are missing, a little of what a does could be b's.
    assert found.parameters == [
        ("a", pytest.approx(0.92, abs=0.02)),
        ("b", pytest.approx(0, abs=0.01)),
    ]
    assert found.noise < 0.02
    assert "grid" in found.note


def test_without_seeds_the_rest_is_the_noise_and_includes_interactions():
    runs = grid(a=[1, 2, 3, 4], b=[1, 2, 3])
    scores = [r["a"] + 0.01 * ((3 * r["a"] + 5 * r["b"]) % 7) for r in runs]
    found = measure_importance(runs, scores, ["a", "b"])
    assert found.parameters[0] == ("a", pytest.approx(1, abs=0.01))
    assert found.pairs == []
    assert "it includes interactions" in found.note


def test_pure_noise_has_no_important_parameter():
    random = np.random.default_rng(2)
    runs = grid(a=[1, 2], b=[1, 2, 3], seed=range(20))
    found = measure_importance(runs, random.normal(size=120).tolist(), ["a", "b"])
    assert max(share for _, share in found.parameters) < 0.05
    assert found.noise > 0.9


def random_search(count, score, *, noise=0.02):
    random = np.random.default_rng(3)
    runs = [
        {"lr": 10 ** random.uniform(-5, -3), "kl": random.uniform(), "kind": "xy"[n * n % 7 % 2]}
        for n in range(count)
    ]
    return runs, [score(run) + random.normal(0, noise) for run in runs]


def test_a_random_search_is_explained_by_a_forest():
    runs, scores = random_search(80, lambda run: np.log10(run["lr"]) + 0.3 * (run["kind"] == "x"))
    found = measure_importance(runs, scores, ["lr", "kl", "kind"])
    assert [name for name, _ in found.parameters] == ["lr", "kind", "kl"]
    assert found.parameters[0][1] > 0.7
    assert found.parameters[2][1] < 0.05
    assert found.noise < 0.15
    assert max(share for *_, share in found.pairs) < 0.05, "it is additive"
    assert "forest" in found.note
    assert measure_importance(runs, scores, ["lr", "kl", "kind"]) == found


def test_a_forests_shares_are_of_what_it_explains_of_runs_that_it_was_not_shown():
    runs, scores = random_search(100, lambda run: np.log10(run["lr"]), noise=0.5)
    found = measure_importance(runs, scores, ["lr", "kl", "kind"])
    assert found.noise > 0.3  # .25 / (.25 + 4/12) = .43 of the variance is noise
    singles = sum(share for _, share in found.parameters)
    assert singles + sum(share for *_, share in found.pairs) <= 1.01 - found.noise


def test_a_forest_finds_what_two_parameters_do_together():
    runs, scores = random_search(150, lambda run: (run["kl"] > 0.5) != (run["kind"] == "x"))
    found = measure_importance(runs, scores, ["lr", "kl", "kind"])
    assert set(found.pairs[0][:2]) == {"kl", "kind"}
    assert found.pairs[0][2] > 0.5
    assert max(share for _, share in found.parameters) < 0.2


def test_a_forest_that_predicts_nothing_gives_no_numbers():
    runs, scores = random_search(30, lambda run: 0.0)
    found = measure_importance(runs, scores, ["lr", "kl"])
    assert (found.parameters, found.pairs, found.noise) == ([], [], None)
    assert "no better than the mean" in found.note


@pytest.mark.parametrize(
    ("runs", "scores", "said"),
    [
        (grid(seed=[1, 2, 3, 4]), [1, 2, 3, 4], "differ in no parameter"),
        (grid(a=[1, 2]), [1, 2], "2 finished runs are too few"),
        (grid(a=[1, 2], seed=[1, 2]), [3, 3, 3, 3], "the same score"),
        (grid(a=[1, 2, 3, 4]), [1, 2, 3, 4], "add seeds"),
        ([{"a": n, "b": n * n % 7} for n in range(8)], [*range(8)], "8 finished runs that are no"),
        ([], [], "differ in no parameter"),
    ],
)
def test_too_few_runs_are_said_and_give_no_number(runs, scores, said):
    found = measure_importance(runs, [float(score) for score in scores], ["a", "b"])
    assert (found.parameters, found.pairs, found.noise) == ([], [], None)
    assert said in found.note


def test_a_parameter_that_copies_another_is_named_and_not_counted():
    runs = [{**run, "c": -run["a"]} for run in grid(a=[1, 2], b=[1, 2], seed=[1, 2])]
    found = measure_importance(runs, [r["a"] + 0.1 * r["seed"] for r in runs], ["a", "b", "c"])
    assert {name for name, _ in found.parameters} == {"a", "b"}
    assert "c changes only together with a." in found.note


def test_without_scikit_learn_the_note_says_how_to_get_it():
    script = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from rlhf_exp.report.importance import measure_importance\n"
        "runs = [{'a': n * 17 % 23, 'b': n * n % 19} for n in range(20)]\n"
        "print(measure_importance(runs, [float(n) for n in range(20)], ['a', 'b']).note)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert INSTALL in done.stdout
