"""What a checkpoint costs a run of PPO on a model of a named shape with random weights:
python benchmarks/checkpoint.py SHAPE ROUNDS

Rounds of PHASES phases with one checkpoint at their beginning and rounds without one take turns in
one process. Prints one JSON line, medians over the rounds: seconds a phase without; milliseconds
that the loop waits for a checkpoint, at the call and at the optimizer's next step; seconds until it
is on the disk, and its size; what a round with one takes longer; and that as a share of the phases
between two checkpoints at the default interval. The reward costs nothing, so that a phase is as
short as can be."""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of torch

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch

from ppo_phase import setup_of
from rlhf_exp.rl.compute import warm_up
from rlhf_exp.rl.phases import Phases, start
from rlhf_exp.stages.ppo import PPO
from rlhf_exp.runs.checkpoint import CheckpointWriter
from rlhf_exp.runs.context import pick_device
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import Constant
from rlhf_exp.machine.cpu_settings import use_processor_well
from rlhf_exp.training.saver import split_state
from rlhf_exp.machine.timing import Stopwatch
from shapes import SHAPES

PHASES = 6  # of a round
OUTPUTS = Path(__file__).resolve().parents[1] / "outputs"  # what is left if it is killed is ignored


class Written:
    """Notes when the thread that writes a checkpoint has ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def watch(self, began: float) -> None:
        """Waits for it on a thread."""
        [thread] = [t for t in threading.enumerate() if t.name == "checkpoint"]

        def wait() -> None:
            thread.join()
            self.seconds.append(time.perf_counter() - began)

        threading.Thread(target=wait).start()


def main() -> None:
    """Times the rounds and prints the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("rounds", type=int)
    arguments = parser.parse_args()
    shape, device = SHAPES[arguments.shape], pick_device("auto")
    use_processor_well()
    setup = setup_of(shape, "full", device)
    ppo = PPO(
        batch_size=shape.batch,
        num_minibatches=shape.minibatches,
        batches_per_learning_phase=shape.epochs,
    )
    ppo.compute.prepare(setup)
    state = start(ppo, setup, AdamWSettings(), Constant(), seed=0, inputs={})
    run = Phases(ppo, setup, state, Stopwatch())
    warm_up(setup, rows=ppo.minibatch_size)
    run.run(lambda metrics: None)
    rounds: dict[bool, list[float]] = {True: [], False: []}
    calls, waits, written = [], [], Written()
    with tempfile.TemporaryDirectory(dir=OUTPUTS) as folder:
        writer = CheckpointWriter(Path(folder), state.optimizer)
        for number in range(2 * arguments.rounds):
            saves, before = number % 2 == 0, writer.waited_s
            began = time.perf_counter()
            if saves:
                writer.save(state.phase, *split_state(state.state_dict()))
                calls.append(time.perf_counter() - began)
                written.watch(began)
            for _ in range(PHASES):
                run.run(lambda metrics: None)
            rounds[saves].append(time.perf_counter() - began)
            writer.wait()
            if saves:
                waits.append(writer.waited_s - before)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    longer = median(a - b for a, b in zip(rounds[True], rounds[False], strict=True))
    phase_s = median(rounds[False]) / PHASES
    line = {
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "phase_s": round(phase_s, 3),
        "call_ms": round(1000 * median(calls), 1),
        "wait_ms": round(1000 * median(waits), 1),
        "longest_call_and_wait_ms": round(
            1000 * max(a + b for a, b in zip(calls, waits, strict=True)), 1
        ),
        "on_disk_s": round(median(written.seconds), 2),
        "mib": round(size / 2**20 / 2),  # the newest two are kept
        "longer_s": round(longer, 3),
        "share_at_default": round(longer / (PPO().checkpoint_every or 1) / phase_s, 4),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
