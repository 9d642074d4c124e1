"""Models, prompts and oracles that the tests of several folders build on."""

import contextlib
from collections.abc import Iterator, Sequence

import jaxtyping
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from rlhf_exp.models.engines import EngineName
from rlhf_exp.models.loading import build_policy
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.tasks.tokenizers import word_tokenizer
from rlhf_exp.types import Completions, PromptBatch

ARCHITECTURES = ("gpt2", "llama", "qwen2", "gpt_neox")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", ".", "no")
CONTEXT_LEN = 32


@contextlib.contextmanager
def without_checks() -> Iterator[None]:
    """Without the checks of shapes that tests put around functions, which are a third of a long
    run: short runs of the same code have them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def build_tokenizer() -> PreTrainedTokenizerBase:
    """<pad> <bos> <eos> <unk> are 0 to 3, the words 4 to 15."""
    return word_tokenizer(WORDS)


def tiny_policy(
    architecture: str = "gpt2", *, engine: EngineName = "fast", seed: int = 0, dropout: float = 0.0
) -> TransformerWithValueHead:
    """Two layers of width 16, weights far from their small initial ones: as drawn, attention is so
    flat that a wrong position or mask would hide below the tolerances."""
    model = Scratch(
        architecture=architecture,
        num_layers=2,
        d_model=16,
        num_heads=2,
        context_len=CONTEXT_LEN,
        dropout=dropout,
        engine=engine,
    )
    policy = build_policy(model, build_tokenizer, device=torch.device("cpu"), seed=seed)
    stretch(policy.language_model, seed=seed)
    return policy


def stretch(model: nn.Module, *, seed: int, std: float = 0.3) -> None:
    """Adds noise of that standard deviation to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def sliding_policy() -> TransformerWithValueHead:
    """A policy whose attention sees the last three tokens alone."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        sliding_window=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    stretch(model, seed=0)
    return TransformerWithValueHead(model, build_tokenizer())


def with_engine(policy: TransformerWithValueHead, engine: EngineName) -> TransformerWithValueHead:
    """A policy on the very parameters of another."""
    twin = TransformerWithValueHead(policy.language_model, policy.tokenizer, engine=engine)
    twin.value_head = policy.value_head
    return twin


def ragged_tokens(batch: int = 5, seq: int = 9, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random words and a mask with 0, 1, 2, ... columns of padding on the left, filled with 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 4 + len(WORDS), (batch, seq), generator=generator)
    mask = torch.arange(seq) >= torch.arange(batch)[:, None]
    return tokens * mask, mask


def prompts(policy: TransformerWithValueHead, texts: Sequence[str]) -> PromptBatch:
    """The texts as a batch, BOS before each."""
    return encode_prompts(policy.tokenizer, texts, prepend_bos=True, device=policy.device)


def completions(texts: Sequence[str], *, before: Sequence[str] | None = None) -> Completions:
    """What a reward reads: completions of these texts, after prompts `before`. As many tokens as
    there are words are real."""
    lengths = [len(text.split()) for text in texts]
    mask = torch.arange(max(1, *lengths)) < torch.tensor(lengths)[:, None]
    starts = ["" for _ in texts] if before is None else before
    return Completions(
        prompts=PromptBatch(
            tokens=torch.ones(len(texts), 1, dtype=torch.long),
            mask=torch.ones(len(texts), 1, dtype=torch.bool),
            rows=tuple({"prompt": start} for start in starts),
        ),
        tokens=mask.long(),
        mask=mask,
        texts=tuple(texts),
    )


def cut(tokens: Tensor, mask: Tensor, prompt_len: int) -> Completions:
    """Sequences as completions of what their first `prompt_len` columns hold."""
    return Completions(
        prompts=PromptBatch(
            tokens=tokens[:, :prompt_len],
            mask=mask[:, :prompt_len],
            rows=tuple({"prompt": ""} for _ in tokens),
        ),
        tokens=tokens[:, prompt_len:],
        mask=mask[:, prompt_len:],
        texts=("",) * len(tokens),
    )


def plain_forward(
    policy: TransformerWithValueHead, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, values and final hidden states from the Hugging Face module called as its own
    documentation says, positions counted by a loop."""
    positions = torch.zeros_like(tokens)
    for row, real in enumerate(mask.tolist()):
        position = 0
        for column, is_real in enumerate(real):
            positions[row, column] = position
            position += is_real
    output = policy.language_model(
        input_ids=tokens,
        attention_mask=mask.long(),
        position_ids=positions,
        output_hidden_states=True,
    )
    hidden = output.hidden_states[-1]
    first, activation, last = policy.value_head
    return output.logits, last(activation(first(hidden)))[..., 0], hidden


def assert_near(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-5) -> None:
    """Equality within `tolerance` of the expected tensor's largest entry (of 1, if that is less):
    fp32 sums in another order differ by some 1e-7 of it a layer."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
