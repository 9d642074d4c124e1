import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_exp.runs.artifacts import (
    PACKAGE,
    ArtifactStore,
    content_hash,
    source_closure,
    source_hash,
)
from rlhf_exp.settings import ConfigError

# A process that builds NAME-KEY below ROOT: it says that it has begun and waits for the file `go`.
BUILDER = """
import logging, sys, time
from pathlib import Path
from rlhf_exp.runs.artifacts import ArtifactStore

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
root, who = Path(sys.argv[1]), sys.argv[2]

def build(folder):
    (folder / "builder").write_text(who)
    (root / f"{who} builds").touch()
    while not (root / "go").exists():
        time.sleep(0.01)

print(ArtifactStore(root).obtain("base", "0123", build), flush=True)
"""


def start(root: Path, who: str) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(root), who]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def finished(root: Path) -> list[str]:
    """What looks like an artifact to whoever looks: a name that does not begin with a dot."""
    return [path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."]


def fill(folder: Path) -> None:
    (folder / "model").write_text("weights")


@pytest.mark.parametrize("name", ["base-0123", ".base-0123.partial"])
def test_no_link_is_followed(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    store = ArtifactStore(tmp_path / "artifacts")
    store.root.mkdir()
    (store.root / name).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=rf"{name} is a link: remove it"):
        store.obtain("base", "0123", fill)
    assert list(elsewhere.iterdir()) == []


def test_an_artifact_is_built_once_and_reused(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    store = ArtifactStore(tmp_path / "not" / "there" / "yet")
    path = store.obtain("base", "0123", fill)
    assert path == store.folder("base", "0123")
    # The build's own folder was renamed: a copy could be seen half made.
    assert [p for p in store.root.iterdir() if p.is_dir()] == [path]
    assert path.name == "base-0123"
    assert (path / "model").read_text() == "weights"
    assert [m.split(maxsplit=1)[1].split()[0] for m in caplog.messages] == ["building", "built"]

    caplog.clear()

    def never(folder: Path) -> None:
        raise AssertionError("built again")

    assert store.obtain("base", "0123", never) == path
    assert caplog.messages == [f"base: reusing {path}"]


def test_another_key_or_name_is_another_artifact(tmp_path):
    store = ArtifactStore(tmp_path)
    for name, key in (("base", "0123"), ("base", "4567"), ("other", "0123")):
        store.obtain(name, key, fill)
    assert sorted(finished(tmp_path)) == ["base-0123", "base-4567", "other-0123"]


def test_a_build_that_fails_leaves_nothing_finished_and_the_next_is_given_the_rest(tmp_path):
    store = ArtifactStore(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.obtain("base", "0123", fail)
    assert finished(tmp_path) == []
    path = store.obtain("base", "0123", fill)
    assert sorted(file.name for file in path.iterdir()) == ["half", "model"]


def test_a_builder_that_is_killed_leaves_nothing_finished_and_no_lock(tmp_path):
    with start(tmp_path, "first") as builder:
        wait_for(tmp_path / "first builds")
        assert finished(tmp_path) == []
        os.kill(builder.pid, signal.SIGKILL)
    assert builder.returncode == -signal.SIGKILL
    assert finished(tmp_path) == []
    path = ArtifactStore(tmp_path).obtain("base", "0123", fill)
    assert sorted(file.name for file in path.iterdir()) == ["builder", "model"]


def test_while_one_process_builds_another_waits_and_reuses(tmp_path):
    with start(tmp_path, "first") as first:
        wait_for(tmp_path / "first builds")
        with start(tmp_path, "second") as second:
            assert "another job is building it, waiting" in second.stdout.readline()
            assert second.poll() is None
            (tmp_path / "go").touch()
            rest = second.stdout.read().splitlines()
        output = first.stdout.read().splitlines()
    path = str(tmp_path / "base-0123")
    assert output == ["base: building", f"base: built {path}", path]
    assert rest == [f"base: reusing {path}", path]
    assert not (tmp_path / "second builds").exists()
    assert (tmp_path / "base-0123" / "builder").read_text() == "first"


def test_a_hash_knows_values_and_structure_but_not_the_order_of_keys():
    description = {"a": 1, "b": {"c": [1, 2], "d": None}}
    key = content_hash(description)
    assert content_hash({"b": {"d": None, "c": [1, 2]}, "a": 1}) == key
    # `printf '{"a": 1, "b": {"c": [1, 2], "d": null}}' | sha256sum`
    assert key == "e8c0ad1b2625"
    others = [
        {"a": 2, "b": {"c": [1, 2], "d": None}},
        {"a": 1, "b": {"c": [2, 1], "d": None}},
        {"a": 1, "b": {"c": [1, 2], "d": "x"}},
        {"a": 1, "b": {"c": [1, 2]}},
        {"a": 1, "c": [1, 2], "d": None},
    ]
    assert len({key, *map(content_hash, others)}) == 6


def package(folder: Path, **files: str) -> Path:
    """A package `toy` of modules; `inner__b` is toy/inner/b.py."""
    for name, text in files.items():
        path = (folder / "toy").joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "toy"


def closure(folder: Path, *names: str) -> set[str]:
    found = source_closure(*(folder / f"{name}.py" for name in names), package=folder)
    return {file.relative_to(folder).with_suffix("").as_posix() for file in found}


def test_a_file_brings_what_it_imports_and_that_brings_more(tmp_path):
    toy = package(
        tmp_path,
        a="import toy.inner.b\nx = 1",
        inner__b="from toy.c import thing",
        c="import os, json\nfrom toy import d",
        d="from collections import abc",
        e="import toy.a",
        other="",
    )
    assert closure(toy, "a") == {"a", "inner/b", "c", "d"}
    assert closure(toy, "d") == {"d"}
    assert closure(toy, "other", "d") == {"other", "d"}
    assert closure(toy, "e") == {"e", "a", "inner/b", "c", "d"}


def test_imports_within_functions_blocks_and_circles_are_found(tmp_path):
    toy = package(
        tmp_path,
        a="def f():\n    if f:\n        from toy.b import (\n            g as h,\n        )",
        b="try:\n    from toy import a, c as d\nexcept ImportError:\n    pass",
        c="# import toy.e\nx = 'import toy.e'",
        e="",
    )
    assert closure(toy, "a") == closure(toy, "b") == {"a", "b", "c"}


def test_other_packages_are_not_followed(tmp_path):
    toy = package(tmp_path, a="import numpy\nimport toys.b\nfrom toys import b\nimport toy", c="")
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "b.py").write_text("import toy.c")
    assert closure(toy, "a") == {"a"}


def test_a_stage_brings_its_own_code_and_no_report():
    found = source_closure(PACKAGE / "stages" / "sft.py")
    names = {file.relative_to(PACKAGE).as_posix() for file in found}
    assert {
        "stages/held_out.py",
        "tasks/examples.py",
        "tasks/batches.py",
        "models/loading.py",
        "rollout/cached.py",
        "training/supervised.py",
        "settings.py",
    } < names
    assert not {"stages/ppo.py", "run.py", "report/judge.py", "rewards/keyword.py"} & names


def test_code_is_known_by_its_files_names_and_contents(tmp_path):
    def key(folder: Path, *names: str) -> str:
        return source_hash(*(folder / f"{name}.py" for name in names))

    toy = package(tmp_path / "here", a="x = 1", b="y = 2", c="")
    there = package(tmp_path / "there", a="x = 1", b="y = 2", c="changed = 1")
    assert key(toy, "a", "b") == key(there, "a", "b") == key(there, "b", "a")
    assert len(key(toy, "a", "b")) == 12
    others = [
        key(package(tmp_path / "1", a="x = 1", b="y = 3"), "a", "b"),
        key(package(tmp_path / "2", a="x = 1", d="y = 2"), "a", "d"),
        key(package(tmp_path / "3", a="y = 2", b="x = 1"), "a", "b"),
        key(toy, "a", "b", "c"),
        key(toy, "a"),
        key(package(tmp_path / "4", ab="x = 1", b="y = 2"), "ab", "b"),
    ]
    assert len({key(toy, "a", "b"), *others}) == 7


def test_the_hash_is_of_imported_code_too(tmp_path):
    file = tmp_path / "stage.py"
    file.write_text("x = 1\n")
    alone = source_hash(file)
    source_hash.cache_clear()
    file.write_text("x = 1\nimport rlhf_exp.tasks.hashing\n")
    imported = source_hash(file)
    assert imported != alone
    assert imported != source_hash(tmp_path / "stage.py", PACKAGE / "tasks" / "batches.py")
    # Naming what is found anyway changes nothing.
    assert imported == source_hash(file, PACKAGE / "tasks" / "hashing.py")


def test_a_process_goes_on_with_the_code_it_began_with(tmp_path):
    toy = package(tmp_path, a="x = 1")
    key = source_hash(toy / "a.py")
    package(tmp_path, a="x = 2")
    assert source_hash(toy / "a.py") == key
    source_hash.cache_clear()
    assert source_hash(toy / "a.py") != key
