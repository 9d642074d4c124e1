import io
from datetime import datetime

from rich.console import Console

from rlhf_exp.report.payload import Names, build_payload
from rlhf_exp.report.terminal import print_report
from tests.report.build_runs import config, rows, supervised_rows, write_run, write_sweep


def printed(*paths, width=80):
    payload = build_payload(paths, Names(), made=datetime(2026, 11, 21))
    console = Console(file=io.StringIO(), width=width)
    print_report(payload, console)
    text = console.file.getvalue()
    assert max(map(len, text.split("\n"))) <= width
    return [line.rstrip() for line in text.split("\n")]


def test_a_sweep_at_80_columns(tmp_path):
    grid = {"kl_coef": [0.1, 1.0], "clip_coef": [0.1, 0.2], "lr": [1e-4, 3e-4], "seed": [1, 2, 3]}
    write_sweep(tmp_path / "s", grid)
    lines = printed(tmp_path / "s")
    assert lines[0] == "reviews: 24 runs (24 done)"
    assert lines[1].split() == [
        "kl_coef", "clip_coef", "base_lr", "runs", "eval/score", "eval/kl",
    ]  # fmt: skip
    body = lines[2:10]
    assert all(line.count("[") == 2 and line.endswith("]") for line in body)
    marked = [line.startswith("*") for line in body]
    assert marked == sorted(marked, reverse=True), "the front first"
    assert any(marked)
    assert any(line.startswith("variance of the score: kl_coef 9") for line in lines)


def test_the_brackets_are_called_what_they_are(tmp_path):
    for seeds, told in {
        1: "* on the Pareto front",
        3: "* on the Pareto front; in brackets 95 % t-intervals of the mean",
    }.items():
        grid = {"kl_coef": [0.1, 1.0], "seed": [*range(seeds)]}
        write_sweep(tmp_path / str(seeds), grid, phases=2)
        assert told in printed(tmp_path / str(seeds))


def test_many_parameters_are_a_label_and_wrap(tmp_path):
    for i in range(2):
        settings = config(seed=1) | {"x": {f"parameter_{n}": f"value {i}" for n in range(7)}}
        write_run(tmp_path / f"s/{i}", settings, rows(settings))
    lines = printed(tmp_path / "s")
    assert "parameters" in lines[1]
    assert "parameter_6=value 1" in " ".join(" ".join(lines).split())


def test_markup_in_names_and_errors_is_text(tmp_path):
    write_run(
        tmp_path / "[red]run",
        config(),
        rows(config()),
        status="failed",
        error="[bold]x[/y]\x1b[2J\nz",
    )
    lines = printed(tmp_path / "[red]run")
    assert "  [red]run: [bold]x[/y]�[2J ↵ z" in lines


def test_warnings_and_problems_are_bounded(tmp_path):
    for i in range(12):
        lines = rows(config(), phases=10)
        for row in lines:
            row["policy/clipfrac"] = 0.9
        write_run(tmp_path / f"s/{i}", config(seed=i), lines)
    lines = printed(tmp_path / "s", tmp_path / "nowhere", width=400)
    assert sum("clip fraction" in line for line in lines) == 8
    assert "  ... and 4 more" in lines
    assert f"  {tmp_path}/nowhere: No such file or directory" in lines


def test_supervised_runs_and_one_that_knows_nothing(tmp_path):
    write_run(tmp_path / "s/0", config(), supervised_rows())
    write_run(tmp_path / "s/1", None, [], status="failed")
    lines = printed(tmp_path / "s")
    assert lines[0] == "reviews: 2 runs (1 done, 1 failed)"
    assert lines[2].split() == ["reviews", "1", "-", "-"]
    assert lines[3].split() == ["1", "1", "-", "-"]


def test_a_row_shows_the_score_and_then_the_kl(tmp_path):
    ends = [{"phase": 4, "eval/score": 0.75, "eval/kl": 0.25}]
    lines = printed(write_run(tmp_path / "run", config(), ends))
    assert lines[1].split() == ["parameters", "runs", "eval/score", "eval/kl"]
    assert lines[2].split() == ["*", "reviews", "1", "0.75", "0.25"]
