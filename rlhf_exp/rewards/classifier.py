"""A reward that reads a sequence classifier: the probability, log-prob or logit of a label."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BeforeValidator, model_validator
from torch import Tensor

from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rewards.sequence_classifier import (
    SequenceClassifier,
    SequenceClassifierSettings,
    Side,
)
from rlhf_exp.settings import ConfigError, Upstream, settings
from rlhf_exp.types import Completions

Output = Literal["prob", "logprob", "logit"]


def _check_label(value: Any) -> Any:
    if isinstance(value, bool | float):
        kind = "boolean" if isinstance(value, bool) else "float"
        raise ValueError(
            f"a label is a name or an index, not a {kind}; if that is its name, set"
            f" 'reward.label=\"{str(value).lower()}\"'"
        )
    return value


@settings
class Classifier(SequenceClassifierSettings):
    """P(label) of prompt and completion under any AutoModelForSequenceClassification with two or
    more labels, or its logarithm, or the logit.

    `label` is a name or an index; `direction` selects the label whose name begins with pos or neg.
    A number first matches a label of that name; it is an index only if no name begins with a digit.
    Probabilities come from a softmax over the labels, or with
    problem_type=multi_label_classification from a sigmoid each. dtype auto is fp16 on CUDA and fp32
    elsewhere; scores are always fp32.
    """

    label: Annotated[str | int | None, BeforeValidator(_check_label)] = None
    """Whose output is the score, by name or by index (a number is a name first); or direction:."""
    direction: Literal["pos", "neg"] | None = None
    """Pos or neg: the label whose name begins so."""
    output: Output = "prob"
    """Prob; logprob, its natural logarithm; logit."""
    truncation_side: Side = "right"
    """The end at which a text that is too long is cut: right or left."""

    @model_validator(mode="after")
    def _one_choice(self) -> "Classifier":
        if (self.label is None) == (self.direction is None):
            raise ValueError(
                f"label={self.label} and direction={self.direction}: set exactly one, the other"
                " null"
            )
        return self

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function; it returns scores on `device`, wherever the classifier is. Raises
        ConfigError if the model cannot be loaded or lacks the label or the output."""
        classifier = self.open(device)
        config = classifier.model.config
        if config.num_labels < 2:
            raise ConfigError(
                f"reward.name={self.name!r} has {config.num_labels} output and no labels to choose"
                " from; a scalar reward model is for reward=pair_model"
            )
        if config.problem_type == "regression" and self.output != "logit":
            raise ConfigError(
                f"reward.output={self.output}: {self.name!r} has problem_type=regression, its"
                " outputs are no probabilities; set reward.output=logit"
            )
        label_index = self.find_label(classifier.labels)
        exclusive = config.problem_type != "multi_label_classification"

        def score(completions: Completions) -> torch.Tensor:
            logits = classifier.logits(completions)
            outputs = label_outputs(logits, self.output, exclusive=exclusive)
            return outputs[:, label_index].to(device)

        return score

    def open(self, device: torch.device) -> SequenceClassifier:
        """The classifier, by default on `device`. Raises ConfigError if it cannot be loaded."""
        return self.open_model(
            device, auto_on_cuda=torch.float16, truncation_side=self.truncation_side
        )

    def check_upstream(self, upstream: Upstream) -> list[str]:
        """One message if the earlier step's classifier lacks the label, else none."""
        try:
            artifact = upstream(self.name)
            if artifact is not None and artifact.labels is not None:
                self.find_label(artifact.labels)
        except ConfigError as error:
            return [str(error)]
        return []

    def find_label(self, labels: Sequence[str], *, owner: str = "") -> int:
        """The index in `labels` of the one that `label` or `direction` selects. Raises ConfigError
        that lists the labels of the `owner`, by default the classifier, if none or several match.
        """
        has_numbers = any(label.lstrip("+-")[:1].isdigit() for label in labels)
        if self.direction is not None:
            matches = [i for i, x in enumerate(labels) if x.lower().startswith(self.direction)]
        else:
            matches = [i for i, x in enumerate(labels) if x == str(self.label)]
        if isinstance(self.label, int) and not matches and not has_numbers:
            matches = [i for i in range(len(labels)) if i == self.label]
        if len(matches) == 1:
            return matches[0]
        field = "direction" if self.label is None else "label"
        owner = owner or f"the classifier {self.name!r}"
        raise ConfigError(
            f"reward.{field}={getattr(self, field)!r}: {owner} has"
            f" {'several such labels' if matches else 'no such label'};"
            f" set reward.label to one of {', '.join(labels)}"
            + (" and reward.direction=null" if self.direction else "")
            + ("" if has_numbers else f", or an index from 0 to {len(labels) - 1}")
        )


def label_outputs(
    logits: Float[Tensor, "batch label"], output: Output, *, exclusive: bool
) -> Float[Tensor, "batch label"]:
    """The probability, log-prob or logit of each label. Exactly one of `exclusive` labels is true;
    else each label is true or false by itself."""
    if output == "logit":
        return logits
    if output == "prob":
        return logits.softmax(dim=-1) if exclusive else logits.sigmoid()
    # Not log(prob): the probability of an unlikely label rounds to 0.
    return logits.log_softmax(dim=-1) if exclusive else F.logsigmoid(logits)
