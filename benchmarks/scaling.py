"""How the parts of a PPO phase grow with batch, gen_len, vocabulary and width:
python benchmarks/scaling.py [--to outputs/scaling.png]

Each of the four is varied around a base shape, every point in a process of its own
(benchmarks/ppo_phase.py). Prints Markdown tables and draws a PNG: seconds by part with the slope of
a least-squares line through the logarithms, 1 for a cost in proportion, 0 for none."""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

from shapes import Shape, as_variable, checked

BASE = Shape(4, 256, 4, 1000, 256, 32, 8, 32, 4, 2)
HEAD_WIDTH = 64  # d_model varies with num_heads, heads stay this wide
VARIED = {
    "batch": (8, 16, 32, 64, 128),
    "gen_len": (8, 16, 32, 64, 128),
    "vocab": (500, 2000, 8000, 16000, 50000),
    "d_model": (128, 256, 384, 512, 768),
}
PARTS = ("phase", "sample", "measure", "forward", "backward", "optimizer")


def shape_with(field: str, value: int) -> Shape:
    """The base shape with one field changed, and the number of heads with the width."""
    shape = BASE._replace(**{field: value})
    if field == "d_model":
        shape = shape._replace(num_heads=value // HEAD_WIDTH)
    return checked(shape)


def seconds_of(shape: Shape, arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each part, over the runs of the shape."""
    command = [sys.executable, str(Path(__file__).with_name("ppo_phase.py")), "custom"]
    lines = []
    for _ in range(arguments.rounds):
        done = subprocess.run(
            [*command, str(arguments.phases), "--dtype", arguments.dtype],
            env={**os.environ, "SHAPE": as_variable(shape)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        lines.append(json.loads(done.stdout.splitlines()[-1]))
    return {part: statistics.median(line[f"{part}_s"] for line in lines) for part in PARTS}


def slope(values: list[int], seconds: list[float]) -> float:
    """The slope of the least-squares line through the logarithms of both."""
    logs = [math.log(value) for value in values], [math.log(lap) for lap in seconds]
    return statistics.linear_regression(*logs).slope


def measure(field: str, arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Seconds by part for each value of a field, printed as a table with their slopes."""
    print(f"\n| {field} | {' | '.join(f'{part}_s' for part in PARTS)} |")
    print("| --- " * (1 + len(PARTS)) + "|")
    points = {}
    for value in VARIED[field][: arguments.points]:
        points[value] = seconds_of(shape_with(field, value), arguments)
        row = " | ".join(f"{points[value][part]:.4f}" for part in PARTS)
        print(f"| {value} | {row} |", flush=True)
    for name, last in (("slope", 0), ("slope of the last two", -2)):
        rows = dict(list(points.items())[last:])
        slopes = [slope(list(rows), [row[part] for row in rows.values()]) for part in PARTS]
        print(f"| {name} | {' | '.join(f'{number:.2f}' for number in slopes)} |", flush=True)
    return points


def draw(measured: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """A panel for each field, a line for each part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure, axes = plt.subplots(2, 2, figsize=(13, 8), sharey=True, layout="constrained")
    for panel, (field, points) in zip(axes.flat, measured.items(), strict=True):
        values = list(points)
        for part in PARTS:
            seconds = [row[part] for row in points.values()]
            label = f"{part}  {slope(values, seconds):.2f}"
            width = 2.5 if part == "phase" else 1.2
            panel.loglog(values, seconds, marker="o", markersize=4, linewidth=width, label=label)
        panel.set_xlabel(f"{field} (else {getattr(BASE, field)})")
        panel.set_xticks(values, [str(value) for value in values])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.grid(alpha=0.3)
        panel.legend(title="log-log slope", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for panel in axes[:, 0]:
        panel.set_ylabel("seconds a phase")
    figure.suptitle(f"One PPO phase by part; base {as_variable(BASE)}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs all points, prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=Path("outputs/scaling.png"))
    parser.add_argument("--phases", type=int, default=4, help="of each run; the first is warm-up")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each point")
    parser.add_argument("--points", type=int, default=5, help="values of each field, from 2")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    arguments = parser.parse_args()
    if arguments.points < 2:
        parser.error("--points must be at least 2, for a slope")
    print(f"base: {BASE}, dtype {arguments.dtype}")
    draw({field: measure(field, arguments) for field in VARIED}, arguments.to)
    print(f"\n{arguments.to}")


if __name__ == "__main__":
    main()
