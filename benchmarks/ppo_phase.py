"""Seconds a PPO phase on a model of a named shape with random weights, and where they go:
python benchmarks/ppo_phase.py SHAPE PHASES

Prints one JSON line: medians over the phases after the first, the bytes that stay from phase to
phase (counted), and the process's peak over these phases. sample_s, measure_s and score_s are parts
of rollout_s. forward_s, backward_s and optimizer_s are those of learn_s, timed apart after the
phases on one minibatch and multiplied by the optimizer steps of a phase; optimizer_s holds
clipping and what follows a step. warm_up_s is what comes before the counted phases: compiling and
the first of them. A further shape can be given as
SHAPE=layers,d_model,heads,vocab,context,batch,prompt,gen_len,minibatches,epochs and asked for as
"custom"; shapes.py says what they mean. With --model DIR a saved model takes the
place of the GPT-2 with random weights; of the shape only the work is used. --stage chooses another
algorithm: rloo has no critic, ppo_separate one on a model of its own."""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of torch

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch

from rlhf_exp.models.loading import ModelSettings, Pretrained, build_policy
from rlhf_exp.models.finetune import Full, Lora, LastLayers
from rlhf_exp.models.reference import reference_hash, resident_memory
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.compute import Compute, warm_up
from rlhf_exp.rl.estimators import LeaveOneOut
from rlhf_exp.rl.phases import Phases, start
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.tasks.tokenizers import word_tokenizer
from rlhf_exp.runs.context import pick_device
from rlhf_exp.training.optim import AdamWSettings, clip_gradients
from rlhf_exp.training.schedules import Constant
from rlhf_exp.machine.cpu_settings import use_processor_well
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.types import Layout
from shapes import SHAPES, Shape

FINETUNE = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=2),
    "lora": Lora(rank=16),
}
STAGES = {
    "ppo": PPO(),
    "ppo_separate": PPO(value_model="separate"),
    "rloo": PPO(
        estimator=LeaveOneOut(), samples_per_prompt=4, kl_penalty="reward", normalize_reward=False
    ),
}
# Minibatches whose parts are timed, and how many before them are not.
TIMED, UNTIMED = 5, 1


def setup_of(
    shape: Shape, finetune: str, device: torch.device, model: str | None = None, stage: str = "ppo"
) -> Setup:
    """A policy of that shape with random weights or a saved one, its reference, and a reward that
    costs nothing."""
    words = [f"w{i}" for i in range(shape.vocab - 4)]
    settings: ModelSettings = Scratch(
        num_layers=shape.num_layers,
        d_model=shape.d_model,
        num_heads=shape.num_heads,
        context_len=shape.context_len,
    )
    if model is not None:
        settings = Pretrained(base_model=model)
    policy = build_policy(
        settings, None if model else lambda: word_tokenizer(words), device=device, seed=0,
        value_head=STAGES[stage].estimator.needs_values,
    )  # fmt: skip
    if STAGES[stage].value_model == "separate":
        policy.separate_values()
    first = min(1000, shape.vocab - shape.prompt)  # of the prompt's tokens
    text = policy.tokenizer.decode(range(first, first + shape.prompt))
    prompts = encode_prompts(policy.tokenizer, [text], prepend_bos=False, device=device)
    assert prompts.tokens.shape[1] == shape.prompt
    attached = FINETUNE[finetune].attach(policy, seed=0)
    return Setup(
        policy=policy,
        reference=attached,
        reference_hash=reference_hash(attached, policy),
        score=lambda completions: (completions.tokens % 2 == 0).float().mean(dim=1),
        sampler=CachedSampler(gen_len=shape.gen_len),
        train_prompts=prompts,
        eval_prompts=prompts,
        answers=None,
        scored_by_reference=False,
    )


