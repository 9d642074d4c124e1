"""Second opinions on a run: classifiers of labelled texts score its first and last samples.

A logistic regression on TF-IDF of words and word pairs knows nothing of grammar or meaning; a
finetuned model does. Both show whether others see the reward's gain; the words that became more
or less frequent show what causes it.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_exp.tasks.protocol import LabelledText, Split

# A word is listed if its count changes by more than this many times sqrt(before + after), the error
# of the change. Between draws of 128 samples from the same model at most one word's changes so.
NUM_ERRORS = 2.5
NUM_WORDS = 12  # listed at most, in each direction
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")

TextScorer = Callable[[Sequence[str]], Sequence[float]]
"""The probability of the label for each text."""


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """A judge's accuracy on held-out texts, its mean probability of the samples (before, after) and
    the share of samples with P > .5."""

    held_out_accuracy: float
    mean: tuple[float, float]
    share: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The mean reward of the samples (before, after; None without a reward), each judge's opinion,
    and words with the number of samples that contain them (before, after), if it changed by more
    than chance."""

    reward: tuple[float, float] | None
    opinions: dict[str, Opinion]
    rising_words: list[tuple[str, int, int]]
    falling_words: list[tuple[str, int, int]]


def judge(
    judges: Mapping[str, TextScorer],
    held_out: Sequence[LabelledText],
    label: str,
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    *,
    are_conversations: bool,
) -> Verdict:
    """The opinions of the judges on the samples of a run. A judge reads prompt and completion, or
    of a conversation the completion alone. Its accuracy is measured on the held-out texts."""
    # The prompt of a conversation is mostly the chat template's markup.
    places = ("completion",) if are_conversations else ("prompt", "completion")
    texts_by_run = [["".join(row[p] for p in places) for row in rows] for rows in (before, after)]
    true = np.array([text.label == label for text in held_out])
    opinions = {}
    for name, score in judges.items():
        guesses = np.asarray(score([text.text for text in held_out])) > 0.5
        old, new = (np.asarray(score(texts)) for texts in texts_by_run)
        opinions[name] = Opinion(
            held_out_accuracy=float((guesses == true).mean()),
            mean=(float(old.mean()), float(new.mean())),
            share=(float((old > 0.5).mean()), float((new > 0.5).mean())),
        )
    changes = _word_changes(*texts_by_run)
    return Verdict(
        reward=(_mean_score(before), _mean_score(after)) if "score" in before[0] else None,
        opinions=opinions,
        rising_words=[change for change in changes if change[2] > change[1]][:NUM_WORDS],
        falling_words=[change for change in changes[::-1] if change[2] < change[1]][:NUM_WORDS],
    )


def tfidf_judge(split: Split[LabelledText], label: str) -> TextScorer:
    """A logistic regression on TF-IDF, trained on the split. Needs scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+"),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    model.fit([text.text for text in split.train], [text.label == label for text in split.train])
    return lambda texts: model.predict_proba(list(texts))[:, 1]


def _mean_score(rows: Sequence[dict[str, Any]]) -> float:
    return float(sum(row["score"] for row in rows) / len(rows))


def _word_changes(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, int, int]]:
    """(word, samples that contain it before, after) if that is more than chance, largest increase
    first. Words are lower-cased and without punctuation."""
    old, new = (
        Counter(word for text in texts for word in set(_WORD.findall(text.lower())))
        for texts in (before, after)
    )
    changed = [
        w for w in old | new if abs(new[w] - old[w]) > NUM_ERRORS * math.sqrt(old[w] + new[w])
    ]
    return sorted(((w, old[w], new[w]) for w in changed), key=lambda x: x[1] - x[2])
