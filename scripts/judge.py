"""Scores the samples of a finished run of labelled_text or reviews with an independent classifier:
python scripts/judge.py RUN_FOLDER"""

import argparse
from pathlib import Path

from rlhf_exp.app.run import ALLOWED_TARGETS, instantiate
from rlhf_exp.machine.streams import make_streams_unbreakable
from rlhf_exp.report.judge import judge
from rlhf_exp.rewards.classifier import Classifier
from rlhf_exp.runs.paths import SAMPLES, read_hydra_config
from rlhf_exp.runs.samples import read_ends
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.protocol import LabelledTask


def main() -> None:
    """Prints the reward's and the judge's scores of the samples before and after training."""
    make_streams_unbreakable()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run = parser.parse_args().run
    if not (run / SAMPLES).is_file():
        parser.error(f"{run} holds no {SAMPLES}: name the folder of a finished run")
    config = read_hydra_config(run)
    problems: list[str] = []
    task, reward = (
        instantiate(config[part], part, problems, allowed=ALLOWED_TARGETS)
        for part in ("task", "reward")
    )
    if problems or not isinstance(task, LabelledTask):
        parser.error("; ".join(problems) or "the run's task has no labelled texts")
    if not isinstance(reward, Classifier):
        parser.error("the run's reward names no label; only reward=classifier has one")
    split = task.labelled_split()
    # Sorted as in a classifier trained on the task.
    labels = sorted({text.label for text in split.train})
    try:
        label = labels[reward.find_label(labels, owner="the task")]
    except ConfigError as error:
        parser.error(str(error))
    verdict = judge(split, label, *read_ends(run / SAMPLES))
    print(f"judge: TF-IDF logistic regression, {verdict.held_out_accuracy:.3f} on held-out texts")
    for name, (old, new) in (
        ("reward, mean", verdict.reward),
        ("judge, mean", verdict.judge_prob),
        ("judge, share > .5", verdict.positive_fraction),
    ):
        print(f"  {name:18} {old:.3f} -> {new:.3f}  ({new - old:+.3f})")
    for title, words in (("rising", verdict.rising_words), ("falling", verdict.falling_words)):
        print(f"{title}: " + ", ".join(f"{word} {old}>{new}" for word, old, new in words))


if __name__ == "__main__":
    main()
