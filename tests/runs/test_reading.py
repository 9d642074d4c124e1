import json
import os

import pytest

from rlhf_exp.runs.paths import OVERRIDES
from rlhf_exp.runs.reading import read_rows, read_run, read_runs
from rlhf_exp.settings import ConfigError
from tests.report.build_runs import config, rows, samples, supervised_rows, write_run, write_sweep


def test_a_run_is_read_with_its_curves_and_its_end(tmp_path):
    folder = write_run(tmp_path / "run", config(seed=3), rows(config(), phases=4, eval_every=2))
    ((run,), problems) = read_runs([folder])
    assert problems == []
    assert (run.name, run.status, run.error, run.seed, run.seconds) == (
        "run",
        "done",
        None,
        3,
        33.1,
    )
    assert run.config["stage.kl_coef"] == 0.3
    assert run.train.phases == [1, 2, 3, 4]
    assert run.evaluated.phases == [0, 2, 4]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    assert run.final("eval/score") == written[-1]["eval/score"]
    assert run.final("objective/kl") == written[-2]["objective/kl"]
    assert run.train.values["objective/kl"].tolist() == [
        row["objective/kl"] for row in written if "objective/kl" in row
    ]


def test_one_run_is_read(tmp_path):
    folder = write_run(tmp_path / "run", config(seed=3), rows(config(), phases=1))
    run = read_run(folder)
    assert (run.folder, run.seed, run.status) == (folder, 3, "done")
    with pytest.raises(ConfigError, match=r"nowhere is not the folder of a run: .*No such file"):
        read_run(tmp_path / "nowhere")
    write_run(tmp_path / "other", config(seed=4), [])
    with pytest.raises(ConfigError, match="2 runs are below it: name one"):
        read_run(tmp_path)


def test_runs_are_found_in_sweeps_and_folders_of_sweeps_each_once_and_in_the_jobs_order(tmp_path):
    write_sweep(tmp_path / "sweeps" / "a", {"seed": range(1, 12)}, phases=1)
    write_sweep(tmp_path / "sweeps" / "b", {"seed": [1]}, phases=1)
    for other in ("wandb", ".submitit", "report"):
        write_run(tmp_path / "sweeps" / "a" / other / "0", config(), [])
    (tmp_path / "link").symlink_to(tmp_path / "sweeps" / "a")
    (tmp_path / "sweeps" / "a" / "loop").symlink_to(tmp_path / "sweeps")
    (tmp_path / "sweeps" / "a" / "itself").symlink_to(tmp_path / "sweeps" / "a" / "itself")
    runs, problems = read_runs([tmp_path, tmp_path / "sweeps" / "a"])
    assert problems == []
    assert runs[0].folder == tmp_path / "link" / "0_seed=1"
    assert [run.seed for run in runs if "sweeps/a" in str(run.folder.resolve())] == [*range(1, 12)]
    assert len(runs) == 12
    assert {"a/0_seed=1", "b/0_seed=1", "1_seed=2"} <= {run.name for run in runs}


def test_a_folder_without_runs_and_a_path_that_is_none_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    sweep = write_sweep(tmp_path / "sweep", {"seed": [1]}, phases=1)
    (sweep / "1_seed=2").mkdir()
    (sweep / "2_seed=3" / ".hydra").mkdir(parents=True)
    runs, problems = read_runs([tmp_path / "empty", sweep, tmp_path / "nowhere"])
    assert len(runs) == 1
    assert problems == [
        f"{tmp_path}/empty: no run in it (a run has a status.json or a metrics.jsonl)",
        f"{sweep}/1_seed=2: no status.json and no metrics.jsonl",
        f"{sweep}/2_seed=3: a job that did not start, or was killed while starting",
        f"{tmp_path}/nowhere: No such file or directory",
    ]


BAD = [b"[1, 2]", b"{", b'{"eval/score": 1}', b'{"phase": true}', b'{"phase": -1}', b"\xff\x00\xfe"]


@pytest.mark.parametrize("bad", BAD)
def test_a_line_that_is_no_row_is_left_out_and_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"phase": 1}\n' + bad + b'\n\n{"phase": 2}\n')
    problems = []
    assert read_rows(path, problems, growing=False) == [{"phase": 1}, {"phase": 2}]
    what = "a line is not a JSON object with a phase (line 2); left out"
    assert problems == [f"{path}: {what}"]


def test_many_bad_lines_are_one_problem(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"phase": 1}\n1\n' + b"[" * 200_000 + b"\n" + os.urandom(3000) + b"\n2\n")
    problems = []
    assert read_rows(path, problems, growing=False) == [{"phase": 1}]
    assert len(problems) == 1
    assert "line 2 first" in problems[0]


@pytest.mark.parametrize(
    ("tail", "growing", "kept", "said"),
    [
        (b'{"phase": 2, "eval', False, 1, True),
        (b'{"phase": 2, "eval', True, 1, False),
        (b'{"phase": 2}', False, 2, False),
    ],
)
def test_a_cut_last_line_is_no_fault_of_a_run_that_is_writing(tmp_path, tail, growing, kept, said):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"phase": 1}\n' + tail)
    problems = []
    assert len(read_rows(path, problems, growing=growing)) == kept
    assert problems == ([f"{path}: the last line is cut off; left out"] if said else [])


def test_a_phase_twice_keeps_the_later_value_and_joins_both_kinds_of_row(tmp_path):
    lines = [
        {"phase": 2, "objective/kl": 1.0, "eval/kl": 1.0},
        {"phase": 1, "objective/kl": 5},
        {"phase": 2, "objective/kl": 3.0},
    ]
    ((run,), _) = read_runs([write_run(tmp_path / "run", config(), lines)])
    assert run.train.points("objective/kl") == [(1, 5.0), (2, 3.0)]
    assert run.evaluated.points("eval/kl") == [(2, 1.0)]


