import io

import pytest
from matplotlib import image
from rich.console import Console

from rlhf_exp.training.curves import plot_score_and_kl, print_before_after

ROWS = [
    {"phase": 0, "eval/score": 0.4, "eval/kl": 0.0},
    {"phase": 1, "objective/scores": 0.45, "objective/kl": 0.01},
    {"phase": 2, "objective/scores": None, "objective/kl": 0.03},
    {"phase": 3, "objective/scores": 0.7, "objective/kl": 0.04},
    {"phase": 3, "eval/score": 0.8, "eval/kl": 0.05},
]


SCORE, KL = (0x0B, 0x6E, 0x4F), (0xB3, 0x54, 0x1E)


def drawn(rows, path):
    """How many pixels have the score's color in the upper half and KL's in the lower: opaque, as
    evaluations are, and pale, as lines are."""
    pixels = image.imread(plot_score_and_kl(rows, path, title="PPO"))[..., :3]
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
