"""What the trial of a model at load costs, on a GPT-2 of a named shape with random weights:
python benchmarks/probe.py SHAPE ROUNDS

Prints one JSON line, medians over the rounds: milliseconds of the trial, and of one pass over its
sequences for comparison."""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of torch

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_exp.kernels.attention import install_kernels
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.fast_paths import Probe, find_fast_paths, padded
from rlhf_exp.tasks.tokenizers import word_tokenizer
from rlhf_exp.machine.cpu_settings import use_processor_well
from shapes import SHAPES


def milliseconds(call: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("rounds", type=int)
    arguments = parser.parse_args()
    use_processor_well()
    shape = SHAPES[arguments.shape]
    config = GPT2Config(
        vocab_size=shape.vocab, n_positions=shape.context_len, n_embd=shape.d_model,
        n_layer=shape.num_layers, n_head=shape.num_heads,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    install_kernels(model)
    policy = TransformerWithValueHead(model, word_tokenizer([f"w{i}" for i in range(100)]))
    with torch.no_grad():
        probe = Probe(policy)
        rounds = [
            (
                milliseconds(lambda: find_fast_paths(policy)),
                milliseconds(lambda: probe.passes_agree(padded)),
            )
            for _ in range(arguments.rounds)
        ]
    trial, one_pass = (round(median(column), 1) for column in zip(*rounds, strict=True))
    print(json.dumps({"shape": arguments.shape, "trial_ms": trial, "pass_ms": one_pass}))


if __name__ == "__main__":
    main()
