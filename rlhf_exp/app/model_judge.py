"""A pretrained model as a judge of samples: finetuned on labelled texts once, as a step of
`prepare` is, and kept among the artifacts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_exp.app.instantiate import ALLOWED_TARGETS, instantiate
from rlhf_exp.app.steps import Step, prepare
from rlhf_exp.models.hub import from_pretrained, locate_model
from rlhf_exp.rewards.classifier import Classifier, label_outputs
from rlhf_exp.runs.context import pick_device
from rlhf_exp.tasks.protocol import LabelledText

# As experiment=minilm_sentiment.
FINETUNING: dict[str, dict[str, Any]] = {
    "stage": {
        "_target_": "rlhf_exp.stages.classifier.TrainClassifier",
        "epochs": 2, "batch_size": 32, "dtype": "auto", "checkpoint_every": 100,
    },
    "optimizer": {
        "_target_": "rlhf_exp.training.optim.AdamWSettings",
        "base_lr": 8e-5, "head_lr": 1e-3, "eps": 1e-8,
    },
}  # fmt: skip
SCHEDULE = {"_target_": "rlhf_exp.training.schedules.WarmupDecay", "final_scale": 0.05}


def model_judge(
    name: str,
    task: Mapping[str, Any],
    texts: Sequence[LabelledText],
    label: str,
    *,
    artifacts: Path,
) -> Callable[[Sequence[str]], Sequence[float]]:
    """The probability of the label under the model `name`. A model that is no classifier of the
    texts' labels is finetuned on them first; `task` is the configuration of their task. A training
    that was interrupted continues. Raises ConfigError if the model cannot be loaded or trained."""
    if not _classifies(name, {text.label for text in texts}):
        name = _finetuned(name, task, len(texts), artifacts)
    settings = Classifier(name=name, label=label)
    classifier = settings.open(pick_device("auto"))
    index = settings.find_label(classifier.labels)
    return lambda texts: label_outputs(classifier.text_logits(texts), "prob", exclusive=True)[
        :, index
    ].tolist()


def _classifies(name: str, labels: set[str]) -> bool:
    from transformers import AutoConfig

    source = locate_model(name, field="--model")
    config = from_pretrained(AutoConfig, source, "--model", name)
    return set(map(str, config.id2label.values())) == labels


def _finetuned(name: str, task: Mapping[str, Any], num_texts: int, artifacts: Path) -> str:
    updates = FINETUNING["stage"]["epochs"] * num_texts // FINETUNING["stage"]["batch_size"]
    schedule = {**SCHEDULE, "warmup_steps": max(1, updates // 9)}
    model = {"_target_": "rlhf_exp.models.loading.Pretrained", "base_model": name}
    step = Step(
        name="judge",
        path="",
        config={**FINETUNING, "schedule": schedule, "task": task, "model": model},
    )
    made = prepare(
        [step], partial(instantiate, allowed=ALLOWED_TARGETS),
        root=artifacts, seed=0, device=pick_device("auto"),
    )  # fmt: skip
    return made.folders["judge"]
