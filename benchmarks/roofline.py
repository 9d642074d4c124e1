"""What the parts of a PPO phase must at least cost, beside what they do cost:
python benchmarks/roofline.py SHAPE [--dtype fp32|bf16] [--phases N]

Counts the multiplications' FLOPs and the bytes that must move of each part, measures how many of
either this machine does in a second (large matrix products, a copy), and runs ppo_phase.py. Prints
a Markdown table. The bound of a part is the longer of both times; what is not counted (softmaxes,
GELUs, launching operations) is what lies between. A CPU's; on a GPU run ppo_phase.py."""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of torch

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from shapes import SHAPES, Shape

from rlhf_exp.machine.cpu_settings import use_processor_well


class Cost(NamedTuple):
    """Of a part of a phase: FLOPs in the dtype of passes, FLOPs in fp32, bytes, times a phase."""

    flops: float
    fp32_flops: float
    bytes: float
    times: int = 1


def costs(shape: Shape, *, width_bytes: int) -> dict[str, Cost]:
    """The parts by the names that ppo_phase.py gives them, without its "_s"."""
    blocks = 12 * shape.num_layers * shape.d_model**2
    head = shape.vocab * shape.d_model
    value = 4 * shape.d_model**2
    rows = shape.batch // shape.minibatches
    kept = shape.gen_len - 1  # the last token of a completion is never read
    tokens = rows * (shape.prompt + kept)
    targets = rows * shape.gen_len
    steps = shape.minibatches * shape.epochs
    parameters = blocks + head + shape.context_len * shape.d_model + value
    low = width_bytes < 4
    return {
        "sample": Cost(
            flops=2 * blocks * shape.batch * kept,
            fp32_flops=2 * (head + value) * shape.batch * shape.gen_len,
            bytes=(width_bytes * blocks + 4 * head) * shape.gen_len,
        ),
        "measure": Cost(
            flops=2 * blocks * shape.batch * (shape.prompt + kept),
            fp32_flops=4 * head * shape.batch * shape.gen_len,
            bytes=width_bytes * blocks + 8 * head,
        ),
        "forward": Cost(
            flops=2 * blocks * tokens,
            fp32_flops=(4 * head + 2 * value) * targets,
            bytes=width_bytes * blocks + 8 * head,
            times=steps,
        ),
        # The head's logits are formed again, then its two gradients.
        "backward": Cost(
            flops=4 * blocks * tokens + 4 * head * targets,
            fp32_flops=(4 * head + 4 * value) * targets,
            bytes=(2 * width_bytes + 8) * blocks + 16 * head,
            times=steps,
        ),
        # Zeroing 4, norm 4, clipping 8, AdamW 28 bytes a weight; copying to bf16 6.
        "optimizer": Cost(0, 0, 44 * parameters + (6 * blocks if low else 0), times=steps),
    }


def median_seconds(work: Callable[[], object], *, repeats: int = 7) -> float:
    """Seconds of the call, after one that warms up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def rates(dtype: torch.dtype) -> tuple[float, float, float]:
    """FLOPs a second of products in `dtype` and in fp32, bytes a second of a copy."""
    size = 1536
    products = []
    for kind in (dtype, torch.float32):
        a, b = (torch.randn(size, size).to(kind) for _ in range(2))
        products.append(2 * size**3 / median_seconds(lambda a=a, b=b: a @ b))
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return products[0], products[1], 8 * 2**26 / median_seconds(lambda: target.copy_(source))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--phases", type=int, default=6)
    arguments = parser.parse_args()
    use_processor_well()
    low = arguments.dtype == "bf16"
    product, fp32_product, copy = rates(torch.bfloat16 if low else torch.float32)
    command = [sys.executable, str(Path(__file__).with_name("ppo_phase.py"))]
    command += [arguments.shape, str(arguments.phases), "--dtype", arguments.dtype]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = json.loads(printed.splitlines()[-1])
    print(
        f"{arguments.shape}, {arguments.dtype}: products {product / 1e9:.0f} GFLOP/s"
        f" (fp32 {fp32_product / 1e9:.0f}), copy {copy / 1e9:.0f} GB/s;"
        f" a phase {measured['phase_s']:.3f} s\n"
    )
    print("| part | times | GFLOP | GB | bound, s a phase | measured, s a phase |")
    print("| --- | --- | --- | --- | --- | --- |")
    for part, cost in costs(SHAPES[arguments.shape], width_bytes=2 if low else 4).items():
        computing = cost.flops / product + cost.fp32_flops / fp32_product
        bound = max(computing, cost.bytes / copy) * cost.times
        print(
            f"| {part} | {cost.times} | {(cost.flops + cost.fp32_flops) / 1e9:.2f}"
            f" | {cost.bytes / 1e9:.2f} | {bound:.3f}"
            f" | {measured[f'{part}_s']:.3f} |"
        )


if __name__ == "__main__":
    main()
