"""scripts/limit.py: what it samples, says and draws, and what it says of a mistake."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from rlhf_exp.functional.optimal_frontier import MIN_SAMPLES
from rlhf_exp.report.figures import draw_limit_alone
from rlhf_exp.report.payload import Names, build_payload
from tests.app.test_run import OFFLINE
from tests.report.build_runs import (
    best_of_n_config,
    best_of_n_rows,
    limit_points,
    with_true_reward,
    write_limit,
    write_run,
)
from tests.report.test_limits import STRAIGHT
from tests.scripts import call_script

TINY = ("model.num_layers=1", "model.d_model=16", "sampler.gen_len=6", "reward.keywords=[the, a]",
        "reward.max_count=3", "device=cpu")  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("unchecked")
def test_the_limit_of_a_model_is_tabled_and_drawn(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("this movie was\nthe film\n")
    done = call_script("limit.py", "tiny", "reward=keyword", "reviews", "--samples", 48, "--out",
                       "out", *TINY, folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "limit.json").read_text())
    assert [len(row) for row in content["scores"]] == [48]
    *_, last, told, picture = done.stdout.strip().splitlines()
    score, kl, effective = content["frontier"][-1]
    assert last.split() == [
        f"{score:.4g}", f"{kl:.3f}", f"{effective:.0f}", f"{MIN_SAMPLES * 48 / effective:.0f}",
    ]  # fmt: skip
    assert told.startswith(f"48 samples of each prompt (1) tell the limit up to a KL of {kl:.3g}")
    best = max(content["scores"][0])
    assert told.endswith("no sample scores more" if score == best else "to see further")
    assert picture == "out/limit.png"
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    again = call_script("limit.py", "tiny", "keyword", "reviews", "--out", "out", *TINY,
                        folder=tmp_path)  # fmt: skip
    assert (again.returncode, "holds a run already" in again.stderr + again.stdout) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tiny", "keywrd", "reviews"), "reward=keywrd: no such option"),
        (("tiny", "keyword", "none.txt"), "task.path=none.txt: no such file"),
        (("./none", "keyword", "reviews"), "model.base_model"),
        (("tiny", "keyword", "reviews", "--samples", "1"), "stage.samples_per_prompt=1"),
        (("tiny", "keyword", "reviews", "stage.nonsense=1"), "stage.nonsense: no such key"),
    ],
)
def test_a_mistake_ends_with_its_name(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = call_script("limit.py", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr + done.stdout
    assert len((done.stderr + done.stdout).splitlines()) < 10


def test_the_best_of_n_is_drawn_where_it_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = with_true_reward(best_of_n_rows())
    folder = write_run(tmp_path / "best", best_of_n_config(), rows)
    write_limit(folder, limit_points(), STRAIGHT)
    payload = build_payload([folder], Names(), made=datetime(2026, 11, 21))
    draw_limit_alone(payload, tmp_path)
    ((left, right),) = (figure.axes for figure in figures)
    for axis, name, limit, points in (
        (left, "score", payload["limits"], [[0.0, 0.52], [0.2, 0.7]]),
        (right, "true_reward", payload["true_reward"]["limits"], [[0.0, 0.52], [0.2, 0.69]]),
    ):
        line, best = axis.lines
        assert axis.get_ylabel() == f"eval/{name}"
        assert line.get_xdata().tolist() == [point["kl"] for point in limit[0]["points"]]
        assert best.get_xydata().tolist() == points, "up to 2 of 8"
        assert [text.get_text() for text in axis.texts] == ["1", "2"]
