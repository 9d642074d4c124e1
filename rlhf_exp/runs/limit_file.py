"""limit.json in a run's folder: scores of the reference's completions, and the frontier that
follows from them.

It knows the file, not how a frontier is computed.
"""

from pathlib import Path

from pydantic import BaseModel, FiniteFloat

from rlhf_exp.runs.files import write_whole
from rlhf_exp.runs.paths import LIMIT
from rlhf_exp.settings import ConfigError

Point = tuple[FiniteFloat, FiniteFloat, FiniteFloat]  # score, KL, effective samples
Table = list[list[FiniteFloat]]


class LimitFile(BaseModel):
    """Scores and true rewards have a row a prompt, all of the same length; `true_rewards` is None
    if the task knows none. The points of a frontier are in the order of their KL."""

    scores: Table
    true_rewards: Table | None = None
    frontier: list[Point] = []
    true_frontier: list[Point] = []


def write_limit_file(folder: Path, file: LimitFile) -> None:
    """Writes limit.json into the folder of a run."""
    write_whole(folder / LIMIT, file.model_dump_json(exclude_none=True) + "\n")


def read_limit_file(folder: Path) -> LimitFile | None:
    """The content of limit.json, None if there is none. Raises ConfigError if it cannot be read."""
    path = folder / LIMIT
    try:
        file = LimitFile.model_validate_json(path.read_bytes())
        tables = [file.scores, *([] if file.true_rewards is None else [file.true_rewards])]
        if len({len(row) for table in tables for row in table}) != 1:
            raise ValueError("rows differ in length")
        return file
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not what a run writes"
        raise ConfigError(f"{path} cannot be read ({reason})") from error
