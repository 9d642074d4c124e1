"""Seconds a PPO phase on a model of a named shape with random weights:
python benchmarks/ppo_phase.py SHAPE PHASES

Prints one JSON line: medians over the phases after the first, the bytes that stay from phase to
phase (counted), and the process's peak. A further shape can be given as
SHAPE=layers,d_model,heads,vocab,context,batch,prompt,gen_len,minibatches,epochs and asked for as
"custom"."""

import argparse
import json
import os
import resource
import statistics
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from rlhf_exp.models.loading import build_policy
from rlhf_exp.models.reference import FullCopy, Lora, SharedTrunk, resident_memory
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.stages.ppo import PPO, Actors
from rlhf_exp.stages.train_state import TrainState
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.tasks.tokenizers import word_tokenizer
from rlhf_exp.training.context import pick_device
from rlhf_exp.training.optim import AdamWSettings, Constant
from rlhf_exp.training.timing import Stopwatch


class Shape(NamedTuple):
    """A model and the work of a phase; `prompt` and `gen_len` in tokens."""

    num_layers: int
    d_model: int
    num_heads: int
    vocab: int
    context_len: int
    batch: int
    prompt: int
    gen_len: int
    minibatches: int
    epochs: int


SHAPES = {
    "series": Shape(6, 384, 6, 129, 128, 32, 20, 20, 4, 2),
    "gpt2": Shape(12, 768, 12, 50257, 1024, 8, 4, 24, 2, 2),
    "reviews": Shape(4, 192, 6, 600, 128, 32, 5, 40, 4, 2),
    "medium": Shape(24, 1024, 16, 50257, 1024, 32, 4, 50, 4, 2),
}
if "SHAPE" in os.environ:
    SHAPES["custom"] = Shape(*map(int, os.environ["SHAPE"].split(",")))


REFERENCES = {
    "full_copy": FullCopy(),
    "shared_trunk": SharedTrunk(num_layers_unfrozen=2),
    "lora": Lora(rank=16),
}


def actors_of(shape: Shape, reference: str, device: torch.device) -> Actors:
    """The policy of that shape, its reference, and a reward that costs nothing."""
    words = [f"w{i}" for i in range(shape.vocab - 4)]
    model = Scratch(
        num_layers=shape.num_layers,
        d_model=shape.d_model,
        num_heads=shape.num_heads,
        context_len=shape.context_len,
    )
    policy = build_policy(model, lambda: word_tokenizer(words), device=device, seed=0)
    text = " ".join(words[: shape.prompt])
    prompts = encode_prompts(policy.tokenizer, [text], prepend_bos=False, device=device)
    return Actors(
        policy=policy,
        reference=REFERENCES[reference].attach(policy, seed=0),
        score=lambda completions: (completions.tokens % 2 == 0).float().mean(dim=1),
        sampler=CachedSampler(gen_len=shape.gen_len),
        train_prompts=prompts,
        eval_prompts=prompts,
        answers=None,
    )


def main() -> None:
    """Times the phases and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("phases", type=int, help="at least 2; the first is warm-up")
    parser.add_argument("--reference", choices=REFERENCES, default="full_copy")
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    device = pick_device("auto")
    actors = actors_of(shape, arguments.reference, device)
    if arguments.gradient_checkpointing:
        actors.policy.checkpoint_gradients()
    ppo = PPO(
        total_phases=arguments.phases,
        batch_size=shape.batch,
        num_minibatches=shape.minibatches,
        batches_per_learning_phase=shape.epochs,
        micro_batch_size=arguments.micro_batch_size,
    )
    state = TrainState.start(
        actors.policy,
        AdamWSettings(),
        Constant(),
        actors.train_prompts,
        batch_size=shape.batch,
        total_phases=arguments.phases,
        seed=0,
        inputs={},
    )
    rows = [
        ppo.phase(state, next(state.prompts), actors, Stopwatch()) for _ in range(arguments.phases)
    ]
    counted = rows[1:] or rows
    rollout = statistics.median(row["time/rollout_s"] for row in counted)
    learn = statistics.median(row["time/learn_s"] for row in counted)
    line = {
        "system": "rlhf_exp",
        "shape": arguments.shape,
        "device": device.type,
        "phase_s": round(
            statistics.median(row["time/rollout_s"] + row["time/learn_s"] for row in counted), 4
        ),
        "rollout_s": round(rollout, 4),
        "learn_s": round(learn, 4),
        "resident_mib": round(resident_memory(actors.policy, actors.reference).total / 2**20, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
