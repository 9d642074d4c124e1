"""Jobs keep their numbers and folders however often a sweep is started."""

import json
import string
from dataclasses import replace

import pytest

from rlhf_exp.settings import ConfigError
from rlhf_exp.sweeps.jobs import BadJobs, identity, place, read_record, slug, write_record
from tests.sweeps.build_jobs import build_job

CONFIG = {
    "seed": 1,
    "stage": {"_target_": "rlhf_exp.stages.ppo.PPO", "kl_coef": 0.1},
    "prepare": {"base": {"stage": {"epochs": 2}}},
    "logger": {"project": "x"},
    "device": "auto",
    "dry_run": False,
}


def test_a_folder_name_has_no_slashes_and_says_what_it_is_of():
    assert slug("stage.kl_coef=0.1,model.base_model=a/b c") == (
        "stage.kl_coef=0.1,model.base_model=a-b-c"
    )
    assert slug("/") == "default"
    assert set(slug(string.printable)) <= {*string.ascii_letters, *string.digits, *"._=,+-"}
    assert slug("x" * 80) == "x" * 80


def test_long_folder_names_stay_different_and_short():
    long = [slug("x" * 100 + end) for end in ("a", "b")]
    assert len({*long}) == 2
    assert all(len(name) == 80 and name.startswith("x" * 71) for name in long)
    assert len(slug("y" * 50, limit=20)) == 20


@pytest.mark.parametrize(
    ("swept", "label"),
    [
        (("stage.kl_coef=0.1", "seed=2"), "kl_coef=0.1,seed=2"),
        (("model.context_len=8", "sampler.gen_len=4"), "context_len=8,gen_len=4"),
        # Keys that end alike are told apart by all of their parts, on both sides.
        (("seed=1", "prepare.base.seed=2"), "seed=1,prepare.base.seed=2"),
        (("a.lr=1", "b.lr=2", "c.eps=3"), "a.lr=1,b.lr=2,eps=3"),
        (("+stage.extra=1", "~hub"), "extra=1,hub"),
        (("task.prefix='a b'",), "prefix=a b"),
        ((r"task.prefix=a\,b\=c\ d",), "prefix=a,b=c d"),
        (("task.prefix=x=y",), "prefix=x=y"),
        # What a search draws; what people write stays as it is.
        (("stage.kl_coef=0.10427831862839211",), "kl_coef=0.1043"),
        (("optimizer.base_lr=3.4829104128e-05",), "base_lr=3.483e-05"),
        (("a.b=-0.123456789",), "b=-0.1235"),
        (("optimizer.base_lr=1e-4",), "base_lr=1e-4"),
        (("stage.kl_coef=1.2345", "stage.batch_size=123456"), "kl_coef=1.2345,batch_size=123456"),
        ((), "all defaults"),
    ],
)
def test_a_label_is_as_short_as_it_can_be_without_being_ambiguous(swept, label):
    assert build_job(*swept).label == label


def test_what_does_not_determine_results_is_no_part_of_the_identity():
    other = {
        **CONFIG,
        "logger": None,
        "device": "cuda",
        "dry_run": True,
        "skip_completed": True,
        "resume": "x",
        "hub": {"push": True},
        "artifacts_dir": "elsewhere",
        "allow_targets": ["mine"],
    }
    assert identity(other) == identity(CONFIG)
    assert identity(dict(reversed(CONFIG.items()))) == identity(CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"stage": {**CONFIG["stage"], "kl_coef": 0.1 + 1e-12}},
        {"stage": {**CONFIG["stage"], "_target_": "rlhf_exp.stages.sft.SFT"}},
        {"prepare": {"base": {"stage": {"epochs": 3}}}},
        {"until": "base"},
    ],
)
def test_every_hyperparameter_is_part_of_the_identity(change):
    assert identity({**CONFIG, **change}) != identity(CONFIG)


def test_jobs_are_numbered_in_order_with_a_folder_that_says_what_they_are(tmp_path):
    jobs = place(tmp_path, [build_job("model.base_model=a/b"), build_job("stage.kl_coef=0.3")])
    assert [job.number for job in jobs] == [0, 1]
    assert [job.folder for job in jobs] == [
        tmp_path / "0_base_model=a-b",
        tmp_path / "1_kl_coef=0.3",
    ]
    assert not any(tmp_path.iterdir()), "to place is not to write"


