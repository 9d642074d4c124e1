"""Texts as token ids, and the errors of tokenizers that refuse what they do not know."""

from collections.abc import Callable, Iterator, Sequence

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.protocol import CorpusTask, Task


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, no special tokens. Raises ConfigError for a text that a closed
    vocabulary does not hold."""
    try:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers raises this very class for a word that it does not know
        for text in texts:
            if not can_encode(tokenizer, text):
                raise ConfigError(
                    f"task: the model's vocabulary does not hold every word of {text[:60]!r}: use"
                    " the task that the model was trained on"
                ) from error
        raise


def can_encode(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer takes the text at all."""
    try:
        tokenizer(text, add_special_tokens=False)
    except Exception:  # as above
        return False
    return True


def leading_ids(tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool | None) -> list[int]:
    """What a prompt's ids begin with: BOS or nothing; None is for whatever the tokenizer puts
    before texts by itself. Raises ConfigError for a tokenizer without the BOS that is asked
    for."""
    if prepend_bos is None:
        return _puts_in_front(tokenizer)
    if not prepend_bos:
        return []
    if tokenizer.bos_token_id is None:
        raise ConfigError("task.prepend_bos=true, but the tokenizer has no BOS token; set it false")
    return [tokenizer.bos_token_id]


def _puts_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = set(tokenizer("")["input_ids"])
    if not added:
        return []
    for probe in _probes(tokenizer):
        if not can_encode(tokenizer, probe):  # a closed vocabulary
            continue
        plain = encode(tokenizer, [probe])[0]
        if not plain or added.intersection(plain):  # which hides where the text begins
            continue
        ids = tokenizer(probe)["input_ids"]
        # Not what is longer than without: that may be an EOS behind, even one that is BOS as well.
        starts = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        return ids[: next(starts, 0)]
    return []


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield "a"
    for token in range(len(tokenizer)):
        yield tokenizer.decode([token])


def tokenizer_factory(task: Task) -> Callable[[], PreTrainedTokenizerBase] | None:
    """What builds the task's tokenizer, None if it has no texts to make one from."""
    return task.build_tokenizer if isinstance(task, CorpusTask) else None
