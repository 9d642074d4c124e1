"""Sequence classifiers saved as Hugging Face saves them, and their logits worked out by hand."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from rlhf_exp.types import Completions
from tests.builders import WORDS, build_tokenizer, completions, stretch

PAD, BOS, EOS = 0, 1, 2
DECODERS = ("gpt2", "llama", "qwen2")
ENCODERS = ("bert", "distilbert", "roberta")
CONTEXT_LEN = 20
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ eos_token }}"
    "{% endfor %}"
)


def save_classifier(
    path: Path,
    architecture: str,
    *,
    num_labels: int = 1,
    pad_is_eos: bool = False,
    frame: str = "$A",
    padding_side: str = "right",
    chat_template: str | None = None,
    **config: object,
) -> str:
    """The directory of a tiny model with large random weights. `frame` is what its tokenizer puts
    around a text, "<bos> $A" for instance; it has no padding token if EOS is to serve as one."""
    tokenizer = build_tokenizer() if architecture != "qwen2" else qwen2_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=frame, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tokenizer.padding_side = padding_side
    tokenizer.chat_template = chat_template
    if pad_is_eos:
        tokenizer.pad_token = None
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": CONTEXT_LEN,
        "num_labels": num_labels,
        "pad_token_id": EOS if pad_is_eos else PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if architecture == "gpt2":
        common["n_inner"] = common.pop("intermediate_size")
    if architecture == "qwen2":
        common["num_key_value_heads"] = 2
    if architecture == "distilbert":
        common = {k: v for k, v in common.items() if k != "intermediate_size"} | {"hidden_dim": 32}
    if architecture == "bloom":
        common.pop("max_position_embeddings")
    settings = hf.AutoConfig.for_model(architecture, **(common | config))
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(settings)
    stretch(model, seed=0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def qwen2_tokenizer() -> hf.PreTrainedTokenizerBase:
    """A byte-level one, as transformers takes every tokenizer beside a Qwen2 for, with a token for
    each word of the others and one for it behind a space; the special tokens are the same."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    trained.train_from_iterator([*WORDS, *(f" {word}" for word in WORDS)], trainer)
    model = json.loads(trained.to_str())["model"]
    return hf.Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        **{f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")},
    )


def look_up(path: str, text: str) -> list[int]:
    """The ids of the text's words, one by one."""
    vocab = hf.AutoTokenizer.from_pretrained(path).get_vocab()
    words = text.split()
    spaced = [vocab.get(f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}{word}") for word in words]
    return [
        vocab[word] if i == 0 or spaced[i] is None else spaced[i] for i, word in enumerate(words)
    ]


@torch.no_grad()
def direct_logits(path: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """The logits of each row of ids, run by itself through the model that lies there."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(path).eval()
    inputs = [torch.tensor([row]) for row in rows]
    return torch.cat([model(input_ids=x, attention_mask=torch.ones_like(x)).logits for x in inputs])


@torch.no_grad()
def logits_at(path: str, row: Sequence[int], position: int) -> Tensor:
    """A decoder's logits [1, label] from the final hidden state at one position of a row."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(path).eval()
    hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state
    return model.score(hidden[:, position])


def chats(conversations: Sequence[Sequence[dict[str, str]]], answers: Sequence[str]) -> Completions:
    """Answers to conversations, as a policy gives them whose rendering of a prompt is "no no"."""
    record = completions(answers, before=["no no"] * len(answers))
    rows = [
        {"prompt": "no no", "messages": messages, "id": i}
        for i, messages in enumerate(conversations)
    ]
    return dataclasses.replace(
        record, prompts=dataclasses.replace(record.prompts, rows=tuple(rows))
    )
