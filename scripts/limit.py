"""The limit of a model and a reward before anyone trains: which score can be had at which KL.

    python scripts/limit.py MODEL REWARD PROMPTS [KEY=VALUE ...]

MODEL is the folder of a run, a model's directory, a hub name or an option of conf/model; REWARD an
option of conf/reward; PROMPTS a file or an option of conf/task. KEY=VALUE are words of train.py,
such as reward.keywords=[good] or sampler.gen_len=40.
"""

from rlhf_exp.app.main import main as train  # noqa: I001  first, as in train.py

import argparse
import sys
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf_exp.functional.optimal_frontier import MIN_SAMPLES
from rlhf_exp.machine.locations import CONF
from rlhf_exp.report.figures import draw_limit_alone
from rlhf_exp.report.payload import Names, build_payload
from rlhf_exp.runs.limit_file import Point, read_limit_file

ROWS = 10  # of a table


def main() -> None:
    """Samples the model by stage=best_of_n, prints a table, draws the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("reward")
    parser.add_argument("prompts")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--samples", type=int, default=256, help="of each prompt (%(default)s)")
    parser.add_argument("--out", type=Path, help="a new folder (outputs/limit/STAMP)")
    arguments = parser.parse_intermixed_args()
    out = arguments.out or Path("outputs/limit", f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    own = any(word.startswith("experiment=") for word in arguments.words)
    sys.argv = [
        "train.py",
        *(["name=limit"] if own else ["~experiment", "name=limit"]),
        "stage=best_of_n",
        *_chosen("model", arguments.model, file="local model.base_model"),
        *_chosen("task", arguments.prompts, file="dataset task.held_out_fraction=0 task.path"),
        f"reward={arguments.reward.removeprefix('reward=')}",
        f"stage.samples_per_prompt={arguments.samples}",
        "logger=local",
        f"hydra.run.dir={out}",
        *arguments.words,
    ]
    try:
        train()
    except SystemExit as end:
        if end.code:
            raise
    _show(out, arguments.samples)


def _chosen(group: str, value: str, *, file: str) -> list[str]:
    """The words that choose an option, or with the option `file` anything else."""
    if (CONF / group / f"{value}.yaml").is_file():
        return [f"{group}={value}"]
    *words, key = file.split()
    return [f"{group}={words[0]}", *words[1:], f"{key}={value}"]


def _show(out: Path, samples: int) -> None:
    limit = read_limit_file(out)
    if limit is None:  # --dry-run
        return
    console = Console()
    for title, points in (("score", limit.frontier), ("true reward", limit.true_frontier)):
        if points:
            console.print(_table(title, points, samples))
    score, kl, _ = limit.frontier[-1]
    is_best = score > sum(map(max, limit.scores)) / len(limit.scores) - 1e-6
    further = "no sample scores more" if is_best else "raise --samples to see further"
    print(
        f"{samples} samples of each prompt ({len(limit.scores)}) tell the limit up to a KL of"
        f" {kl:.3g} nats a completion, where the best policy scores {score:.4g}; {further}"
    )
    print(draw_limit_alone(build_payload([out], Names(), made=datetime.now()), out))


def _table(title: str, points: list[Point], samples: int) -> Table:
    """The points at about equal distances; a point needs as many samples as leave ten effective
    ones."""
    table = Table(box=None, pad_edge=False)
    for head in (title, "least KL, nats", "effective samples", "samples needed"):
        table.add_column(head, justify="right")
    places = {round(i * (len(points) - 1) / (ROWS - 1)) for i in range(ROWS)}
    for score, kl, effective in (points[place] for place in sorted(places)):
        needed = MIN_SAMPLES * samples / effective
        table.add_row(f"{score:.4g}", f"{kl:.3f}", f"{effective:.0f}", f"{needed:.0f}")
    return table


if __name__ == "__main__":
    main()
