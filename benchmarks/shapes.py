"""The shapes that benchmarks run on, by name, and the one that the variable SHAPE gives.

Knows neither torch nor this package, so that other systems' environments can import it.
"""

import os
from typing import NamedTuple


class Shape(NamedTuple):
    """A GPT-2 with random weights and the work of a PPO phase on it."""

    num_layers: int  # transformer blocks
    d_model: int  # width of the residual stream; the value head's hidden layer is 4 times as wide
    num_heads: int  # attention heads; d_model must be a multiple
    vocab: int  # tokens, the special ones included
    context_len: int  # positions that the model has; prompt + gen_len must fit
    batch: int  # completions a phase
    prompt: int  # tokens of the prompt, which all rows share
    gen_len: int  # tokens sampled after it, in every row
    minibatches: int  # optimizer steps a pass over the batch
    epochs: int  # passes over the batch in a learning phase


# All but "smollm2" are those of other systems' runs that results are set beside.
SHAPES = {
    "series": Shape(6, 384, 6, 129, 128, 32, 20, 20, 4, 2),
    "gpt2": Shape(12, 768, 12, 50257, 1024, 8, 4, 24, 2, 2),
    "reviews": Shape(4, 192, 6, 600, 128, 32, 5, 40, 4, 2),
    "smollm2": Shape(30, 576, 9, 49152, 1024, 32, 4, 24, 2, 2),  # the size of SmolLM2-135M
    "medium": Shape(24, 1024, 16, 50257, 1024, 32, 4, 50, 4, 2),
}


def checked(shape: Shape) -> Shape:
    """The shape. Raises ValueError for one that no model has or that no schedule divides."""
    if min(shape) < 1:
        raise ValueError(f"{shape}: every field must be at least 1")
    if shape.d_model % shape.num_heads:
        raise ValueError(f"{shape}: d_model must be a multiple of num_heads")
    if shape.batch % shape.minibatches:
        raise ValueError(f"{shape}: batch must be a multiple of minibatches")
    if shape.prompt + shape.gen_len > shape.context_len:
        raise ValueError(f"{shape}: prompt + gen_len must be at most context_len")
    return shape


def as_variable(shape: Shape) -> str:
    """The shape as the environment variable SHAPE holds it."""
    return ",".join(map(str, shape))


def from_variable(text: str) -> Shape:
    """The inverse of `as_variable`. Raises ValueError if the text is not a shape."""
    values = text.split(",")
    if len(values) != len(Shape._fields):
        raise ValueError(f"SHAPE={text}: give {','.join(Shape._fields)}")
    return checked(Shape(*map(int, values)))


if "SHAPE" in os.environ:
    SHAPES["custom"] = from_variable(os.environ["SHAPE"])
