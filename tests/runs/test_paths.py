"""Only rlhf_exp.runs knows what the files of a run are called."""

import ast
from pathlib import Path

import pytest

from rlhf_exp.runs import paths

ROOT = Path(__file__).parents[2]
READERS = [
    *(path for path in (ROOT / "rlhf_exp").rglob("*.py") if path.parent.name != "runs"),
    *(ROOT / "scripts").glob("*.py"),
    *(ROOT / "hydra_plugins").glob("*.py"),
]
NAMES = {
    value
    for name, value in vars(paths).items()
    if name.isupper() and (value.endswith((".json", ".jsonl", ".txt", ".log", ".yaml")))
} | {paths.HYDRA, paths.LOCK}


@pytest.mark.parametrize("path", READERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_holds_a_name_of_a_runs_file(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert strings.isdisjoint(NAMES)


def test_the_names_are_those_of_a_run(tmp_path):
    assert {"status.json", "metrics.jsonl", "result.json", ".hydra/config.yaml"} <= NAMES
    with pytest.raises(FileNotFoundError, match="result"):
        paths.read_result(tmp_path)
    (tmp_path / paths.LOG).touch()
    assert paths.is_unused(tmp_path)
    (tmp_path / paths.STATUS).touch()
    assert not paths.is_unused(tmp_path)
    paths.forget_status(tmp_path)
    assert paths.is_unused(tmp_path)