def learning_parts(run: Phases) -> dict[str, float]:
    """Seconds of a learning phase by part, from single minibatches of one further rollout."""
    laps: list[Stopwatch] = []
    ppo, state, setup = run.ppo, run.state, run.setup
    with state.policy.working():
        experience = run.credit(run.collect(state.phase + 1))
        layout = Layout.of(experience.rollout.completions, whole=state.policy.is_compiled)
        for _ in range(UNTIMED + TIMED):
            laps.append(lap := Stopwatch())
            state.optimizer.zero_grad(set_to_none=False)
            index = torch.randperm(ppo.batch_size, generator=state.minibatch_generator)
            for micro in index[: ppo.minibatch_size].split(
                ppo.compute.micro_batch_size or ppo.minibatch_size
            ):
                with lap("forward"):
                    part = experience[micro]
                    new = setup.policy.engine.learning_pass(
                        part.rollout, setup.reference.head, layout[micro],
                        temperature=setup.sampler.temperature,
                    )  # fmt: skip
                    loss = ppo.objective(new, part, ppo.coefficients(ppo.kl_coef)).loss
                with lap("backward"):
                    loss.backward()
            with lap("optimizer"):
                clip_gradients(state.optimizer, ppo.max_grad_norm)
                state.optimizer.step()
                state.policy.weights_changed()
    steps = ppo.num_minibatches * ppo.batches_per_learning_phase
    return {
        part: steps * median(lap.seconds[part] for lap in laps[UNTIMED:])
        for part in laps[0].seconds
    }


def phases(run: Phases, number: int) -> Iterator[dict[str, float]]:
    """The seconds of each of so many phases, by part."""
    for _ in range(number):
        row: dict[str, float] = {}
        run.run(row.update)
        parts = ("rollout", "learn", "sample", "measure", "score")
        seconds = {part: row[f"time/{part}_s"] for part in parts}
        yield {"phase": seconds["rollout"] + seconds["learn"], **seconds}


def arguments_given() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("phases", type=int, help="at least 2; the first is warm-up")
    parser.add_argument("--stage", choices=STAGES, default="ppo")
    parser.add_argument("--finetune", choices=FINETUNE, default="full")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--model", metavar="DIR", help="a saved model")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    arguments = parser.parse_args()
    if arguments.phases < 2:
        parser.error("PHASES must be at least 2: the first is warm-up")
    return arguments


def main() -> None:
    """Times the phases and prints the line."""
    arguments = arguments_given()
    shape, device = SHAPES[arguments.shape], pick_device("auto")
    use_processor_well()
    setup = setup_of(shape, arguments.finetune, device, arguments.model, arguments.stage)
    ppo = replace(
        STAGES[arguments.stage],
        total_phases=arguments.phases,
        batch_size=shape.batch,
        num_minibatches=shape.minibatches,
        batches_per_learning_phase=shape.epochs,
        compute=Compute(
            micro_batch_size=arguments.micro_batch_size,
            dtype=arguments.dtype,
            compile=arguments.compile,
            gradient_checkpointing=arguments.gradient_checkpointing,
        ),
    )
    ppo.compute.prepare(setup)
    run = Phases(ppo, setup, start(ppo, setup, AdamWSettings(), Constant(), seed=0, inputs={}),
                 Stopwatch())  # fmt: skip
    began = time.perf_counter()
    warm_up(setup, rows=ppo.compute.micro_batch_size or ppo.minibatch_size)
    running = phases(run, arguments.phases)
    next(running)
    warm_up_s = time.perf_counter() - began
    counted = list(running)
    on_gpu = device.type == "cuda"
    gpu_peak = torch.cuda.max_memory_allocated() >> 20 if on_gpu else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    seconds = {part: median(row[part] for row in counted) for part in counted[0]}
    seconds |= {**learning_parts(run), "warm_up": warm_up_s}
    line = {
        "system": "rlhf_exp",
        "stage": arguments.stage,
        "shape": arguments.shape,
        "model": arguments.model,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "fp32" if setup.policy.autocast_dtype is None else "bf16",
        "compiled": setup.policy.is_compiled,
        **{f"{part}_s": round(value, 4) for part, value in seconds.items()},
        "optimizer_steps": shape.minibatches * shape.epochs,
        "resident_mib": round(resident_memory(setup.policy, setup.reference).total / 2**20, 1),
        "peak_mib": peak,
        "gpu_mib": gpu_peak,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
