"""Configurations drawn at random, hundreds in `make soak`: a wrong one is refused by name before
anything is loaded, a right one passes every check."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
import safetensors.torch
import torch
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp.app import run
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.reviews import Reviews
from tests.app.test_run import TINY, assert_refused, train, written
from tests.builders import without_checks
from tests.config_cases import Base, Case, invalid_cases, valid_cases
from tests.reliability import count_cases

SEED = 7
COUNTS = [100, pytest.param(300, marks=pytest.mark.soak)]
SMALL_REVIEWS = ["task.num_reviews=60", "task.num_labelled=40", "task.num_held_out=20"]
STAGES = {
    "ppo": ["~experiment", *SMALL_REVIEWS],
    "ppo with another of every part": [
        "~experiment", *SMALL_REVIEWS, "finetune=lora", "reward=sum", "schedule=cosine",
        "logger=local", "sampler=bridge",
    ],
    "sft": ["~experiment", "stage=sft", *SMALL_REVIEWS],
    "classifier": ["~experiment", "stage=classifier", "model=tiny_classifier", *SMALL_REVIEWS],
    "preferences": ["~experiment", "stage=preferences", "sampler.stop_at_eos=true",
                    "reward=length", *SMALL_REVIEWS],
    "best_of_n": ["~experiment", "stage=best_of_n", "reward=length", *SMALL_REVIEWS],
    "reward_model": ["~experiment", "stage=reward_model", "model=local", "task=pairs",
                     "model.base_model=DIR", "task.path=PAIRS"],
    "dpo": ["~experiment", "stage=dpo", "model=tiny", "task=pairs", "~reward",
            "task.path=PAIRS"],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What configurations name of files."""
    folder = tmp_path_factory.mktemp("files")
    labelled = Reviews(num_labelled=300, num_held_out=1).labelled_split().train
    pairs = [{"prompt": f"p {i}", "chosen": " a", "rejected": " b"} for i in range(40)]
    prompts = [{"prompt": f"{i} is a film", "text": f"{i} " + 60 * "film "} for i in range(40)]
    contents = {
        "FILE.tsv": "label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in labelled),
        "PAIRS.jsonl": "".join(json.dumps(row) + "\n" for row in pairs),
        "FILE.jsonl": "".join(json.dumps(row) + "\n" for row in prompts),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    return {name: folder / name for name in contents}


@pytest.fixture(scope="module")
def bases(files: dict[str, Path]) -> dict[str, Base]:
    """Every experiment and every stage by itself, composed once."""
    experiments = {path.stem: [f"experiment={path.stem}"] for path in run.CONF.glob("experiment/*")}
    experiments["reviews"] += SMALL_REVIEWS
    experiments["labelled_text"] += [f"task.path={files['FILE.tsv']}"]
    for name in ("imdb_sentiment_trl", "tldr"):
        experiments[name] += [f"task.path={files['FILE.jsonl']}", "task.eval_split=null"]
    experiments["dpo"] += ["model=gpt2", f"task.path={files['PAIRS.jsonl']}"]
    experiments["yours"] += ["model=gpt2", "task=prefix", "reward=length"]
    experiments["minilm_sentiment"] += [f"task.path={files['FILE.tsv']}"]
    for name in experiments:  # so that the models need not be there
        if name.startswith(("smollm2", "minilm")):
            experiments[name] += ["model.fetch=true"]
    chosen = {**dict(sorted(experiments.items())), **STAGES}
    with hydra.initialize_config_dir(str(run.CONF), version_base="1.3"):
        return {
            name: Base(name, hydra.compose("config", overrides=[
                word.replace("PAIRS", str(files["PAIRS.jsonl"])) for word in words
            ]))
            for name, words in chosen.items()
        }  # fmt: skip


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As long as it lasts there are no networks, and no weights are read."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    with without_checks():
        yield


def complaint(base: Base, case: Case, path: Path) -> str | None:
    """What is said of a configuration, None if it passes. Whatever else it raises is an error."""
    words = [f"experiment={case.base}", *case.words]  # a message asks for one that is missing
    try:
        run.check(base.changed(case.words), path, words, sweep=False)
    except (ConfigError, OmegaConfBaseException) as error:
        return run.explain(error)
    return None


def names(said: str, case: Case) -> bool:
    """Whether a line of the message begins with what is wrong."""
    begins = tuple(f"{name}{after}" for name in case.named for after in ("=", ":", ".", " "))
    return any(line.removeprefix("error: ").startswith(begins) for line in said.splitlines())


@pytest.mark.parametrize("count", COUNTS)
def test_what_is_wrong_is_refused_by_name(
    count: int,
    bases: dict[str, Base],
    nothing_loads: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = invalid_cases(random.Random(SEED), [*bases.values()], count)
    accepted, unnamed = [], []
    for case in cases:
        said = complaint(bases[case.base], case, tmp_path / "run")
        if said is None:
            accepted.append(case)
        elif not names(said, case):
            unnamed.append((case, said))
    assert (accepted, unnamed) == ([], []), f"seed {SEED}"
    assert written(tmp_path) == []
    assert len(cases) == count
    assert len({case.kind for case in cases}) == 8
    assert {case.base for case in cases} == bases.keys()
    count_cases("invalid configurations", len(cases), lost=len(accepted))


@pytest.mark.parametrize("count", COUNTS)
def test_what_is_right_passes(
    count: int,
    bases: dict[str, Base],
    nothing_loads: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = valid_cases(random.Random(SEED), [*bases.values()], count)
    refused = [
        (case, said)
        for case in cases
        if (said := complaint(bases[case.base], case, tmp_path / "run")) is not None
    ]
    assert refused == [], f"seed {SEED}"
    assert written(tmp_path) == []
    assert len(cases) == count
    assert {case.base for case in cases} == bases.keys()
    count_cases("valid configurations", len(cases), lost=len(refused))


def test_a_command_line_says_the_same(bases: dict[str, Base], tmp_path: Path) -> None:
    cases = invalid_cases(random.Random(SEED + 1), [bases["ppo"]], 60)
    of_kind = {case.kind: case for case in reversed(cases) if "=" in case.words[0]}
    assert len(of_kind) == 8
    for case in of_kind.values():
        outcome = train(tmp_path, *TINY, *SMALL_REVIEWS, *case.words, "--dry-run")
        assert_refused(outcome)
        assert names(outcome.out + outcome.err, case), (case, outcome)
    assert {Path(name).name for name in written(tmp_path)} <= {"train.log"}
