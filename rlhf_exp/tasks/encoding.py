"""Texts as token ids, with clear errors for words that a tokenizer cannot encode."""

from collections.abc import Callable, Iterator, Sequence

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.protocol import CorpusTask, Task


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens. Raises ConfigError for a text with a word
    that a closed vocabulary lacks."""
    try:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers raises a bare Exception for an unknown word
        for text in texts:
            if not can_encode(tokenizer, text):
                raise ConfigError(
                    f"task: the model's vocabulary does not hold every word of {text[:60]!r}: use"
                    " the task that the model was trained on"
                ) from error
        raise


def can_encode(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Returns False if the text has a word outside a closed vocabulary."""
    try:
        tokenizer(text, add_special_tokens=False)
    except Exception:  # a bare Exception, as in `encode`
        return False
    return True


def leading_ids(tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool | None) -> list[int]:
    """The ids at the beginning of every prompt: BOS or none; with `prepend_bos` None those that the
    tokenizer itself puts before texts. Raises ConfigError if it lacks a required BOS."""
    if prepend_bos is None:
        return _added_prefix(tokenizer)
    if not prepend_bos:
        return []
    if tokenizer.bos_token_id is None:
        raise ConfigError("task.prepend_bos=true, but the tokenizer has no BOS token; set it false")
    return [tokenizer.bos_token_id]


def _added_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = set(tokenizer("")["input_ids"])
    if not added:
        return []
    for probe in _probes(tokenizer):
        if not can_encode(tokenizer, probe):
            continue
        plain = encode(tokenizer, [probe])[0]
        if not plain or added.intersection(plain):  # the start of the text would be ambiguous
            continue
        ids = tokenizer(probe)["input_ids"]
        # Not ids[: len(ids) - len(plain)]: the tokenizer may append EOS, even with the id of BOS.
        starts = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        return ids[: next(starts, 0)]
    return []


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield "a"
    for token in range(len(tokenizer)):
        yield tokenizer.decode([token])


def tokenizer_factory(task: Task) -> Callable[[], PreTrainedTokenizerBase] | None:
    """The function that builds the task's tokenizer, None for a task without texts."""
    return task.build_tokenizer if isinstance(task, CorpusTask) else None