def test_a_second_call_keeps_numbers_and_folders_and_goes_on_counting(tmp_path):
    first = place(tmp_path, [build_job("seed=1"), build_job("seed=2"), build_job("seed=3")])
    write_record(tmp_path, first, command=["train.py"])
    again = place(
        tmp_path,
        [
            build_job("seed=9"),
            replace(build_job("seed=2"), seconds=4.0),
            build_job("seed=8"),
            # The same job under other words keeps its old folder.
            build_job("seed=1", "stage.kl_coef=0.1", identity="seed=1"),
        ],
    )
    assert [job.number for job in again] == [3, 1, 4, 0]
    assert [job.folder.name for job in again] == ["3_seed=9", "1_seed=2", "4_seed=8", "0_seed=1"]
    assert again[1].seconds == 4.0, "what is new about a job is kept"
    assert again[3].swept == ("seed=1", "stage.kl_coef=0.1")


def test_jobs_that_are_the_same_run_once(tmp_path):
    twins = [build_job("a=1", identity="x"), build_job("a=1.0", identity="x"), build_job("a=2")]
    assert [(job.number, job.swept) for job in place(tmp_path, twins)] == [
        (0, ("a=1",)),
        (1, ("a=2",)),
    ]


def test_jobs_of_one_label_have_folders_of_their_own(tmp_path):
    long = [build_job("task.prefix=" + "x" * 90, identity=name) for name in "ab"]
    folders = [job.folder for job in place(tmp_path, long)]
    assert len({*folders}) == 2


def test_a_record_comes_back_as_it_was_written(tmp_path):
    sweep = tmp_path / "new" / "sweep"
    assert read_record(sweep) == []
    jobs = place(sweep, [build_job("seed=1", phases=None), build_job("task.prefix='é,/ x'")])
    write_record(sweep, jobs, command=["train.py", "-m", "seed=1,2"])
    assert read_record(sweep) == jobs
    assert [path.name for path in sweep.iterdir()] == ["sweep.json"]
    content = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))
    assert content["command"] == ["train.py", "-m", "seed=1,2"]


def test_a_record_moves_with_its_folder(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    write_record(old, place(old, [build_job("seed=1")]), command=[])
    old.rename(new)
    [job] = read_record(new)
    assert job.folder == new / "0_seed=1"


def test_a_record_keeps_the_jobs_of_the_one_before(tmp_path):
    first = place(tmp_path, [build_job("seed=1"), build_job("seed=2")])
    write_record(tmp_path, first[::-1], command=["first"])
    assert [job.number for job in read_record(tmp_path)] == [0, 1]
    second = place(tmp_path, [build_job("seed=3"), build_job("seed=1")])
    write_record(tmp_path, second, command=["second"])
    assert [(job.number, job.swept) for job in read_record(tmp_path)] == [
        (0, ("seed=1",)),
        (1, ("seed=2",)),
        (2, ("seed=3",)),
    ]


@pytest.mark.parametrize(
    "content", ["", '{"jobs": [', "[]", '{"jobs": [{}]}', '{"jobs": 3}', "\x00", 10_000 * "["]
)
def test_a_record_that_cannot_be_read_stops_the_sweep_before_it_numbers_anew(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content, encoding="utf-8")
    for use in (
        lambda: read_record(tmp_path),
        lambda: place(tmp_path, [build_job("seed=1")]),
        lambda: write_record(tmp_path, [build_job("seed=1")], command=[]),
    ):
        with pytest.raises(ConfigError, match=r"sweep\.json cannot be read .*hydra\.sweep\.dir"):
            use()
    assert (tmp_path / "sweep.json").read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    ("key", "value"),
    [("number", "0"), ("number", True), ("phases", 1.5), ("swept", [1]), ("identity", None)],
)
def test_a_record_with_a_value_of_another_type_is_not_read(tmp_path, key, value):
    write_record(tmp_path, place(tmp_path, [build_job("seed=1")]), command=[])
    record = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    record["jobs"][0][key] = value
    (tmp_path / "sweep.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"sweep\.json cannot be read \(.* another type\)"):
        read_record(tmp_path)


@pytest.mark.parametrize("folder", ["../0", "/tmp", "..", ".", "", "a/b", "a\\b", "0\n", 5, None])
def test_a_record_names_no_folder_elsewhere(tmp_path, folder):
    write_record(tmp_path, place(tmp_path, [build_job("seed=1")]), command=[])
    record = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    record["jobs"][0]["folder"] = folder
    (tmp_path / "sweep.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"sweep\.json cannot be read"):
        read_record(tmp_path)


def test_bad_jobs_are_told_by_problem_with_each_job_counted_once():
    error = BadJobs({"a=1: no": ["job 0 (x)", "job 2 (y)"], "b=2: no": ["job 2 (y)"]}, 5)
    assert isinstance(error, ConfigError)
    assert str(error).splitlines() == [
        "2 of 5 jobs cannot run, so nothing was started:",
        "a=1: no",
        "  in job 0 (x), job 2 (y)",
        "b=2: no",
        "  in job 2 (y)",
    ]
