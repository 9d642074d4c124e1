"""The parts of a look inside a run: each makes a record of a subject, pictures and a line of text.

A new part is a module with `measure`, `draw` and `summarize`, and a line of PARTS.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.inside import kl, overlap, weights
from rlhf_exp.inside.subject import Subject
from rlhf_exp.runs.records import record_folder, write_record
from rlhf_exp.settings import ConfigError

SCHEMA = 1  # raised if a number in the records comes to mean something else; docs/inside.md
OVERLAP = "overlap"


@dataclass(frozen=True, kw_only=True)
class Part:
    """`measure` makes the record, which JSON can hold; `draw` writes its pictures to a folder;
    `summarize` says the most important numbers. `measure` raises ConfigError for a run that does
    not allow the part."""

    measure: Callable[[Subject], dict[str, Any]]
    draw: Callable[[Mapping[str, Any], Path], list[Path]]
    summarize: Callable[[Mapping[str, Any]], str]


PARTS = {
    "kl": Part(measure=kl.measure, draw=kl.draw, summarize=kl.summarize),
    "weights": Part(measure=weights.measure, draw=weights.draw, summarize=weights.summarize),
}


def look_inside(subject: Subject, names: Sequence[str]) -> Iterator[str]:
    """Makes the parts in the run's folder; yields a line about each. A part that the run does not
    allow says why, in its record too. Raises ConfigError if the run did not keep the phase."""
    subject.load()
    folder = record_folder(subject.run.folder, subject.phase)
    for name in names:
        part = PARTS[name]
        try:
            record = part.measure(subject)
        except ConfigError as error:
            write_record(folder, name, _content(subject, name, None, missing=str(error)))
            yield f"{name}: left out: {error}"
            continue
        paths = [write_record(folder, name, _content(subject, name, record))]
        paths += part.draw(record, folder)
        yield f"{name}: {part.summarize(record)}  ({', '.join(map(str, paths))})"


def compare_runs(kept: Sequence[overlap.Kept], subjects: Sequence[Subject]) -> str:
    """Writes the overlap of the runs' changes to the folder of each; returns a line about it."""
    try:
        record = overlap.measure(kept)
    except ConfigError as error:
        return f"{OVERLAP}: left out: {error}"
    for subject in subjects:
        folder = record_folder(subject.run.folder, subject.phase)
        write_record(folder, OVERLAP, _content(subject, OVERLAP, record))
    return f"{OVERLAP}: {overlap.summarize(record)}"


def _content(
    subject: Subject, name: str, record: Mapping[str, Any] | None, *, missing: str | None = None
) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "part": name, "run": subject.run.folder.name, "phase": subject.phase,
        "missing": missing, "record": record,
    }  # fmt: skip
