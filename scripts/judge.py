"""Scores the first and last samples of a run with independent classifiers: a logistic regression
and, with --model, a finetuned model.

python scripts/judge.py RUN [--labelled FILE.tsv] [--model minilm]"""

import argparse
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from rlhf_exp.app.instantiate import ALLOWED_TARGETS, instantiate
from rlhf_exp.app.model_judge import model_judge
from rlhf_exp.machine.streams import make_streams_unbreakable
from rlhf_exp.report.judge import NUM_ERRORS, Verdict, judge, tfidf_judge
from rlhf_exp.rewards.classifier import Classifier
from rlhf_exp.rewards.judge import Judge
from rlhf_exp.rewards.judge_check import label_of_answer
from rlhf_exp.runs.paths import CONFIG, SAMPLES, read_hydra_config
from rlhf_exp.runs.samples import read_ends
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.protocol import LabelledTask, PromptRow, Task

LABELLED = "rlhf_exp.tasks.labelled_text.LabelledTextFile"


def main() -> None:
    """Prints the reward's and the judges' scores of the samples before and after training."""
    make_streams_unbreakable()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished run")
    add("--labelled", type=Path, help="tab-separated file with the columns label and text; by"
        " default the run's own task")  # fmt: skip
    add("--label", help="the label to look for; by default the one that the run rewards")
    add("--model", help="classifier, or model to finetune on the labelled texts: minilm, a"
        " directory or a hub name")  # fmt: skip
    add("--artifacts", type=Path, default=Path("outputs/artifacts"), help="where a finetuned model"
        " is kept (%(default)s)")  # fmt: skip
    arguments = parser.parse_args()
    run = arguments.run
    if not (run / SAMPLES).is_file():
        parser.error(f"{run} holds no {SAMPLES}: name the folder of a finished run")
    try:
        config = _configuration(run)
        before, after = read_ends(run / SAMPLES)
        if not before:
            raise ConfigError(f"{run / SAMPLES} holds no sample that can be read")
        task_config = config["task"]
        task = _built(task_config, "task")
        are_conversations = _holds_conversations(task)
        if arguments.labelled is not None:
            task_config = {"_target_": LABELLED, "path": str(arguments.labelled)}
            task = _built(task_config, "task")
        reward = _built(config["reward"], "reward") if config.get("reward") else None
        if not isinstance(task, LabelledTask):
            raise ConfigError("the run's task has no labelled texts: add --labelled FILE.tsv")
        split = task.labelled_split()
        # Sorted as in a classifier trained on the task.
        labels = sorted({text.label for text in split.train})
        label = _label(arguments.label, reward, labels)
        judges = {"TF-IDF": tfidf_judge(split, label)}
        if arguments.model is not None:
            judges[arguments.model] = model_judge(
                arguments.model, task_config, split.train, label, artifacts=arguments.artifacts
            )
    except ConfigError as error:
        parser.error(str(error))
    verdict = judge(
        judges, split.held_out, label, before, after, are_conversations=are_conversations
    )
    _show(verdict, label)


def _configuration(run: Path) -> dict[str, Any]:
    try:
        config = read_hydra_config(run)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{run / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict) or "task" not in config:
        raise ConfigError(f"{run / CONFIG} is not the configuration of a run: it has no task")
    return config


def _built(config: dict[str, Any], group: str) -> Any:
    problems: list[str] = []
    part = instantiate(config, group, problems, allowed=ALLOWED_TARGETS)
    if problems:
        raise ConfigError("; ".join(problems))
    return part


def _holds_conversations(task: Task) -> bool:
    """Returns True if prompts of evaluations are conversations."""
    return any(
        isinstance(prompt, PromptRow) and not isinstance(prompt.prompt, str)
        for prompt in task.eval_prompts()
    )


def _label(name: str | None, reward: Any, labels: list[str]) -> str:
    """The label to look for. Raises ConfigError if it is none of the labels."""
    if name is None and isinstance(reward, Classifier):
        return labels[reward.find_label(labels, owner="the task")]
    if name is None and isinstance(reward, Judge):
        name = label_of_answer(labels, reward.answers[-1])
    if name not in labels:
        problem = "the run's reward names no label" if name is None else f"no label {name!r}"
        raise ConfigError(f"{problem}: add --label with one of {', '.join(labels)}")
    return name


def _show(verdict: Verdict, label: str) -> None:
    if verdict.reward is not None:
        old, new = verdict.reward
        print(f"the run's reward: mean {old:.3f} -> {new:.3f}  ({new - old:+.3f})")
    for name, opinion in verdict.opinions.items():
        print(f"{name}, {opinion.held_out_accuracy:.3f} accurate on held-out texts:")
        for what, (old, new) in ((f"mean P({label})", opinion.mean), ("share > .5", opinion.share)):
            print(f"  {what:18} {old:.3f} -> {new:.3f}  ({new - old:+.3f})")
    print(f"words whose number of samples changes by over {NUM_ERRORS} standard errors:")
    for title, words in (("rising", verdict.rising_words), ("falling", verdict.falling_words)):
        listed = ", ".join(f"{word} {old}>{new}" for word, old, new in words)
        print(f"  {title}: {listed or 'none'}")


if __name__ == "__main__":
    main()
