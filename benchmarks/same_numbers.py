"""Does a run give the same numbers as at another commit? For a change of structure alone:
python benchmarks/same_numbers.py COMMIT [OVERRIDE ...]

Trains once with the checkout and once with COMMIT (in a worktree of its own, removed at the end),
each with artifacts of its own, and compares metrics.jsonl number by number, time/* aside. Exits
with 1 if a number differs."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def rows_of(checkout: Path, overrides: list[str], run: Path) -> list[dict[str, float]]:
    """The metrics of a run of that checkout, without times."""
    command = [sys.executable, "train.py", *overrides, "logger=local", f"hydra.run.dir={run}"]
    command += [f"artifacts_dir={run}-artifacts"]
    subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def main() -> int:
    """Trains twice and prints what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", other, arguments.commit],
                       cwd=HERE, check=True)  # fmt: skip
        try:
            here = rows_of(HERE, arguments.overrides, Path(folder) / "here")
            there = rows_of(other, arguments.overrides, Path(folder) / "there")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=HERE, check=True)
    numbers = sum(map(len, here))
    differing = [
        f"row {i}, {key}: {new.get(key)} here, {old.get(key)} at {arguments.commit}"
        for i, (new, old) in enumerate(zip(here, there, strict=False))
        for key in sorted({*new, *old})
        if (key in new, new.get(key)) != (key in old, old.get(key))
    ]
    if len(here) != len(there):
        differing.append(f"{len(here)} rows here, {len(there)} at {arguments.commit}")
    print(f"{' '.join(arguments.overrides)}: {len(here)} rows, {numbers} numbers")
    print(f"{len(differing)} differ from {arguments.commit}", *differing[:10], sep="\n")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
