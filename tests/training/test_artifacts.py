import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_exp.training.artifacts import ArtifactStore, content_hash, source_hash

# A process that builds NAME-KEY below ROOT: it says that it has begun and waits for the file `go`.
BUILDER = """
import logging, sys, time
from pathlib import Path
from rlhf_exp.training.artifacts import ArtifactStore

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


def test_a_build_that_fails_leaves_nothing_finished_and_the_next_starts_over(tmp_path):
    store = ArtifactStore(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.obtain("base", "0123", fail)
    assert finished(tmp_path) == []
    path = store.obtain("base", "0123", fill)
    assert [file.name for file in path.iterdir()] == ["model"]


def test_a_builder_that_is_killed_leaves_nothing_finished_and_no_lock(tmp_path):
    with start(tmp_path, "first") as builder:
        wait_for(tmp_path / "first builds")
        assert finished(tmp_path) == []
        os.kill(builder.pid, signal.SIGKILL)
    assert builder.returncode == -signal.SIGKILL
    assert finished(tmp_path) == []
    path = ArtifactStore(tmp_path).obtain("base", "0123", fill)
    assert [file.name for file in path.iterdir()] == ["model"]


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
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path = path.with_suffix(path.suffix or ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_code_is_known_by_its_files_names_and_contents(tmp_path):
    files = {"a": "x = 1", "inner__b": "y = 2"}
    key = source_hash(package(tmp_path / "here", **files))
    there = package(tmp_path / "there", **files)
    (there / "notes.txt").write_text("no code")
    assert source_hash(there) == source_hash(there, there / "a.py") == key
    others = [
        {"a": "x = 1", "inner__b": "y = 3"},
        {"a": "x = 1", "inner__c": "y = 2"},
        {"a": "x = 1", "inner__b": "y = 2", "d": ""},
        {"inner__b": "y = 2"},
        {"a": "x = 1y", "inner__b": " = 2"},
    ]
    keys = [source_hash(package(tmp_path / str(i), **other)) for i, other in enumerate(others)]
    assert len({key, source_hash(there / "a.py"), *keys}) == 7


def test_a_process_goes_on_with_the_code_it_began_with(tmp_path):
    folder = package(tmp_path, a="x = 1")
    key = source_hash(folder)
    package(tmp_path, a="x = 2")
    assert source_hash(folder) == key
