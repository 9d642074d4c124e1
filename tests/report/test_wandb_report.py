"""The report on a sweep as a run of W&B, offline, as W&B's own reader finds it."""

import json
from pathlib import Path

import pytest

from rlhf_exp.report.wandb_report import log_report, tabulate_runs
from rlhf_exp.runs.reading import read_runs
from rlhf_exp.settings import ConfigError

from ..tracking.wandb_runs import inspect, offline_runs, own_folders

PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c63000100000500010d0a2db40000000049454e44ae426082"
)


def write_run(
    folder: Path, *, kl_coef: float, rows: list[dict[str, float | None]], reward: str | None = None
) -> None:
    """A run's folder as training leaves it, with no more than a report on W&B reads."""
    folder.mkdir(parents=True)
    logger = {"project": "films", "entity": None, "mode": "offline", "tags": []}
    config = {"seed": 1, "stage": {"_target_": "PPO", "kl_coef": kl_coef}, "logger": logger}
    if reward is not None:
        config["reward"] = {"_target_": f"rlhf_exp.rewards.{reward.lower()}.{reward}"}
    (folder / "resolved_config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "status.json").write_text(json.dumps({"status": "done", "error": None}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of two runs, of which the second was not evaluated."""
    folder = tmp_path / "sweeps" / "2026"
    evaluated = [{"phase": p, "eval/score": s, "eval/kl": p / 8} for p, s in ((0, 0.75), (2, 0.5))]
    write_run(folder / "0_a", kl_coef=0.1, rows=evaluated)
    write_run(folder / "1_b", kl_coef=0.3, rows=[{"phase": 1, "objective/scores": 0.25}])
    return folder


def test_a_row_has_what_tells_a_run_apart_and_what_it_came_to(sweep: Path) -> None:
    columns, rows = tabulate_runs(read_runs([sweep])[0])
    best = ["best/eval_score", "best/phase"]
    assert columns == ["run", "status", "stage.kl_coef", *best, "eval/kl", "eval/score"]
    assert rows == [
        ["0_a", "done", 0.1, 0.75, 0, 0.25, 0.5],
        ["1_b", "done", 0.3, None, None, None, None],
    ]


def test_a_choice_of_a_group_is_shown_by_its_class(tmp_path: Path) -> None:
    for name in ("Length", "Keyword"):
        write_run(tmp_path / name, kl_coef=0.1, rows=[{"phase": 1}], reward=name)
    columns, rows = tabulate_runs(read_runs([tmp_path])[0])
    assert columns[2] == "reward"
    assert sorted(row[2] for row in rows) == ["Keyword", "Length"]


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_report_joins_the_group_of_its_sweep(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    if size == "large":
        monkeypatch.setattr("rlhf_exp.report.wandb_report.MAX_PAGE_BYTES", 4)
    pictures = [tmp_path / "frontier.png", tmp_path / "curves.png"]
    for picture in pictures:
        picture.write_bytes(PICTURE)
    page = tmp_path / "report.html"
    page.write_text("<p>\u00e9</p>", encoding="utf-8")
    (tmp_path / "of wandb").mkdir()
    with own_folders(tmp_path / "of wandb"):
        log_report(sweep, pictures, page=page)
    [run] = offline_runs(sweep)
    records = inspect(run, "")
    described = next(r["run"] for r in records if r["type"] == "run")
    assert (described["run_group"], described["job_type"]) == ("2026", "report")
    assert (described["project"], described["display_name"]) == ("films", "report on 2026")
    [item] = [r["history"]["item"] for r in records if r["type"] == "history"]
    shown = {key.rpartition(".")[0] for key in item if key.endswith("._type")}
    media = {"runs", "figures/frontier", "figures/curves"}
    assert shown == (media | {"report"} if size == "small" else media)
    [table] = [json.loads(file.read_text()) for file in run.rglob("*.table.json")]
    assert [row[0] for row in table["data"]] == ["0_a", "1_b"]
    assert len([*run.rglob("*.png")]) == 2
    assert [file.read_text(encoding="utf-8") for file in run.rglob("*.html")] == (
        ["<p>\u00e9</p>"] if size == "small" else []
    )


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in it"):
        log_report(tmp_path, [])
