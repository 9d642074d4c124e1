"""What the tests tried, counted for the table in docs/reliability.md.

Counts go to the folder that the environment variable RLHF_EXP_RELIABILITY names; without it they
are not kept. `python -m tests.reliability FOLDER` prints the table.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

FOLDER = "RLHF_EXP_RELIABILITY"

_counts: Counter[str] = Counter()


def count_cases(kind: str, number: int, *, lost: int = 0) -> None:
    """So many more cases of a kind were tried, of which so many lost something. Each process of a
    test run writes a file of its own."""
    _counts[f"{kind}/tried"] += number
    _counts[f"{kind}/lost"] += lost
    folder = os.environ.get(FOLDER)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(sorted(_counts.items())), indent=1)
        (Path(folder) / f"counts-{os.getpid()}.json").write_text(text + "\n")


def table(folder: Path) -> str:
    """All counts of a test run as Markdown."""
    total: Counter[str] = Counter()
    for file in sorted(folder.glob("counts-*.json")):
        total.update(json.loads(file.read_text()))
    lines = ["| what was done | times | survived | lost |", "| --- | --- | --- | --- |"]
    for kind in sorted({name.rpartition("/")[0] for name in total}):
        tried, lost = total[f"{kind}/tried"], total[f"{kind}/lost"]
        lines.append(f"| {kind} | {tried} | {tried - lost} | {lost} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
