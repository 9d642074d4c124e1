"""What will not fit between a run and the steps it stands on, told before minutes are spent on
building them."""

from collections.abc import Mapping
from typing import Any

from rlhf_exp.models.loading import Pretrained
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rewards.classifier import Classifier
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.settings import ConfigError
from rlhf_exp.stages.classifier import TrainClassifier


def foresee(
    parts: Mapping[str, Any], steps: Mapping[str, tuple[Any, Mapping[str, Any]]], *, prefix: str
) -> list[str]:
    """Problems of a stage's parts with the steps, by name, that they refer to as `prefix`NAME: a
    classifier that will not have the asked label, a context too short for the completions."""
    problems = []
    reward, model, sampler = parts.get("reward"), parts.get("model"), parts.get("sampler")
    if isinstance(reward, Classifier) and reward.name.startswith(prefix):
        stage, made_of = steps[reward.name.removeprefix(prefix)]
        if isinstance(stage, TrainClassifier):
            try:
                reward.find_label(sorted({t.label for t in made_of["task"].labelled_split().train}))
            except ConfigError as error:
                problems.append(str(error))
    made = _shape(model, steps, prefix)
    if made is not None and isinstance(sampler, Sampler):
        name, shape = made
        if sampler.gen_len >= shape.context_len:
            problems.append(
                f"sampler.gen_len={sampler.gen_len} leaves no room for a prompt in"
                f" prepare.{name}.model.context_len={shape.context_len}: lower the first or raise"
                " the second"
            )
    return problems


def _shape(
    model: Any, steps: Mapping[str, tuple[Any, Mapping[str, Any]]], prefix: str
) -> tuple[str, Scratch] | None:
    """The step that builds what the model is, or was trained from, and its shape; None for a model
    that comes from elsewhere."""
    name = ""
    while isinstance(model, Pretrained) and model.base_model.startswith(prefix):
        name = model.base_model.removeprefix(prefix)
        model = steps[name][1].get("model")
    return (name, model) if name and isinstance(model, Scratch) else None
