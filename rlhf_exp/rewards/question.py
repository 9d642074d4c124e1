"""A question to a language model about a sample, as text and as tokens.

Knows templates, labelled examples, chat templates and answers, not what the model answers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError, Text, settings

PLACES = ("text", "prompt", "completion")
_PLACE = re.compile("{(" + "|".join(PLACES) + ")}")
# Texts that begin and end differently, to find which tokens of a question depend on the text.
TRIAL_TEXTS = ("a", " b", "1", "\n", "(", ".", "É")
BETWEEN = "\n\n"  # between the examples of a question that is no chat


@settings
class Example:
    """A text with the answer that the judge should give."""

    text: str
    answer: Text


@dataclass(frozen=True, kw_only=True)
class Question:
    """The question about a text, as a judge's tokenizer reads it.

    Without `chat` it is the examples, each followed by its answer, and the template with the text,
    one after another. With `chat` each of these is a user's message, the example's answers are the
    assistant's, `system` comes first, and the tokenizer's chat template puts them together.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    examples: Sequence[Example]
    chat: bool
    system: str | None

    def ids(self, sample: Mapping[str, str], *, max_tokens: int) -> list[int]:
        """The tokens of the question about a sample, given by the places of the template. Texts are
        cut at their end if it would have more than `max_tokens` tokens."""
        ids = self._encode(self._render(sample))
        for _ in range(3):  # the tokens of a cut text may differ from those of the whole text
            excess = len(ids) - max_tokens
            if excess <= 0:
                break
            sample = {place: self._cut(text, excess) for place, text in sample.items()}
            ids = self._encode(self._render(sample))
        return ids[-max_tokens:]

    def shared_ids(self) -> list[int]:
        """The tokens with which the question about any text begins."""
        first, *others = [
            self._encode(self._render(dict.fromkeys(PLACES, text))) for text in TRIAL_TEXTS
        ]
        return first[: min(_common_length(first, other) for other in others)]

    def answer_ids(self, answers: Iterable[str]) -> list[int]:
        """The token of each answer after the question. Raises ConfigError for an answer that is not
        one token, and for answers with the same token."""
        question = self._render(dict.fromkeys(PLACES, TRIAL_TEXTS[0]))
        before, tokens = self._encode(question), dict[int, str]()
        for answer in answers:
            ids = self._encode(question + answer)
            if ids[:-1] != before:
                pieces = [self.tokenizer.decode(i) for i in ids[_common_length(ids, before) :]]
                raise ConfigError(
                    f"reward.answers: {answer!r} is not one token of the judge after its question,"
                    f" but {pieces}; choose a shorter answer, or one with or without a space before"
                )
            if ids[-1] in tokens:
                raise ConfigError(
                    f"reward.answers: {tokens[ids[-1]]!r} and {answer!r} are the same token of the"
                    " judge; choose answers that it tells apart"
                )
            tokens[ids[-1]] = answer
        return list(tokens)

    def _render(self, sample: Mapping[str, str]) -> str:
        messages = [
            *((_fill(self.template, _as_sample(e)), e.answer) for e in self.examples),
            (_fill(self.template, sample), ""),
        ]
        if not self.chat:
            return BETWEEN.join(question + answer for question, answer in messages)
        conversation = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in messages:
            conversation.append({"role": "user", "content": question})
            conversation.append({"role": "assistant", "content": answer})
        try:
            return self.tokenizer.apply_chat_template(
                conversation[:-1], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs and may raise anything
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                "reward.chat=true: the judge's chat template does not take the question"
                f" (reward.system, reward.examples, reward.template): {reason}"
            ) from error

    def _encode(self, text: str) -> list[int]:
        # A chat template contains the special tokens.
        return self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]

    def _cut(self, text: str, excess: int) -> str:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer.decode(ids[: max(0, len(ids) - excess)])


def sample_places(row: Mapping[str, Any], completion: str) -> dict[str, str]:
    """What stands for {text}, {prompt} and {completion}. The prompt of a conversation is its last
    message, and its text is the completion alone."""
    if row.get("messages"):
        prompt = row["messages"][-1]["content"]
        return {"text": completion, "prompt": prompt, "completion": completion}
    prompt = row["prompt"]
    return {"text": prompt + completion, "prompt": prompt, "completion": completion}


def names_a_text(template: str) -> bool:
    """Returns True if the template has a place for the completion."""
    return any(match[1] != "prompt" for match in _PLACE.finditer(template))


def _as_sample(example: Example) -> dict[str, str]:
    return {"text": example.text, "prompt": "", "completion": example.text}


def _fill(template: str, sample: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda match: sample[match[1]], template)


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
