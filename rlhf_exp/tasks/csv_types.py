"""Types of CSV columns, inferred from their cells. Knows texts, not files."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Missing cells of a column of numbers or booleans; in a column of texts they are texts.
MISSING = {"", "NA", "N/A", "NaN", "nan", "null", "None"}
TYPES: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"[+-]?(0|[1-9][0-9]{0,999})"), int),
    (re.compile(r"[+-]?((0|[1-9][0-9]{0,99})(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?"), float),
    (re.compile(r"[Tt]rue|TRUE|[Ff]alse|FALSE"), lambda cell: cell.lower() == "true"),
)


def typed_columns(
    cells: Mapping[str, Sequence[str]], text_columns: Sequence[str]
) -> dict[str, Sequence[Any]]:
    """The columns, converted to the type of their cells, except `text_columns`."""
    return {
        n: column if n in text_columns else _parse_column(column) for n, column in cells.items()
    }


def rows_of(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of equal length as rows."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _parse_column(cells: Sequence[str]) -> Sequence[Any]:
    """A column as integers, floats or booleans if all cells that are not missing have that type,
    with None for missing ones; else as texts. Integers with leading zeros are texts."""
    filled = {cell for cell in cells if cell not in MISSING}
    for pattern, convert in TYPES:
        if filled and all(pattern.fullmatch(cell) for cell in filled):
            return [None if cell in MISSING else convert(cell) for cell in cells]
    return cells if any(cells) else [None] * len(cells)
