"""A second opinion on a run: a judge that shares no features with the reward.

TF-IDF of words and word pairs with logistic regression, trained on the task's own labelled texts.
It knows nothing of grammar or meaning; it shows whether another model sees the reward's gain, and
which words cause it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_exp.tasks.protocol import LabelledText, Split

MIN_SAMPLES = 10  # a word is listed if at least this many samples contain it, before or after


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The mean reward and the judge's mean probability of the samples (before, after);
    `positive_fraction` counts samples with P > .5."""

    held_out_accuracy: float
    reward: tuple[float, float]
    judge_prob: tuple[float, float]
    positive_fraction: tuple[float, float]
    rising_words: list[tuple[str, int, int]]
    falling_words: list[tuple[str, int, int]]


def judge(
    split: Split, label: str, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> Verdict:
    """Trains the judge on the split and scores both sets of samples with it. Needs scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+"),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    model.fit(_texts(split.train), [text.label == label for text in split.train])
    accuracy = model.score(_texts(split.held_out), [t.label == label for t in split.held_out])
    texts_by_run = [[row["prompt"] + row["completion"] for row in rows] for rows in (before, after)]
    probs = [model.predict_proba(texts)[:, 1] for texts in texts_by_run]
    changes = _word_changes(*texts_by_run)
    return Verdict(
        held_out_accuracy=float(accuracy),
        reward=(_mean_score(before), _mean_score(after)),
        judge_prob=(float(probs[0].mean()), float(probs[1].mean())),
        positive_fraction=(float((probs[0] > 0.5).mean()), float((probs[1] > 0.5).mean())),
        rising_words=changes[:12],
        falling_words=changes[::-1][:12],
    )


def _texts(texts: Sequence[LabelledText]) -> list[str]:
    return [text.text for text in texts]


def _mean_score(rows: Sequence[dict[str, Any]]) -> float:
    return float(sum(row["score"] for row in rows) / len(rows))


def _word_changes(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, int, int]]:
    """(word, samples that contain it before, after), largest increase first."""
    old, new = (
        Counter(word for text in texts for word in set(text.split())) for texts in (before, after)
    )
    common = [w for w in old | new if max(old[w], new[w]) >= MIN_SAMPLES]
    return sorted(((w, old[w], new[w]) for w in common), key=lambda x: x[1] - x[2])
