"""A PPO phase of this package beside other systems', in turn, each time in a fresh process:
python benchmarks/side_by_side.py SHAPE... --other NAME=COMMAND [--other ...] [--ours NAME=OPTIONS]

In COMMAND, {shape} and {phases} stand for the shape's name and the number of phases; it prints a
JSON line with phase_s and peak_mib last. OPTIONS are ppo_phase.py's:
    --ours auto= --ours 'fp32=--dtype fp32'
    --other 'seed=VENV/bin/python seed_loop.py {shape} {phases}'
    --other 'trl=VENV/bin/python benchmarks/trl_ppo.py {shape} {phases}'
SHAPE= in the environment reaches all of them; nothing else about it is changed, so this script does
not import what ppo_phase.py sets there for itself. Prints a Markdown table a shape: medians, and
how many times as long a phase and how many times the memory is, as the median of the ratios within
each round."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from shapes import SHAPES

Lines = dict[str, list[dict[str, Any]]]


def named(text: str) -> tuple[str, str]:
    """A name and what it stands for."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=...")
    return name, value


def line_of(command: list[str]) -> dict[str, Any]:
    """The last line that the command prints, as JSON. Raises SystemExit with the end of what it
    says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_in_turn(commands: dict[str, list[str]], rounds: int) -> Lines:
    """The lines of every command by round; each is also printed on stderr."""
    lines: Lines = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            lines[name].append(line_of(command))
            print(name, json.dumps(lines[name][-1]), file=sys.stderr, flush=True)
    return lines


def table(lines: Lines, ours: list[str]) -> str:
    """Medians of all systems, and ratios to each of ours with the least and the greatest round."""

    def ratio(name: str, to: str, key: str) -> str:
        pairs = zip(lines[name], lines[to], strict=True)
        ratios = sorted(row[key] / base[key] for row, base in pairs)
        return f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"

    columns = [f"{what} / {name}" for name in ours for what in ("time", "memory")]
    head = ["system", "dtype", "phase_s", "rollout_s", "peak_mib", *columns]
    rows = [head, ["---"] * len(head)]
    for name, found in lines.items():
        numbers = [
            f"{median(line[key] for line in found):.{digits}f}" if key in found[0] else ""
            for key, digits in (("phase_s", 3), ("rollout_s", 3), ("peak_mib", 0))
        ]
        ratios = [ratio(name, to, key) for to in ours for key in ("phase_s", "peak_mib")]
        rows.append([name, found[0].get("dtype", ""), *numbers, *ratios])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Runs everything and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", choices=sorted(SHAPES), metavar="SHAPE")
    parser.add_argument("--other", type=named, action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--ours", type=named, action="append", metavar="NAME=OPTIONS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--phases", type=int, default=6)
    arguments = parser.parse_args()
    ours, others = dict(arguments.ours or [("rlhf_exp", "")]), dict(arguments.other)
    if len({**ours, **others}) < len(arguments.ours or [""]) + len(arguments.other):
        parser.error("the names of --ours and --other must differ")
    script = str(Path(__file__).with_name("ppo_phase.py"))
    for shape in arguments.shapes:
        words = {"shape": shape, "phases": str(arguments.phases)}
        commands = {
            name: [sys.executable, script, *words.values(), *shlex.split(options)]
            for name, options in ours.items()
        }
        for name, command in others.items():
            commands[name] = [word.format(**words) for word in shlex.split(command)]
        lines = run_in_turn(commands, arguments.rounds)
        told = f"{arguments.rounds} rounds of {arguments.phases} phases"
        print(f"\n{shape}: {SHAPES[shape]}, {told}\n\n{table(lines, list(ours))}", flush=True)


if __name__ == "__main__":
    main()
