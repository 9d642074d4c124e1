"""The environment of a run, on which its result may depend: the code and the machine."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import psutil
import torch

from rlhf_exp.machine.locations import PACKAGE, REPOSITORY
from rlhf_exp.security.redaction import redact_source

MAX_DIFF = 1 << 16  # bytes


def environment() -> list[str]:
    """Lines for the commit, with "+" if files differ from it, Python, CPU, memory, GPUs, torch and
    all packages; then an empty line and the diff from the commit, at most 64 KiB, without secrets
    and without untracked files. An installed package has a hash of its code instead of a
    commit."""
    missing = "unknown" if REPOSITORY else "none"
    commit = _git("rev-parse", "HEAD").decode().strip() or missing
    diff = _git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    return [
        f"commit {commit}{'+' if diff else ''}",
        *_installed(),
        f"python {platform.python_version()} on {platform.platform()}",
        f"cpu {_cpu()}",
        f"memory {psutil.virtual_memory().total / 2**30:.1f} GiB",
        *_gpus(),
        f"build {_build()}",
        *_packages(),
        *(["", f"differs from {commit}:", *_shown(diff)] if diff else []),
    ]


def _cpu() -> str:
    """The processor's name, its cores, those that this process may use, and torch's threads."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = psutil.cpu_count(logical=False) or "unknown"
    return (
        f"{_processor()}, {cores} cores, {usable} of {os.cpu_count()} processors,"
        f" {torch.get_num_threads()} threads"
    )


@functools.cache
def _processor() -> str:
    try:
        # Only Linux has this file, and its platform.processor() is empty.
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model_line = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return model_line[1].strip() if model_line else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["gpu none"]
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    lines = [f"gpu {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in devices]
    return [*lines, f"driver {_driver()}, CUDA {torch.version.cuda}"]


def _driver() -> str:
    # Not nvidia-smi, which takes a second.
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return text.partition("\n")[0].removeprefix("NVRM version:").strip()


def _build() -> str:
    version = getattr(torch.version, "git_version", "unknown")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__} of {version}, {capability}, CUDA {torch.version.cuda}"


@functools.cache  # reading the metadata of 200 packages takes longer than a phase of a small model
def _packages() -> tuple[str, ...]:
    packages = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    return tuple(sorted(packages))


def _shown(diff: bytes) -> list[str]:
    lines = redact_source(diff[:MAX_DIFF].decode(errors="replace")).splitlines()
    cut = [f"... cut after {MAX_DIFF} bytes"] if len(diff) > MAX_DIFF else []
    return [*lines, *cut]


def _installed() -> list[str]:
    if REPOSITORY:
        return []
    version = importlib.metadata.version("rlhf_exp")
    return [f"code {_code_hash()} of rlhf_exp {version}, installed without its repository"]


@functools.cache
def _code_hash() -> str:
    """Hash of the package's Python files, of the words of its reviews, and of their names; 12 hex
    digits."""
    digest = hashlib.sha256()
    for file in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("tasks/*.yaml")]):
        name = file.relative_to(PACKAGE).as_posix()
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> bytes:
    """Git's output; empty without git or a repository."""
    if not REPOSITORY:  # the folder of an environment may lie in another repository
        return b""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stdout
    except OSError:
        return b""
