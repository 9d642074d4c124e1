"""Arithmetic series: prompts that ask for one, exact answers, and a reward for any answer.

Knows the problems, their wordings and their vocabulary, no model. A hash of a problem's numbers
decides whether it is held out, so that all its wordings are held out with it.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, NamedTuple

from pydantic import Field

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import Count, Index, settings
from rlhf_exp.tasks.hashing import hash_fraction
from rlhf_exp.tasks.protocol import Demonstration, Split

MAX_VALUE = 100
STARTS, DIFFERENCES, TERMS = range(100), range(1, 10), range(5, 15)
TEMPLATES = (
    "generate an arithmetic series with {terms} terms starting with value {start}"
    " and common difference {difference}",
    "make a series of arithmetic type which starts at {start} with {terms} elements"
    " and {difference} common difference value",
    "Let {terms} be the number of terms {start} the starting number and {difference}"
    " the common difference then write the arithmetic series",
)
SEP = "<SEP>"
MIN_REWARD, MAX_REWARD, DISTANCE_SCALE = 1.0, 7.0, 0.1

# With a quarter in each of the two held-out sets, half of the problems remain to train on.
Share = Annotated[float, Field(ge=0.01, le=0.25, allow_inf_nan=False)]


class Problem(NamedTuple):
    """The first value, the difference and the number of terms of a series."""

    start: int
    difference: int
    terms: int

    def series(self) -> list[int]:
        """The values up to 100: fewer than `terms` if the series exceeds 100."""
        values = (self.start + i * self.difference for i in range(self.terms))
        return [value for value in values if value <= MAX_VALUE]


class _ProblemSets(NamedTuple):
    train: list[Problem]
    tuning: list[Problem]
    evaluation: list[Problem]


@settings
class Arithmetic:
    """9,000 problems in three wordings each. A `held_out_fraction` of the problems is held out for
    tuning (`demonstration_split`), and as many others for evaluation (`eval_prompts`)."""

    held_out_fraction: Share = 0.1
    """Fraction of the 9,000 problems, once to tune on and once to evaluate on; 0.05 to 0.25."""
    num_series: Count = 8000
    """Texts of three series each, without prompts, for pretraining."""
    data_seed: Index = 0
    """Draws the split; any integer from 0."""

    @property
    def prepend_bos(self) -> bool:
        """false: the vocabulary has no BOS."""
        return False

    def fingerprint(self) -> str:
        """The empty string: no files are read."""
        return ""

    def train_prompts(self) -> tuple[str, ...]:
        """Every wording of the training problems."""
        return tuple(_wordings(self._problems.train))

    def eval_prompts(self) -> tuple[str, ...]:
        """Every wording of the problems held out for evaluation."""
        return tuple(_wordings(self._problems.evaluation))

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer of 129 tokens: 0 to 100, each word of the prompts, <SEP>, <PAD> and <EOS>. It
        raises for any other word."""
        from rlhf_exp.tasks.tokenizers import closed_word_tokenizer

        words = re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", " ", " ".join(TEMPLATES)))
        numbers = map(str, range(MAX_VALUE + 1))
        return closed_word_tokenizer([SEP, *numbers, *words], pad="<PAD>", eos="<EOS>")

    def language_split(self) -> Split[str]:
        """Texts of three series each with <SEP> between, without prompts: series of the training
        problems, and of the problems for tuning."""
        train, tuning = self._problems.train, self._problems.tuning
        texts = (
            _join_series(problems, count, f"{self.data_seed} {name}")
            for problems, count, name in (
                (train, self.num_series, "train"),
                (tuning, max(1, round(self.num_series * self.held_out_fraction)), "held-out"),
            )
        )
        return Split(*texts)

    def demonstration_split(self) -> Split[Demonstration]:
        """Every wording, with its answer, of the training problems and of those for tuning."""
        return Split(
            *(
                tuple(Demonstration(prompt, self.answer(prompt)) for prompt in _wordings(problems))
                for problems in (self._problems.train, self._problems.tuning)
            )
        )

    def answer(self, prompt: str) -> str:
        """The series with a space before each value. Raises ValueError for a text that is not a
        prompt of this task."""
        return _text(parse_prompt(prompt).series())

    def true_reward(self, prompt: str, completion: str) -> float:
        """`series_reward` of the completion; 1 unless it holds only integers from 0 to 100."""
        return series_reward(parse_prompt(prompt).series(), parse_answer(completion))

    @cached_property
    def _problems(self) -> _ProblemSets:
        sets = _ProblemSets([], [], [])
        for problem in (Problem(s, d, n) for s in STARTS for d in DIFFERENCES for n in TERMS):
            place = hash_fraction(f"{self.data_seed} {problem}") / self.held_out_fraction
            {0: sets.evaluation, 1: sets.tuning}.get(int(place), sets.train).append(problem)
        return sets


def series_reward(exact: Sequence[int], answer: Sequence[int] | None) -> float:
    """1 + 6 / (1 + 0.1 sqrt(sum |exact - answer|)): 7 for the exact series, less with distance.

    The shorter of the two is first extended with its last value. The reward is 1 for an empty
    answer and for None, an answer that is not a list of values.
    """
    if not answer:
        return MIN_REWARD
    length = max(len(exact), len(answer))
    pairs = zip(_extend(exact, length), _extend(answer, length), strict=True)
    distance = math.sqrt(sum(abs(a - b) for a, b in pairs))
    return MIN_REWARD + (MAX_REWARD - MIN_REWARD) / (1 + DISTANCE_SCALE * distance)


def _extend(values: Sequence[int], length: int) -> list[int]:
    return [*values, *[values[-1]] * (length - len(values))]


def parse_prompt(prompt: str) -> Problem:
    """The problem of a prompt. Raises ValueError for any other text, and for a problem without a
    term up to 100."""
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(prompt.strip()):
            problem = Problem(**{name: int(value) for name, value in match.groupdict().items()})
            if problem.series():
                return problem
    raise ValueError(
        f"{prompt!r} is not a prompt of task=arithmetic: rewards and exact answers exist only for"
        " its three wordings, with a start of at most 100 and at least one term"
    )


def parse_answer(completion: str) -> list[int] | None:
    """The values of an answer, None unless it holds only integers from 0 to 100."""
    words = completion.split()
    if not all(re.fullmatch("[0-9]{1,3}", word) and int(word) <= MAX_VALUE for word in words):
        return None
    return [int(word) for word in words]


_PATTERNS = [
    re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[0-9]{1,3})", template)) for template in TEMPLATES
]


def _wordings(problems: Sequence[Problem]) -> Iterator[str]:
    return (template.format(**p._asdict()) for p in problems for template in TEMPLATES)


def _text(values: Sequence[int]) -> str:
    return "".join(f" {value}" for value in values)


def _join_series(problems: Sequence[Problem], count: int, seed: str) -> tuple[str, ...]:
    rng = random.Random(seed)
    return tuple(
        f" {SEP}".join(_text(problem.series()) for problem in rng.choices(problems, k=3)).strip()
        for _ in range(count)
    )