def test_what_is_no_finite_number_is_unknown_and_nulls_are_remembered(tmp_path):
    values = [0.5, None, "text", True, [1], 10**400, 0.25]
    lines = [{"phase": n, "loss/total": value} for n, value in enumerate(values)]
    lines[0]["loss/value"], lines[1]["loss/value"] = 0.5, True
    folder = write_run(tmp_path / "run", config(), lines)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"phase": 8, "loss/total": NaN, "loss/kl": Infinity}\n')
    ((run,), problems) = read_runs([folder])
    assert run.train.points("loss/total") == [(0, 0.5), (6, 0.25)]
    assert run.train.nulls == {"loss/total": [1]}
    assert run.train.points("loss/value") == [(0, 0.5)]
    assert "loss/kl" not in run.train.values
    assert problems == []


def test_files_that_cannot_be_read_are_named_and_the_rest_is_kept(tmp_path):
    folder = write_run(tmp_path / "run", config(), rows(config(), phases=2))
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    (folder / "samples.jsonl").symlink_to(folder / "samples.jsonl")
    (folder / "status.json").write_bytes(b"\xff\xfe")
    (folder / "resolved_config.json").write_text("[]", encoding="utf-8")
    (folder / "result.json").rename(folder / "other.json")
    (folder / "result.json").touch()
    ((run,), problems) = read_runs([folder])
    assert run.status == "unknown"
    assert [problem.removeprefix(f"{folder}") for problem in problems] == [
        "/status.json: not a JSON object",
        "/result.json: empty",
        "/metrics.jsonl: Is a directory",
        "/resolved_config.json: not a JSON object",
        ": no configuration: its parameters and seed are unknown",
        "/samples.jsonl: Too many levels of symbolic links",
    ]


def test_a_result_stands_in_for_a_status_and_metrics_that_are_lost(tmp_path):
    folder = write_run(tmp_path / "run", config(), rows(config(), phases=2))
    (folder / "status.json").unlink()
    (folder / "metrics.jsonl").write_bytes(b"")
    ((run,), problems) = read_runs([folder])
    assert run.status == "done"
    assert run.final("eval/score") == pytest.approx(0.95, abs=0.05)
    assert problems == [f"{folder}: no metrics, though its status is done"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    folder = write_run(tmp_path / "run", config(), rows(config(), phases=2))
    (folder / "metrics.jsonl").chmod(0)
    assert f"{folder}/metrics.jsonl: Permission denied" in read_runs([folder])[1]


def test_hydras_configuration_stands_in_for_the_resolved_one(tmp_path):
    folder = write_run(tmp_path / "run", None, [])
    (folder / ".hydra").mkdir()
    text = "seed: 7\nstage: {kl_coef: 0.1, path: '${name}', since: 2020-01-01, top: .inf}\n"
    (folder / ".hydra" / "config.yaml").write_text(text, encoding="utf-8")
    ((run,), _) = read_runs([folder])
    assert run.seed == 7
    assert run.config["stage.path"] == "${name}"
    json.dumps(run.config, allow_nan=False)
    (folder / ".hydra" / "config.yaml").write_text("a: [", encoding="utf-8")
    assert f"{folder}/.hydra/config.yaml: not a YAML mapping" in read_runs([folder])[1]


def test_a_failed_run_says_its_error_and_has_no_end_before_its_first_phase(tmp_path):
    lines = rows(config(), phases=5, eval_every=5)
    early = write_run(tmp_path / "0", config(), lines[:3], status="failed", error="out of memory")
    late = write_run(tmp_path / "1", config(), lines, status="interrupted")
    runs, problems = read_runs([early, late])
    assert [(run.status, run.error) for run in runs] == [
        ("failed", "out of memory"),
        ("interrupted", None),
    ]
    assert runs[0].final("eval/score") is None
    assert runs[1].final("eval/score") == lines[-1]["eval/score"]
    assert problems == []


def test_supervised_runs_have_held_out_numbers_beside_the_training_ones(tmp_path):
    ((run,), problems) = read_runs([write_run(tmp_path / "sft", config(), supervised_rows())])
    assert problems == []
    assert list(run.evaluated.values) == ["heldout/loss", "heldout/accuracy"]
    assert run.final("heldout/accuracy") == 0.9
    assert run.train.last("train/loss") == 0.2


def test_samples_come_with_the_run(tmp_path):
    shown = samples([0, 5])
    ((run,), _) = read_runs([write_run(tmp_path / "run", config(), [], shown=shown)])
    assert [sample.prompt for sample in run.samples] == [row["prompt"] for row in shown[:8]]


def test_a_done_run_that_was_only_measured_at_phase_0_has_an_end_without_its_result(tmp_path):
    lines = [{"phase": 0, "eval/score": 0.5, "eval/kl": 0.0}]
    folder = write_run(tmp_path / "run", config(), lines)
    (folder / "result.json").unlink()
    assert read_run(folder).final("eval/score") == 0.5


def test_a_stage_is_named_by_the_command_line_or_by_its_module(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, {"seed": 1, "stage": {"_target_": "rlhf_exp.stages.ppo.PPO"}}, [])
    assert read_run(folder).stage == "ppo"
    overrides = folder / OVERRIDES
    overrides.parent.mkdir(exist_ok=True)
    for words, stage in (
        ("[seed=1]", "ppo"),
        ("[stage=rloo, seed=1, stage=grpo]", "grpo"),
        ("1", "ppo"),
    ):
        overrides.write_text(words)
        assert read_run(folder).stage == stage
