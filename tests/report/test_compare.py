import json
import os
import re
import subprocess
import sys

import pytest

from tests.report.build_runs import config, rows, write_run, write_sweep
from tests.scripts import SCRIPTS, call_script

ROOT = SCRIPTS.parent


def test_a_sweep_gets_its_report_in_its_folder(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", {"kl_coef": [0.1, 1.0], "seed": [1, 2]})
    (sweep / "4_broken").mkdir()
    (sweep / "4_broken" / "metrics.jsonl").write_bytes(b"\xff\x00\n{")
    done = call_script("compare.py", "sweep", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[-3:] == [
        "sweep/report/report.md",
        "sweep/report/report.html",
        "",
    ]
    assert {path.name for path in (sweep / "report").iterdir()} == {
        "report.html", "report.md", "frontier.png", "curves.png", "costs.png", "parameters.png",
    }  # fmt: skip
    assert "sweep/4_broken/metrics.jsonl: the last line is cut off" in re.sub(
        r"\s+", " ", done.stdout
    )
    again = call_script("compare.py", "sweep", "--no-html", folder=tmp_path)
    assert "5 runs" in again.stdout, "the report's own folder is no run"


@pytest.mark.parametrize(
    ("redirect", "encoding", "shown"),
    [
        (">/dev/full", "utf-8", ""),
        pytest.param(">&-", "utf-8", "", marks=pytest.mark.soak),
        pytest.param("", "ascii", r"na\xefve/report.html", marks=pytest.mark.soak),
    ],
)
def test_a_report_is_whole_whatever_the_terminal_takes(tmp_path, redirect, encoding, shown):
    write_run(tmp_path / "run", config(), rows(config()))
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable]
    done = subprocess.run(
        [*command, SCRIPTS / "compare.py", "run", "--out", "na\u00efve"],
        capture_output=True, text=True, cwd=tmp_path, timeout=100, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "na\u00efve" / "report.html").is_file()
    assert shown in done.stdout


def test_several_paths_another_folder_and_other_metrics(tmp_path):
    for i in range(2):
        write_run(tmp_path / str(i), config(kl_coef=i), rows(config(kl_coef=i)))
    options = ("--no-html", "--score", "eval/distinct_3", "--kl", "eval/kl_sum")
    assert call_script("compare.py", "0", "1", *options, folder=tmp_path).returncode == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| eval/distinct\\_3 | eval/kl\\_sum |" in text
    assert not (tmp_path / "report" / "report.html").exists()
    elsewhere = call_script("compare.py", "0", *options, "--out", "a/b", folder=tmp_path)
    assert elsewhere.returncode == 0
    assert (tmp_path / "a" / "b" / "report.md").is_file()


@pytest.mark.parametrize("empty", ["empty", "nowhere"])
def test_nothing_to_report_names_the_path_and_writes_nothing(tmp_path, empty):
    (tmp_path / "empty").mkdir()
    done = call_script("compare.py", empty, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{empty}: no ".replace("nowhere: no ", "nowhere: No "))
    assert "no run was found" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not any((tmp_path / "empty").iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_in_a_line(tmp_path):
    write_run(tmp_path / "run", config(), rows(config()))
    (tmp_path / "file").touch()
    done = call_script("compare.py", "run", "--out", "file/report", "--no-html", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: cannot write file/report: Not a directory; set --out\n"


def test_the_synthetic_sweep_of_the_command_line_can_be_compared(tmp_path):
    command = [sys.executable, "-m", "tests.report.build_runs", str(tmp_path / "s")]
    arguments = ["--runs", "5", "--phases", "10"]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True, timeout=60)
    statuses = [json.loads(p.read_text("utf-8")) for p in tmp_path.glob("s/*/status.json")]
    assert len(statuses) == 5
    assert call_script("compare.py", "s", "--no-html", folder=tmp_path).returncode == 0
