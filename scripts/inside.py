"""What training changed in a run's model: python scripts/inside.py RUN [RUN ...]

Writes inside/ in each run's folder: every number as JSON, and pictures. No account, no network.
"""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of matplotlib

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from rlhf_exp.hf import quieten_transformers
from rlhf_exp.inside.loading import open_run
from rlhf_exp.inside.overlap import keep
from rlhf_exp.inside.parts import PARTS, compare_runs, look_inside
from rlhf_exp.inside.subject import Subject
from rlhf_exp.machine.streams import make_streams_unbreakable
from rlhf_exp.settings import ConfigError
from rlhf_exp.tracking.progress import on_terminal


def _track(items: Sequence[Any], what: str) -> Iterable[Any]:
    return tqdm(items, desc=what, leave=False, dynamic_ncols=True, disable=not on_terminal())


def main() -> None:
    """Reads the arguments, makes the parts of each run, prints a line about each."""
    make_streams_unbreakable()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", help="folders of finished runs; seeds of one experiment are compared")
    add("--only", default=",".join(PARTS), help="parts, by commas (%(default)s)")
    add("--phase", type=int, help="a phase with a snapshot or checkpoint (the end)")
    add("--samples", type=int, default=128, help="completions to sample (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda or auto (%(default)s)")
    add("--trust-remote-code", action="store_true", help="run the model's own code")
    add("--allow-targets", nargs="*", default=[], help="modules that the configuration may name")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted({*names} - PARTS.keys()):
        parser.error(f"--only={unknown[0]}: the parts are {', '.join(PARTS)}")
    if arguments.samples < 1:
        parser.error(f"--samples={arguments.samples}: give at least 1")
    quieten_transformers()
    options = {"device": arguments.device, "trust_remote_code": arguments.trust_remote_code,
               "allow_targets": arguments.allow_targets}  # fmt: skip
    kept, subjects = [], []
    try:
        for folder in arguments.runs:
            made = {"phase": arguments.phase, "num_samples": arguments.samples, "track": _track}
            subject = Subject(run=open_run(folder, **options), **made)
            for line in look_inside(subject, names):
                print(line)
            if "weights" in names and len(arguments.runs) > 1:
                kept.append(keep(subject))
            subjects.append(Subject(run=subject.run, **made))  # without its models
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if kept:
        print(compare_runs(kept, subjects))


if __name__ == "__main__":
    main()
