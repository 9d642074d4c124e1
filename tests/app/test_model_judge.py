"""scripts/judge.py with a model: finetuned on the labelled texts once, then found again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_exp.models.classifiers import load_classifier
from rlhf_exp.rewards.classifier import Classifier
from tests.builders import completions
from tests.models.test_classifiers import save_body
from tests.scripts import call_script

WORDS = {"bad": "one two three", "good": "seven eight nine"}


def judged_run(path: Path, reward: dict[str, Any], *, rises: bool = True) -> Path:
    """A run on other prompts, whose samples hold the words of the bad texts first, then those of
    the good ones, and a file of labelled texts beside it."""
    path.mkdir()
    (path / ".hydra").mkdir()
    config = {
        "task": {"_target_": "rlhf_exp.tasks.prefix.Prefix", "prefix": "no"}, "reward": reward,
    }  # fmt: skip
    (path / ".hydra/config.yaml").write_text(yaml.safe_dump(config))
    ends = ("bad", "good") if rises else ("good", "bad")
    samples = [
        {"phase": phase, "prompt": "no", "completion": f" {WORDS[label]}", "score": phase / 10}
        for phase, label in zip((0, 5), ends, strict=True)
        for _ in range(10)
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    numbers = ("zero", "four", "five", "six", "no")
    lines = [
        f"{label}\t{numbers[i % 5]} {WORDS[label]} {numbers[i // 5 % 5]} {numbers[i // 25 % 5]}"
        for label in WORDS
        for i in range(125)
    ]
    (path / "texts.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n")
    return path


JUDGE = {
    "_target_": "rlhf_exp.rewards.judge.Judge", "template": "{text}", "answers": [" no", " good"],
}  # fmt: skip
KEYWORD = {"_target_": "rlhf_exp.rewards.keyword.Keyword", "keywords": ["seven"]}


def shown(output: str, name: object) -> list[float]:
    """Accuracy, mean P before and after, of a judge."""
    lines = output.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}, "))
    words = lines[at + 1].split()
    return [float(lines[at].split()[-5]), float(words[-4]), float(words[-2])]


def test_a_model_is_finetuned_once_and_sees_the_shift(tmp_path: Path) -> None:
    save_body(tmp_path / "body", "bert")
    run = judged_run(tmp_path / "run", JUDGE)
    arguments = [run, "--labelled", run / "texts.tsv", "--model", tmp_path / "body"]
    outcome = call_script("judge.py", *arguments, folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "the run's reward: mean 0.000 -> 0.500  (+0.500)" in outcome.stdout
    accuracy, before, after = shown(outcome.stdout, "TF-IDF")
    assert accuracy > 0.9
    assert after - before > 0.5
    assert "rising: " in outcome.stdout
    [trained] = (tmp_path / "outputs/artifacts").glob("judge-*/model/model.safetensors")
    classifier = Classifier(name=str(trained.parents[1]), label="good").load(torch.device("cpu"))
    means = [classifier(completions([f" {w}"], before=["no"])).item() for w in WORDS.values()]
    assert shown(outcome.stdout, tmp_path / "body")[1:] == pytest.approx(means, abs=6e-4)
    written = trained.stat().st_mtime_ns
    again = call_script("judge.py", *arguments, folder=tmp_path)
    assert again.stdout == outcome.stdout
    assert trained.stat().st_mtime_ns == written
    # It is a classifier of these labels, so it needs no training.
    arguments[-1] = trained.parents[1]
    direct = call_script("judge.py", *arguments, "--artifacts", tmp_path / "none", folder=tmp_path)
    assert shown(direct.stdout, str(trained.parents[1])) == shown(again.stdout, tmp_path / "body")
    assert not (tmp_path / "none").exists()
    network, _ = load_classifier(str(trained.parent), dtype=torch.float32)
    assert network.config.label2id == {"bad": 0, "good": 1}


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (JUDGE, [], "the run's task has no labelled texts: add --labelled FILE.tsv"),
        (KEYWORD, ["--labelled", "texts.tsv"], "names no label: add --label with one of bad, good"),
        (
            JUDGE,
            ["--labelled", "texts.tsv", "--label", "x"],
            "no label 'x': add --label with one of bad, good",
        ),
        (JUDGE, ["--labelled", "none.tsv"], "none.tsv"),
        (
            JUDGE,
            ["--labelled", "texts.tsv", "--model", "./none"],
            "--model='./none': no such directory",
        ),
    ],
)
def test_what_is_missing_is_named(
    reward: dict[str, Any], options: list[str], message: str, tmp_path: Path
) -> None:
    run = judged_run(tmp_path / "run", reward)
    outcome = call_script("judge.py", run, *options, folder=run)
    assert outcome.returncode == 2
    assert message in " ".join(outcome.stderr.split())


def test_a_label_may_be_given(tmp_path: Path) -> None:
    run = judged_run(tmp_path / "run", KEYWORD, rises=False)
    options = ["--labelled", run / "texts.tsv", "--label", "bad"]
    outcome = call_script("judge.py", run, *options)
    _, before, after = shown(outcome.stdout, "TF-IDF")
    assert after - before > 0.5


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("samples.jsonl", "", "samples.jsonl holds no sample that can be read"),
        (".hydra/config.yaml", "a: [", "config.yaml cannot be read: while parsing"),
        (".hydra/config.yaml", "a: 1", "config.yaml is not the configuration of a run"),
    ],
)
def test_a_broken_run_is_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    run = judged_run(tmp_path / "run", JUDGE)
    (run / file).write_text(content)
    outcome = call_script("judge.py", run, "--labelled", run / "texts.tsv")
    assert outcome.returncode == 2
    assert message in " ".join(outcome.stderr.split()), outcome.stderr
