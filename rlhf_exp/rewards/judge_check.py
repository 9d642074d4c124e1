"""How well a judge separates labelled texts, measured before it is trained with."""

import logging
import random
from collections.abc import Sequence

from torch import Tensor

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.labelled_text import read_labelled_file

log = logging.getLogger(__name__)

MAX_TEXTS = 300
AT_CHANCE = 0.6  # an AUC below this is reported as a warning


def labelled_texts(path: str, label: str | None, *, best_answer: str) -> list[tuple[str, bool]]:
    """At most 300 random texts of a file of labelled texts, each with True if its label is
    `label`, by default that of the best answer. Raises ConfigError for a file that cannot be read
    and a label that it lacks."""
    texts = [*read_labelled_file(path, field="reward.check").texts]
    labels = sorted({text.label for text in texts})
    high = label or label_of_answer(labels, best_answer)
    if high not in labels:
        wanted = f"reward.check_label={label}" if label else f"the answer {best_answer!r}"
        raise ConfigError(
            f"reward.check: {path} has the labels {', '.join(labels)}, and {wanted} is none of"
            " them; set reward.check_label to the label of texts that should score high"
        )
    random.Random(0).shuffle(texts)
    return [(text.text, text.label == high) for text in texts[:MAX_TEXTS]]


def label_of_answer(labels: Sequence[str], answer: str) -> str | None:
    """The label that the answer begins with ("pos" for " positive"), or that begins with the
    answer; None if there is none or several."""
    name = answer.strip().lower()
    matches = [x for x in labels if name.startswith(x.lower()) or x.lower().startswith(name)]
    return matches[0] if len(matches) == 1 else None


def check_judge(scores: Tensor, is_high: Sequence[bool], *, threshold: float) -> None:
    """Logs the accuracy at the threshold and the area under the ROC curve, with a warning if the
    judge hardly separates the texts."""
    from scipy.stats import mannwhitneyu

    high = scores.new_tensor(is_high).bool()
    accuracy = ((scores > threshold) == high).float().mean().item()
    above = mannwhitneyu(scores[high].cpu(), scores[~high].cpu()).statistic
    auc = above / (int(high.sum()) * int((~high).sum()))
    log.info("the judge on %d labelled texts: accuracy %.3f, AUC %.3f", len(high), accuracy, auc)
    if auc < AT_CHANCE:
        log.warning(
            "the judge hardly separates the labelled texts of reward.check (AUC %.3f, chance is"
            " .5): change reward.template, reward.examples or reward.answers, or name a larger"
            " model",
            auc,
        )
