"""The judge: it follows the label, counts words by sample, and reads a run's first and last."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_exp.report.judge import Verdict, judge, tfidf_judge
from rlhf_exp.tasks.protocol import LabelledText, Split
from rlhf_exp.tasks.reviews import Reviews

from ..scripts import call_script


def rows(texts: list[str], score: float) -> list[dict[str, object]]:
    return [{"prompt": "this film", "completion": f" {t}", "score": score} for t in texts]


def by_words(split: Split, label: str, before: list[Any], after: list[Any]) -> Verdict:
    judges = {"TF-IDF": tfidf_judge(split, label)}
    return judge(judges, split.held_out, label, before, after, are_conversations=False)


def test_it_sees_the_shift_that_the_samples_make_and_no_other() -> None:
    split = Reviews(num_labelled=1500, num_held_out=300).labelled_split()
    texts = {
        label: [t.text for t in split.held_out if t.label == label][:60] for label in ("pos", "neg")
    }
    before, after = rows(texts["neg"], 0.25), rows(texts["pos"], 0.75)
    verdict = by_words(split, "pos", before, after)
    opinion = verdict.opinions["TF-IDF"]
    assert opinion.held_out_accuracy > 0.95
    assert verdict.reward == (0.25, 0.75)
    assert opinion.mean[0] < 0.2
    assert opinion.mean[1] > 0.8
    assert opinion.share == (0.0, 1.0)
    back = by_words(split, "neg", before, after)
    assert back.opinions["TF-IDF"].mean == pytest.approx([1 - x for x in opinion.mean], abs=0.02)
    same = by_words(split, "pos", before, before).opinions["TF-IDF"]
    assert same.mean[0] == same.mean[1]


def test_samples_without_scores_have_no_mean_reward() -> None:
    split = Reviews(num_labelled=300, num_held_out=50).labelled_split()
    bare = [{k: v for k, v in row.items() if k != "score"} for row in rows(["dull", "fine"], 0.0)]
    verdict = by_words(split, "pos", bare, bare)
    assert verdict.reward is None
    assert verdict.opinions == by_words(split, "pos", *[rows(["dull", "fine"], 0.0)] * 2).opinions


def test_words_are_counted_once_a_sample_without_case_and_punctuation() -> None:
    split = Reviews(num_labelled=300, num_held_out=50).labelled_split()
    before = rows(["Dull dull."] * 12, 0.0)
    after = rows(["fine, I don't say so"] * 3 + ['"Fine!"'] * 4 + ["FINE fine"] * 4, 1.0)
    verdict = by_words(split, "pos", before, after)
    assert verdict.rising_words == [("fine", 0, 11)]
    assert verdict.falling_words == [("dull", 12, 0)]


def test_words_that_change_by_chance_are_left_out() -> None:
    """7 > 2.5 sqrt(7), but 6 < 2.5 sqrt(6); 14 > 2.5 sqrt(30), but 13 < 2.5 sqrt(29)."""
    split = Reviews(num_labelled=300, num_held_out=50).labelled_split()
    counts = {"seven": (0, 7), "six": (0, 6), "down": (22, 8), "nearly": (21, 8), "same": (9, 9)}
    before, after = (
        rows([word for word, n in counts.items() for _ in range(n[i])], 0.0) for i in (0, 1)
    )
    verdict = by_words(split, "pos", before, after)
    assert verdict.rising_words == [("seven", 0, 7)]
    assert verdict.falling_words == [("down", 22, 8)]


def test_of_a_conversation_the_judges_read_the_completion_alone() -> None:
    read: list[str] = []

    def score(texts: Sequence[str]) -> list[float]:
        read.extend(texts)
        return [0.0] * len(texts)

    before, after = (
        [{"prompt": "system\nBe fine\nuser\nHow is it?\nassistant\n", "completion": text}]
        for text in ("Dull.", "Good.")
    )
    held_out = [LabelledText("neg", "poor")]
    judge({"any": score}, held_out, "pos", before, after, are_conversations=True)
    assert read == ["poor", "Dull.", "Good."]


def rated_run(path: Path, **label: object) -> Path:
    """A run over texts rated 1 to 5, whose samples hold the word of a rating of 1 at first, of 2 at
    the end."""
    words = ["dull", "poor", "fair", "good", "fine"]
    lines = ["label\ttext"]
    lines += [f"{i % 5 + 1}\tfilm {i} is {words[i % 5]} and i say so" for i in range(300)]
    (path / "texts.tsv").write_text("\n".join(lines) + "\n")
    config = {
        "task": {
            "_target_": "rlhf_exp.tasks.labelled_text.LabelledTextFile",
            "path": str(path / "texts.tsv"),
        },
        "reward": {
            "_target_": "rlhf_exp.rewards.classifier.Classifier",
            "name": "artifact:classifier",
            **label,
        },
    }
    (path / ".hydra").mkdir()
    (path / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    samples = [
        {"phase": phase, "prompt": "film 1", "completion": f" is {word} and i say so", "score": 0.5}
        for phase, word in ((0, "dull"), (9, "poor"))
        for _ in range(10)
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return path


@pytest.mark.parametrize(("label", "rises"), [(1, False), ("1", False), (2, True)])
def test_the_judge_reads_a_label_that_is_a_number(
    tmp_path: Path, label: object, rises: bool
) -> None:
    outcome = call_script("judge.py", rated_run(tmp_path, label=label))
    assert outcome.returncode == 0, outcome.stderr
    share = next(line for line in outcome.stdout.splitlines() if "share" in line).split()
    assert (share[-4], share[-2]) == (("0.000", "1.000") if rises else ("1.000", "0.000"))


def test_the_script_judges_the_answers_of_a_run_of_conversations(tmp_path: Path) -> None:
    """The prompts are about the best rating, the answers about the worst and the next."""
    run = rated_run(tmp_path, label=2)
    config = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
    config["task"] = {"_target_": "rlhf_exp.tasks.instructions.Instructions"}
    (run / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    samples = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text(samples.replace("film 1", "film 1 is fine " * 20))
    outcome = call_script("judge.py", run, "--labelled", run / "texts.tsv", "--label", 2)
    assert outcome.returncode == 0, outcome.stderr
    share = next(line for line in outcome.stdout.splitlines() if "share" in line).split()
    assert (share[-4], share[-2]) == ("0.000", "1.000")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"label": 0}, "reward.label=0: the task has no such label"),
        ({"label": 6}, "reward.label=6: the task has no such label"),
        ({"direction": "pos"}, "reward.direction='pos': the task has no such label"),
    ],
)
def test_the_judge_names_a_label_that_the_task_lacks(
    tmp_path: Path, label: dict[str, object], message: str
) -> None:
    outcome = call_script("judge.py", rated_run(tmp_path, **label))
    assert outcome.returncode == 2
    assert message in " ".join(outcome.stderr.split())


def test_the_accuracy_is_that_of_the_held_out_texts() -> None:
    train, held_out = Reviews(num_labelled=300, num_held_out=50).labelled_split()
    other = {"pos": "neg", "neg": "pos"}
    mislabelled = tuple(text._replace(label=other[text.label]) for text in held_out)
    samples = rows(["dull"], 0.0)
    right, wrong = (
        by_words(Split(train, texts), "pos", samples, samples).opinions["TF-IDF"].held_out_accuracy
        for texts in (held_out, mislabelled)
    )
    assert right > 0.8
    assert wrong == pytest.approx(1 - right)
