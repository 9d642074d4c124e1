"""SECURITY.md and docs/reliability.md promise what is tested."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECURITY, RELIABILITY = ROOT / "SECURITY.md", ROOT / "docs" / "reliability.md"


def rows(page: Path, title: str) -> list[list[str]]:
    """The cells of the first table below a title."""
    part = page.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


@pytest.mark.parametrize(
    ("page", "title", "fewest"), [(SECURITY, "Promised", 9), (RELIABILITY, "Promises", 20)]
)
def test_each_promise_has_tests_that_exist(page: Path, title: str, fewest: int) -> None:
    promises = rows(page, title)
    assert len(promises) >= fewest
    for promise, held_by in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", held_by)
        assert named or "SECURITY.md" in held_by, f"no test holds: {promise}"
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in functions or (not name and functions), f"{file} has no {name}"


def test_nothing_that_was_tried_was_lost() -> None:
    tried = rows(RELIABILITY, "Tried")
    assert len(tried) >= 20
    for _, times, survived, lost in tried:
        assert int(times) == int(survived) > 0
        assert int(lost) == 0


def test_nobody_is_named() -> None:
    text = SECURITY.read_text(encoding="utf-8")
    assert not re.search(r"[\w.-]+@[\w-]+\.\w+|https?://", text)
