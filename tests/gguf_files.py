"""Small GGUF files, written with llama.cpp's own package, and the models that they hold."""

import json
from pathlib import Path

import gguf
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

ARCHITECTURES = {"llama": LlamaConfig, "qwen2": Qwen2Config}
TEXTS = ["this movie was really good", "this film was really bad and far too long"] * 4
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
HEADS, KV_HEADS = 4, 2


def train_tokenizer() -> ByteLevelBPETokenizer:
    """A byte-level tokenizer; 0 begins a text and 1, transformers' default, ends it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=320, special_tokens=["<bos>", "<|endoftext|>"])
    return tokenizer


def build_model(architecture: str, vocab_size: int) -> PreTrainedModel:
    """Two blocks of width 32 with grouped-query attention."""
    torch.manual_seed(0)
    config = ARCHITECTURES[architecture](
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_gguf(path: Path, architecture: str, *, quantised: bool = False) -> PreTrainedModel:
    """Writes a model of the architecture with its tokenizer; returns the model. Matrices are
    `quantised` to 8 bits, or kept in fp32."""
    tokenizer = train_tokenizer()
    model = build_model(architecture, tokenizer.get_vocab_size())
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    for name, tensor in model.state_dict().items():
        data = interleave_halves(name, tensor) if architecture == "llama" else tensor
        kind = gguf.GGMLQuantizationType.F32
        if quantised and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")),
            gguf.quants.quantize(data.numpy(), kind), raw_dtype=kind,
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: ByteLevelBPETokenizer) -> None:
    """The tokens in order, the merges and a chat template."""
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([control if i < 2 else normal for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)


def interleave_halves(name: str, tensor: Tensor) -> Tensor:
    """Llama's queries and keys in llama.cpp's order, where a pair that RoPE turns lies together;
    in transformers' order its halves do."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    width = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, width, -1).swapaxes(1, 2).reshape(tensor.shape).contiguous()
