"""Memory and time of a PPO phase by the choice of reference and the memory knobs of the learning
step, side by side: python benchmarks/memory.py [SHAPE] [PHASES]

Each choice runs in a process of its own (benchmarks/ppo_phase.py); prints a Markdown table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

CHOICES = {
    "full": [],
    "last_layers, 2 blocks": ["--finetune", "last_layers"],
    "lora, rank 16": ["--finetune", "lora"],
    "full, micro_batch_size=1": ["--micro-batch-size", "1"],
    "full, gradient_checkpointing": ["--gradient-checkpointing"],
    "lora, both": [*("--finetune", "lora", "--micro-batch-size", "1", "--gradient-checkpointing")],
}


def main() -> None:
    """Runs every choice in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", nargs="?", default="gpt2")
    parser.add_argument("phases", nargs="?", type=int, default=3)
    arguments = parser.parse_args()
    script = Path(__file__).with_name("ppo_phase.py")
    print(
        "| choice | stays, counted (MiB) | peak of the process (MiB) | ratio | s a phase | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    first = None
    for name, options in CHOICES.items():
        done = subprocess.run(
            [sys.executable, str(script), arguments.shape, str(arguments.phases), *options],
            check=True,
            capture_output=True,
            text=True,
        )
        line = json.loads(done.stdout.splitlines()[-1])
        first = first or line
        print(
            f"| {name} | {line['resident_mib']:.0f} | {line['peak_mib']}"
            f" | {line['peak_mib'] / first['peak_mib']:.2f} | {line['phase_s']:.2f}"
            f" | {line['phase_s'] / first['phase_s']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
