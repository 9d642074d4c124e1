"""Which run is resumed, and which keys of its configuration may change.

It knows runs' folders and plain configurations, and nothing of Hydra.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.app.overrides import unquote
from rlhf_exp.runs.config_keys import MAX_KL_SUM, OF_ONE_START, leaves, use_of
from rlhf_exp.runs.lock import is_locked
from rlhf_exp.runs.paths import CONFIG, is_run, last_written, read_overrides, runs_below
from rlhf_exp.runs.status import is_done
from rlhf_exp.security.redaction import REDACTED
from rlhf_exp.settings import ConfigError

AUTO = "auto"
LONGEST_NAME = 255  # bytes that nearly all file systems allow
RUNS = Path("outputs")  # where the configuration puts runs
# Hydra's options whose value may be the next word.
WITH_A_VALUE = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn",
    "--config-dir", "-cd", "--info", "-i",
}  # fmt: skip
ABSENT = object()


def run_dir(resume: str | None, otherwise: str) -> str:
    """The folder of the resumed run, or else of the new one. Raises ConfigError if the run does not
    exist, and if a new folder is not below the folder of runs or its name is too long."""
    if ".." in Path(otherwise).parts:
        raise ConfigError(f"name: {otherwise} leads elsewhere; use letters, digits, _, - and .")
    longest = max(len(os.fsencode(part)) for part in Path(otherwise).parts)
    if longest > LONGEST_NAME:
        raise ConfigError(
            f"name: a folder's name has at most {LONGEST_NAME} bytes, not {longest}: shorten it"
        )
    return otherwise if not resume else str(find_run(resume, Path(otherwise).parent.parent))


def find_run(resume: str, runs: Path) -> Path:
    """The folder of the run to resume: the named one, or with "auto" the newest below `runs`/NAME/
    that is neither done nor still running. Raises ConfigError if there is none."""
    if resume != AUTO:
        if not is_run(Path(resume)):
            raise ConfigError(f"resume={resume}: no run's folder, which has {CONFIG}")
        return Path(resume)
    unfinished = [run for run in runs_below(runs) if not is_done(run) and not is_locked(run)]
    if not unfinished:
        raise ConfigError(f"resume={AUTO}: no unfinished run below {runs}: start one, without it")
    return max(unfinished, key=last_written)


def key_of(word: str) -> str:
    """The key, or the group, that a word of the command line sets."""
    return word.lstrip("+~").split("=")[0]


def recorded_words(run: Path) -> list[str]:
    """The words of the command line that made a run's configuration, except those with secrets,
    which are not recorded. Raises ConfigError if they cannot be read."""
    words = read_overrides(run)
    return [word for word in words if REDACTED not in word and key_of(word) not in OF_ONE_START]


def with_recorded_words(words: Sequence[str]) -> list[str]:
    """A command line that resumes a run, with the run's recorded words before its own, except keys
    of options that are no longer chosen; any other command line unchanged."""
    before = ("", *words)
    first = next((i for i, word in enumerate(words)
                  if not word.startswith("-") and before[i] not in WITH_A_VALUE), 0)  # fmt: skip
    options, words = words[:first], words[first:]
    values = {key: value for key, _, value in (word.partition("=") for word in words)}
    resume = unquote(values.get("resume", ""))
    folder = unquote(values.get("hydra.run.dir", ""))
    if not resume or resume == "null" or {"-m", "--multirun"} & {*options, *words}:
        return [*options, *words]
    try:
        run = Path(folder) if resume == AUTO and folder else find_run(resume, RUNS)
        recorded = recorded_words(run) if is_run(run) else []
    except ConfigError:  # reported when the run is opened
        return [*options, *words]
    groups = [key_of(w) for w in words if not w.startswith("-") and "." not in key_of(w)]
    prefixes = tuple(f"{group}." for group in groups)
    new_keys = {key_of(word) for word in words}
    inherited = [
        w for w in recorded if key_of(w) not in new_keys and not key_of(w).startswith(prefixes)
    ]
    return [*options, *inherited, *words]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key whose value changes; ABSENT stands for a missing key."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {_text_of(self.before)} -> {_text_of(self.after)}"


def _text_of(value: Any) -> str:
    return "absent" if value is ABSENT else "null" if value is None else str(value)


def find_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The leaves that differ, in the order of their keys."""
    old, new = dict(leaves(before)), dict(leaves(after))
    return [
        Change(key=key, before=old.get(key, ABSENT), after=new.get(key, ABSENT))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    ]


def check_changes(changes: Sequence[Change], allowed: Sequence[str], *, run: Path) -> None:
    """Raises ConfigError with the changes that would change the run's results, unless `allowed`
    names the key or a group above it. More phases or updates are always allowed."""
    refused = [change for change in changes if not _is_free(change, allowed)]
    if refused:
        keys = ",".join(change.key for change in refused)
        listing = "\n".join(f"  {change}" for change in refused)
        raise ConfigError(
            f"resume={run} uses that run's own configuration, which differs:\n{listing}\nleave that"
            f" out, or allow it with 'resume_with=[{keys}]'"
        )


def check_allowed(allowed: Sequence[str], *configs: Mapping[str, Any]) -> None:
    """Raises ConfigError if a name in `allowed` is neither a key nor a group of `configs`."""
    keys = [f"{key}." for config in configs for key, _ in leaves(config)]
    for name in allowed:
        if not any(key.startswith(f"{name}.") for key in keys):
            raise ConfigError(f"resume_with: {name} is no key of the configuration")


def _is_free(change: Change, allowed: Sequence[str]) -> bool:
    may = use_of(change.key, {}).resume
    if may == "free" or (may == "larger" and _is_larger(change)):
        return True
    return any(change.key == key or change.key.startswith(f"{key}.") for key in allowed)


def _is_larger(change: Change) -> bool:
    counts = (change.before, change.after)
    return all(isinstance(n, int | float) for n in counts) and change.after > change.before


def can_continue(changes: Sequence[Change]) -> bool:
    """Returns True if a finished run can continue with the changes: more phases or updates, or
    another KL budget."""
    return any(
        change.key == MAX_KL_SUM
        or (use_of(change.key, {}).resume == "larger" and _is_larger(change))
        for change in changes
    )


def apply_changes(config: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """A copy of the configuration with the changes."""
    result: dict[str, Any] = json.loads(json.dumps(config))
    for change in changes:
        *groups, last = change.key.split(".")
        place = result
        for group in groups:
            if not isinstance(place.get(group), dict):
                place[group] = {}
            place = place[group]
        if change.after is ABSENT:
            place.pop(last, None)
        else:
            place[last] = change.after
    return result
