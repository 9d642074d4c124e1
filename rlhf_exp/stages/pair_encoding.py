"""The pairs of a task as tokens, and checks of them that need no weights.

Knows tasks and tokenizers, not what is learned.
"""

from rlhf_exp.hf import PreTrainedTokenizerBase
from rlhf_exp.models.loading import Pretrained, load_context_len, load_tokenizer
from rlhf_exp.settings import ConfigError, is_reference
from rlhf_exp.tasks.pair_tokens import EncodedPair, encode_pairs
from rlhf_exp.tasks.protocol import PairTask


def check_tokens(model: Pretrained, task: PairTask, *, stage: str) -> None:
    """Raises ConfigError as `encode_split` does, without reading the model's weights."""
    source = _local_source(model)
    if source is not None:
        tokenizer = _tokenizer(model, source)
        encode_split(tokenizer, task, limit=load_context_len(source), stage=stage)


def check_template(model: Pretrained, task: PairTask) -> list[str]:
    """A message if pairs are conversations and the model's tokenizer has no chat template."""
    source, split = _local_source(model), task.pair_split()
    if source is None or all(isinstance(pair.prompt, str) for part in split for pair in part):
        return []
    if _tokenizer(model, source).chat_template:
        return []
    return [
        "task.path: the pairs are conversations, but the tokenizer of"
        f" model.base_model={model.base_model} has no chat template: choose a model that was"
        " trained on chats, or give prompt, chosen and rejected as texts"
    ]


def encode_split(
    tokenizer: PreTrainedTokenizerBase, task: PairTask, *, limit: int, stage: str
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """The pairs to train on and the held-out ones as tokens. Raises ConfigError as `encode_pairs`
    does, and for a tokenizer without EOS."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"stage={stage} needs a tokenizer with an EOS token")
    train, held_out = (
        encode_pairs(tokenizer, pairs, sources, prepend_bos=task.prepend_bos, limit=limit)
        for pairs, sources in zip(task.pair_split(), task.sources(), strict=True)
    )
    return train, held_out


def _local_source(model: Pretrained) -> str | None:
    """Where the model is; None if it is still to be fetched or made."""
    source = model.locate()
    return None if source is None or is_reference(source) else source


def _tokenizer(model: Pretrained, source: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(
        source, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
