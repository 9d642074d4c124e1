"""Tokenizers built from a task's texts, as Hugging Face fast tokenizers."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_exp.settings import ConfigError

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
_SPECIAL = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerBase:
    """A tokenizer with one token for each of `words`, split at whitespace; any other word becomes
    <unk>."""
    tokens = dict.fromkeys((PAD, BOS, EOS, UNK, *words))
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, **_SPECIAL)


def closed_word_tokenizer(words: Iterable[str], *, pad: str, eos: str) -> PreTrainedTokenizerBase:
    """A tokenizer with one token for each of `words`, split at whitespace. It raises for any other
    word and has no BOS."""
    tokens = dict.fromkeys((pad, eos, *words))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, pad_token=pad, eos_token=eos)


def byte_pair_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on the texts, without accents.

    The alphabet is only that of the texts: with all 256 bytes, samples of a small model at
    temperature 1 contain stray bytes. Characters not in the texts become <unk>.
    Raises ConfigError if the alphabet has more than vocab_size tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS, UNK], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"task.vocab_size={vocab_size} is too small for the letters of the texts: "
            f"set it to at least {tokenizer.get_vocab_size()}"
        )
    return _wrap(tokenizer, **_SPECIAL)


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
