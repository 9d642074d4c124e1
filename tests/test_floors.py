"""The rules of the source that no other tool holds: who imports whom, and how long things are."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_exp"
FILES = sorted(PACKAGE.rglob("*.py"))
# What Hydra finds by its place, and so stands beside the package.
PLUGINS = sorted((PACKAGE.parent / "hydra_plugins").rglob("*.py"))
MODULES = [path for path in FILES if path != PACKAGE / "__init__.py"]
# A module imports from lower floors and from its own subpackage.
FLOORS = [
    {"security"},
    {"functional", "types", "settings", "hf"},
    {"machine"},
    {"runs"},
    {"kernels", "tracking", "tasks"},
    {"models", "training"},
    {"rollout", "rewards"},
    {"rl"},
    {"stages", "sweeps"},
    {"report"},
    {"app"},
    {"inside"},
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
HEAVY = {
    "transformers", "transformer_lens", "matplotlib", "wandb", "peft", "datasets", "requests",
    "optuna", "plotly", "tensorboard", "trackio",
}  # fmt: skip
# Importing tokenizers costs what it is for; tasks import it when they build one.
IMPORTED_WHERE_CALLED = "rlhf_exp.tasks.tokenizers"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part(module: str) -> str:
    """The floor's member that a module of the package belongs to."""
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    """Every module that the file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from rlhf_exp import x` imports the module x.
            whole = node.module == "rlhf_exp"
            found += [f"{node.module}.{a.name}" for a in node.names] if whole else [node.module]
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_from_lower_floors_alone(path):
    own = part(module_name(path))
    for module in imports(path):
        if module.partition(".")[0] != "rlhf_exp":
            continue
        other = part(module)
        assert other == own or HEIGHT[other] < HEIGHT[own], f"{own} imports {module}"


def test_every_part_of_the_package_has_its_floor():
    found = {part(module_name(path)) for path in MODULES}
    assert found <= HEIGHT.keys()
    assert not (PACKAGE / "utils.py").exists()


def test_only_the_composition_root_its_complaints_and_the_plugin_know_hydra():
    knowing = {
        module_name(path)
        for path in [*FILES, *PLUGINS]
        if {module.partition(".")[0] for module in imports(path)} & {"hydra", "omegaconf"}
    }
    assert knowing == {
        "rlhf_exp.app.hydra_errors",
        "rlhf_exp.app.instantiate",
        "rlhf_exp.app.main",
        "rlhf_exp.app.options",
        "rlhf_exp.app.overrides",
        "rlhf_exp.app.run",
        "hydra_plugins.rlhf_exp_launching",
        "hydra_plugins.rlhf_exp_sweepers",
    }


def test_the_plugin_is_imported_by_none():
    for path in FILES:
        assert "hydra_plugins" not in {module.partition(".")[0] for module in imports(path)}


def test_the_side_wings_are_imported_by_none():
    for path in MODULES:
        wings = {part(m) for m in imports(path) if m.startswith("rlhf_exp.")} & {"report", "inside"}
        assert wings <= {part(module_name(path))}


def imported_with(statement: str) -> set[str]:
    script = f"import json, sys\n{statement}\nprint(json.dumps([*sys.modules]))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_that_takes_seconds():
    names = [module_name(path) for path in FILES if path.name != "__init__.py"]
    names = [name for name in names if name != IMPORTED_WHERE_CALLED]
    assert "rlhf_exp.stages.ppo" in names
    imported = imported_with(f"import {', '.join(names)}")
    assert imported >= set(names)
    assert imported.isdisjoint(HEAVY | {"sklearn"})


@pytest.mark.parametrize("module", ["rlhf_exp.app.run", "hydra_plugins.rlhf_exp_sweepers"])
def test_a_command_line_is_read_without_torch(module):
    imported = imported_with(f"import {module}")
    assert module in imported
    assert imported.isdisjoint(HEAVY | {"torch", "rlhf_exp.app.steps"})


@pytest.mark.parametrize("path", [*FILES, *PLUGINS], ids=module_name)
def test_files_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 400
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"
        if isinstance(node, ast.ImportFrom):
            # Annotations as strings would switch the checks of shapes and settings off.
            assert node.module != "__future__"
    if source:
        assert ast.get_docstring(tree), "a module says what it knows"
