"""environment.txt says on what a result stands; a changed file is in it, and no secret."""

import os
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from rlhf_exp.runs import provenance
from rlhf_exp.runs.provenance import MAX_DIFF, environment


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one committed file, in place of this project's own."""
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    (tmp_path / "file.py").write_text("a = 1\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    return tmp_path


def named(lines: list[str], name: str) -> str:
    [line] = [line for line in lines if line.startswith(f"{name} ")]
    return line


def test_it_names_code_machine_and_versions() -> None:
    lines = environment()
    assert re.fullmatch(r"commit ([0-9a-f]{40}\+?|unknown)", lines[0])
    assert lines[1].startswith("python 3.")
    cpu = named(lines, "cpu")
    assert f"{torch.get_num_threads()} threads" in cpu
    assert f"of {os.cpu_count()} processors" in cpu
    assert named(lines, "memory") == f"memory {psutil.virtual_memory().total / 2**30:.1f} GiB"
    assert torch.__version__ in named(lines, "build")
    packages = [line for line in lines if re.fullmatch(r"[\w.-]+==\S+", line)]
    assert any(line.startswith("torch==2.") for line in packages)
    assert packages == sorted(set(packages))


def test_the_processor_has_its_true_name() -> None:
    known = Path("/proc/cpuinfo")
    if "model name" in known.read_text():  # not so on all of ARM
        name = re.search(r"model name\s*: (.+)", known.read_text())[1].strip()
        assert f"cpu {name}, " in named(environment(), "cpu")
    assert len(named(environment(), "cpu").split(",")[0]) > len("cpu ")


def test_what_differs_from_the_commit_is_in_it(repository: Path) -> None:
    clean = environment()
    assert re.fullmatch(r"commit [0-9a-f]{40}", clean[0])
    assert "" not in clean
    (repository / "file.py").write_text("a = 2\napi_key = 'hunter2'\nhf_token: hunter3\n")
    (repository / "unknown").write_text("not in the repository")
    changed = environment()
    assert changed[0] == f"{clean[0]}+"
    diff = changed[changed.index("") + 1 :]
    assert diff[0] == f"differs from {clean[0].removeprefix('commit ')}:"
    assert diff[-4:] == ["-a = 1", "+a = 2", "+api_key = '***'", "+hf_token: ***"]
    assert "hunter" not in "\n".join(changed)


def test_a_large_difference_is_cut_and_it_is_said(repository: Path) -> None:
    (repository / "file.py").write_text("b = 2\n" * (MAX_DIFF // 4))
    started = time.monotonic()
    lines = environment()
    assert time.monotonic() - started < 5
    assert lines[-1] == f"... cut after {MAX_DIFF} bytes"
    assert len("\n".join(lines)) < MAX_DIFF + 20_000


def test_without_a_repository_the_commit_is_unknown(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    assert environment()[0] == "commit unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()[0] == "commit unknown"


def test_an_installed_package_names_its_code_and_not_the_repository_around_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = repository / ".venv" / "site-packages" / "rlhf_exp"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "REPOSITORY", None)
    monkeypatch.setattr(provenance, "PACKAGE", package)

    def code(source: str) -> str:
        provenance._code_hash.cache_clear()
        (package / "module.py").write_text(source)
        lines = environment()
        assert lines[0] == "commit none"
        assert "" not in lines, "what differs from a commit"
        [digest] = re.findall("^code ([0-9a-f]{12}) of rlhf_exp [0-9.]+, installed", lines[1])
        return digest

    assert code("a = 1") == code("a = 1") != code("a = 2")
    provenance._code_hash.cache_clear()
