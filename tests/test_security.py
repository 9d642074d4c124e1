"""SECURITY.md promises what is tested."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_each_promise_has_tests_that_exist():
    table = TEXT.partition("## Promised")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 9
    for promise, held_by in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held_by)
        assert named, f"no test holds: {promise}"
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{file} has no {name}"


def test_nobody_is_named():
    assert not re.search(r"[\w.-]+@[\w-]+\.\w+|https?://", TEXT)
