import io

import pytest
from matplotlib import image
from rich.console import Console

from rlhf_exp.tracking.curves import (
    plot_best_of_n,
    plot_margins,
    plot_ppo,
    plot_predictions,
    plot_supervised,
    print_before_after,
)

ROWS = [
    {"phase": 0, "eval/score": 0.4, "eval/kl": 0.0},
    {"phase": 1, "objective/scores": 0.45, "objective/kl": 0.01},
    {"phase": 2, "objective/scores": None, "objective/kl": 0.03},
    {"phase": 3, "objective/scores": 0.7, "objective/kl": 0.04},
    {"phase": 3, "eval/score": 0.8, "eval/kl": 0.05},
]


SCORE, KL, TRUE = (0x0B, 0x6E, 0x4F), (0xB3, 0x54, 0x1E), (0x2C, 0x5A, 0xA0)


def drawn(rows, path):
    """How many pixels have the score's color in the upper half and KL's in the lower: opaque, as
    evaluations are, and pale, as lines are."""
    pixels = image.imread(plot_ppo(rows, path, title="PPO"))[..., :3]
    height, width, _ = pixels.shape
    assert height > 500
    assert width > 800
    counts = []
    for half, color in ((pixels[: height // 2], SCORE), (pixels[height // 2 :], KL)):
        opaque = [c / 255 for c in color]
        pale = [0.55 * c + 0.45 for c in opaque]
        counts += [int((abs(half - tone).max(axis=-1) < 0.02).sum()) for tone in (opaque, pale)]
    return counts


def test_a_picture_has_lines_and_dots_in_both_panels(tmp_path):
    path = tmp_path / "curves.png"
    score_dots, score_lines, kl_dots, kl_lines = drawn(ROWS, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(score_lines, kl_lines) > 200
    assert kl_dots > 100

    one_evaluation = drawn(ROWS[:-1], path)
    # The upper panel's legend has a dot and a line too.
    assert one_evaluation[0] == pytest.approx(score_dots * 2 / 3, rel=0.2)
    assert one_evaluation[2] == pytest.approx(kl_dots / 2, rel=0.2)

    no_rollouts = drawn([row for row in ROWS if "eval/kl" in row], path)
    assert no_rollouts[1] < score_lines / 2
    assert no_rollouts[3] < 20


@pytest.mark.parametrize("length", [1, 2])
def test_a_run_that_has_hardly_begun_is_drawn(tmp_path, length):
    assert drawn(ROWS[:length], tmp_path / "a.png")[2] > 50


def pixels(picture, color, *, alpha=1.0):
    """Rows and columns of the pixels of a color, as shares of the picture's height and width."""
    image_ = image.imread(picture)[..., :3]
    tone = [alpha * c / 255 + 1 - alpha for c in color]
    ys, xs = (abs(image_ - tone).max(axis=-1) < 0.01).nonzero()  # a grid line is 0.017 off the gap
    return ys / image_.shape[0], xs / image_.shape[1]


EXACT_ROWS = [
    {"phase": 0, "eval/score": 2.0, "eval/true_reward": 2.0, "eval/kl": 0.0,
     "eval/exact_match": 0.1, "eval/greedy_exact_match": 0.2},
    {"phase": 1, "objective/scores": 3.0, "objective/kl": 0.01},
    {"phase": 10, "eval/score": 6.0, "eval/true_reward": 3.0, "eval/kl": 0.05,
     "eval/exact_match": 0.5, "eval/greedy_exact_match": 0.9},
]  # fmt: skip


def test_exact_answers_have_a_panel_and_the_gap_is_filled(tmp_path):
    picture = plot_ppo(EXACT_ROWS, tmp_path / "a.png", title="PPO")
    ys, _ = pixels(picture, TRUE)
    top, middle, bottom = (((ys >= a / 3) & (ys < (a + 1) / 3)).sum() for a in range(3))
    assert top > 60  # diamonds of the true reward
    assert middle > 400  # lines and marks of the exact-match rates
    assert bottom < 20
    assert pixels(picture, KL)[0].min() > 0.64
    grey = (0x8A, 0x8A, 0x8A)
    same = [{**row, "eval/true_reward": row["eval/score"]} if "eval/score" in row else row
            for row in EXACT_ROWS]  # fmt: skip
    closed = plot_ppo(same, tmp_path / "b.png", title="PPO")
    gap, none = (len(pixels(p, grey, alpha=0.25)[0]) for p in (picture, closed))
    assert gap > 10000
    assert none < gap / 4  # of the legend


def test_without_answers_there_are_two_panels(tmp_path):
    assert len(pixels(plot_ppo(ROWS, tmp_path / "a.png", title="PPO"), TRUE)[0]) == 0


BEST_OF_N = [
    {"phase": n, "eval/score": 2.0 + n, "eval/kl_sum": n / 4, "eval/true_reward": 2.0}
    for n in (1, 2, 4)
]


def test_the_best_of_n_samples_are_drawn_by_kl_with_the_true_reward_if_there_is_one(tmp_path):
    both = plot_best_of_n(BEST_OF_N, tmp_path / "a.png", title="best of n")
    for color, rises in ((SCORE, True), (TRUE, False)):
        ys, xs = pixels(both, color)
        left, right = (ys[abs(xs - x) < 0.06].min() for x in (0.1, 0.4))  # of n = 1 and n = 2
        assert (right < left - 0.1) == rises
    without = [{k: v for k, v in row.items() if k != "eval/true_reward"} for row in BEST_OF_N]
    alone = plot_best_of_n(without, tmp_path / "b.png", title="best of n")
    assert len(pixels(alone, SCORE)[0]) > 500
    assert len(pixels(alone, TRUE)[0]) == 0


SUPERVISED = [
    {"phase": 50, "train/loss": 3.0},
    {"phase": 100, "train/loss": 1.0},
    {"phase": 100, "heldout/loss": 1.2, "heldout/exact_match": 0.3},
    {"phase": 200, "heldout/loss": 1.0, "heldout/exact_match": 0.8},
    {"phase": 200, "heldout/loss": None, "heldout/exact_match": None},
]


def test_losses_are_drawn_and_rates_where_they_were_measured(tmp_path):
    without = [{k: v for k, v in row.items() if k != "heldout/exact_match"} for row in SUPERVISED]
    with_rates = plot_supervised(SUPERVISED, tmp_path / "a.png", title="model")
    losses_alone = plot_supervised(without, tmp_path / "b.png", title="model")
    assert image.imread(with_rates).shape[0] > image.imread(losses_alone).shape[0] + 200
    assert len(pixels(losses_alone, TRUE)[0]) == 0
    assert pixels(with_rates, TRUE)[0].min() > 0.5
    for picture, lowest in ((with_rates, 0.5), (losses_alone, 0.9)):
        assert len(pixels(picture, SCORE, alpha=0.7)[0]) > 200
        assert len(pixels(picture, KL)[0]) > 60
        assert pixels(picture, KL)[0].max() < lowest


def test_predictions_stand_beside_the_truth(tmp_path):
    true = [i / 10 for i in range(100)]
    picture = plot_predictions(true, true, tmp_path / "a.png", title="rewards")
    ys, xs = pixels(picture, TRUE)
    assert xs.min() > 0.5  # the means of tenths are on the right
    # Higher predictions stand to the right, higher truths above: so dots fall from left to right.
    assert ys[xs < 0.7].mean() > ys[xs > 0.85].mean() + 0.2
    backwards = plot_predictions(true, true[::-1], tmp_path / "b.png", title="rewards")
    ys, xs = pixels(backwards, TRUE)
    assert ys[xs < 0.7].mean() < ys[xs > 0.85].mean() - 0.2
    # Where the truth is far from what is predicted the axes hold both.
    shifted = plot_predictions(true, [x + 30 for x in true], tmp_path / "c.png", title="rewards")
    assert pixels(shifted, TRUE)[0].min() > 0.5


def test_groups_are_of_like_predictions_and_not_of_like_truths(tmp_path):
    predicted = [i / 10 for i in range(100)]
    coin = [10.0 * (i % 2) for i in range(100)]  # which the predictions know nothing of
    picture = plot_predictions(coin, predicted, tmp_path / "a.png", title="rewards")
    ys, xs = pixels(picture, TRUE)
    assert ys.max() - ys.min() < 0.1
    assert xs.max() - xs.min() > 0.3


@pytest.mark.parametrize("count", [1, 4])
def test_a_few_predictions_and_margins_are_drawn_too(tmp_path, count):
    numbers = [float(i) for i in range(count)]
    picture = plot_predictions(numbers, numbers, tmp_path / "a.png", title="rewards")
    assert len(pixels(picture, TRUE)[0]) > 20
    assert len(pixels(plot_margins(numbers, tmp_path / "b.png", title="order"), TRUE)[0]) > 20


def test_margins_stand_beside_what_they_claim(tmp_path):
    sure = [3.0] * 19 + [-3.0]
    picture = plot_margins(sure * 10, tmp_path / "a.png", title="order")
    _, xs = pixels(picture, SCORE, alpha=0.7)
    assert xs.max() < 0.55
    # A claim of 0.95 is right in 0.95 of the cases, or in 0.05 if all is turned round.
    ys, xs = pixels(picture, TRUE)
    assert xs.min() > 0.85
    turned = pixels(plot_margins([-m for m in sure * 10], tmp_path / "b.png", title="order"), TRUE)
    assert turned[0].mean() > ys.mean() + 0.3


def table(before, after):
    out = io.StringIO()
    print_before_after(before, after, Console(file=out, width=90))
    return out.getvalue()


def test_a_table_prints_completions_as_they_are():
    old = {"prompt": "a film ", "completion": "[bold]so[/bold] [/red] [dull]", "score": 0.125}
    new = {"prompt": "a film ", "completion": ":smile: \\[x] \u202fgood", "score": 0.996}
    text = table([old], [new])
    assert "a film [bold]so[/bold] [/red]" in text
    assert "[dull]" in text
    assert "a film :smile: \\[x] \u202fgood" in text
    assert " 0.12 " in text
    assert " 1.00 " in text


def test_a_table_has_no_column_for_scores_that_there_are_not():
    rows = [{"prompt": f"p{i} ", "completion": f"c{i}"} for i in range(2)]
    text = table(rows, rows)
    assert "score" not in text
    lines = [line for line in text.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert cells == [["p0 c0", "p0 c0"], ["p1 c1", "p1 c1"]]


def test_a_table_has_a_row_for_each_pair():
    rows = [{"prompt": f"p{i} ", "completion": f"c{i}", "score": i / 10} for i in range(3)]
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in table(rows, rows[::-1]).splitlines()
        if line.startswith("│")
    ]
    assert cells == [
        ["0.00", "p0 c0", "0.20", "p2 c2"],
        ["0.10", "p1 c1", "0.10", "p1 c1"],
        ["0.20", "p2 c2", "0.00", "p0 c0"],
    ]
    with pytest.raises(ValueError, match="zip"):
        table(rows, rows[:2])
