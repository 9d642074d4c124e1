"""Hugging Face's `from_pretrained` for a hub name, a short name, a directory, a run's folder or a
GGUF file.

Knows where models are stored and how loading fails: every failure is a ConfigError that names the
model and the fix.
"""

import copy
import functools
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from rlhf_exp.hf import PreTrainedModel, PreTrainedTokenizerBase
from rlhf_exp.machine.network import hub_responds, hub_url
from rlhf_exp.models.known import KNOWN, fetched_folder, locate_on_hub
from rlhf_exp.runs.lfs import refuse_lfs_pointer
from rlhf_exp.runs.paths import MODEL
from rlhf_exp.settings import ConfigError

# transformers loads the first of these that exists.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
GGUF = ".gguf"  # llama.cpp's format: one file with configuration, tokenizer and quantised weights
# Other files that are loaded: configurations, the tokenizer, and this package's heads.
LOADED = (
    "config.json", "generation_config.json", "*token*.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "*.jinja", "value_head.safetensors", "reward_head.*",
)  # fmt: skip


def locate_model(name: str, *, field: str = "model.base_model") -> str:
    """The source to load `name` from: the absolute path of a directory, of `model/` in a run's
    folder, of a GGUF file or of the fetched model with that short name, else a hub name. Raises
    ConfigError for a directory without a model, for a path that does not exist, and as
    `locate_on_hub` does."""
    # Absolute, since tokenizers read some of their files again on saving.
    path = fetched_folder(name) if name in KNOWN else Path(name).expanduser().absolute()
    if name in KNOWN and not path.is_dir():
        return locate_on_hub(name, field=field)
    if path.suffix == GGUF and path.is_file():
        refuse_lfs_pointer(path, field=field)
        return str(path)
    if path.is_dir():
        for candidate in (path, path / MODEL):
            if os.path.lexists(candidate / "config.json"):
                _refuse_placeholders(candidate, field, name)
                return str(candidate)
        if (path / "adapter_config.json").is_file():
            raise ConfigError(
                f"{field}={name!r} holds a PEFT adapter without its model: merge it"
                " (PeftModel.merge_and_unload), save that, and name the directory"
            )
        if gguf_files := sorted(file.name for file in path.glob(f"*{GGUF}")):
            raise ConfigError(
                f"{field}={name!r} holds GGUF files: name one of them, {path / gguf_files[0]}"
            )
        raise ConfigError(
            f"{field}={name!r} is a directory without a model: neither config.json nor"
            " model/config.json is in it. Name a save_pretrained directory or a finished run."
        )
    if name.endswith(GGUF):
        raise ConfigError(f"{field}={name!r}: no such file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{field}={name!r}: no such directory")
    return name


def is_local(source: str) -> bool:
    """Returns True for a directory or a GGUF file, False for a hub name."""
    return source.endswith(GGUF) or Path(source).is_dir()


def locate_gguf(name: str, filename: str, *, revision: str | None, field: str) -> str:
    """The path of a GGUF file in a directory or hub repository, downloaded if needed. Raises
    ConfigError if it does not exist."""
    if Path(name).expanduser().is_dir():
        return str(Path(name) / filename)
    with _explaining("hf_hub_download", name, field, name):
        path = find_file(name, filename, revision=revision)
    if path is not None:
        return str(path)
    if hub_responds():
        raise ConfigError(f"{field}={name!r} has no {filename}: see {hub_url()}/{name}/tree/main")
    raise ConfigError(
        f"{field}={name!r}: {hub_url()} is out of reach and {filename} is not in the local cache;"
        " name a local file"
    )


def find_file(source: str, filename: str, *, revision: str | None) -> Path | None:
    """The path of a file in a directory or hub repository, downloaded if needed; None if absent."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if is_local(source):
        path = Path(source) / filename
        return path if path.is_file() else None
    local_only = _local_only(source)
    try:
        return Path(
            hf_hub_download(source, filename, revision=revision, local_files_only=local_only)
        )
    except EntryNotFoundError:  # or offline and not in the local cache
        return None


def locate_revision(name: str, revision: str | None, field: str) -> str:
    """`locate_model`, which raises ConfigError also for a revision of a directory."""
    source = locate_model(name, field=field)
    if revision is not None and is_local(source):
        group = field.partition(".")[0]
        kind = "directory" if Path(source).is_dir() else "file"
        raise ConfigError(
            f"{group}.revision={revision} is for hub names; {name!r} is a {kind}: set it null"
        )
    return source


def model_from_pretrained(
    loader: Any,
    source: str,
    field: str,
    name: str,
    *,
    may_lack: Callable[[PreTrainedModel, str], bool] = lambda model, weight: False,
    **options: Any,
) -> PreTrainedModel:
    """The model of an Auto class. Raises ConfigError as `from_pretrained` does, and if a weight is
    missing or has another shape, unless `may_lack` returns True for the model and the weight."""
    # With PEFT installed, transformers looks for adapters on the hub despite local_files_only.
    adapters = {"local_files_only": _local_only(source)}
    model, info = from_pretrained(
        loader, source, field, name, output_loading_info=True, adapter_kwargs=adapters, **options
    )
    # transformers only warns and draws these weights at random.
    absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if missing := sorted(weight for weight in absent if not may_lack(model, weight)):
        raise ConfigError(
            f"{field}={name!r} was not saved as {type(model).__name__}: it lacks the weights"
            f" {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    return model


def refuse_encoder(
    source: str, field: str, name: str, trust_remote_code: bool, *, revision: str | None = None
) -> None:
    """Raises ConfigError for an encoder, which cannot continue a text; reads no weights."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    code = {"trust_remote_code": trust_remote_code}
    config = from_pretrained(AutoConfig, source, field, name, revision=revision, **code)
    is_bidirectional = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_bidirectional and not config.to_dict().get("is_decoder"):
        raise ConfigError(
            f"{field}={name!r} is an encoder ({config.model_type}) and cannot continue a text: name"
            " a causal language model; stage=classifier trains an encoder as a classifier"
        )


def without_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    """The model of a GGUF file, whose weights transformers has dequantised, without the record of
    its quantisation, with which transformers refuses to save it."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = model.generation_config
    plain.name_or_path = model.name_or_path
    return plain.eval()


def tokenizer_from_pretrained(
    source: str, field: str, name: str, *, revision: str | None = None, **options: Any
) -> PreTrainedTokenizerBase:
    """The saved tokenizer, as described by tokenizer.json if it names no class of its own. Raises
    ConfigError as `from_pretrained` does."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    with _explaining("AutoTokenizer", source, field, name) as local_only:
        options |= {"revision": revision, "local_files_only": local_only}
        if source.endswith(GGUF):
            folder, file = os.path.split(source)
            return AutoTokenizer.from_pretrained(folder, gguf_file=file, **options)
        saved = get_tokenizer_config(source, revision=revision, local_files_only=local_only)
        # AutoTokenizer would load any tokenizer in a Qwen2's directory as Qwen's own.
        plain = saved.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        loader = PreTrainedTokenizerFast if plain and "auto_map" not in saved else AutoTokenizer
        return loader.from_pretrained(source, **options)


def from_pretrained(loader: Any, source: str, field: str, name: str, **options: Any) -> Any:
    """`loader.from_pretrained(source)`, only from the local cache if the hub is out of reach.
    Raises ConfigError naming `field`, the user's `name` and the fix."""
    with _explaining(loader.__name__, source, field, name) as local_only:
        if source.endswith(GGUF):
            source, options["gguf_file"] = os.path.split(source)
        return loader.from_pretrained(source, local_files_only=local_only, **options)


@contextmanager
def _explaining(loader: str, source: str, field: str, name: str) -> Iterator[bool]:
    # The transport errors of the hub's client, such as a broken connection.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    local_only = _local_only(source)
    try:
        yield local_only
    except UnpicklingError as error:  # a .bin with other objects than weights
        raise ConfigError(
            f"{field}={name!r} cannot be loaded: its weights are a pickle that would run code; if"
            " you trust it, save it as safetensors"
        ) from error
    except (
        OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, HTTPError,
        struct.error,  # of a GGUF file that ends within its header
    ) as error:  # fmt: skip
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        fix = _fix(str(error), loader, source, field.partition(".")[0], offline=local_only)
        raise ConfigError(f"{field}={name!r} cannot be loaded: {fix}.\n  {reason}") from error


def _local_only(source: str) -> bool:
    return is_local(source) or not hub_responds()


def _fix(error: str, loader: str, source: str, group: str, *, offline: bool) -> str:
    if "trust_remote_code" in error:
        return f"it comes with code; if you trust that, set {group}.trust_remote_code=true"
    if source.endswith(GGUF):
        return "it is cut off, or transformers does not read its architecture or quantisation"
    if is_local(source):
        return f"{loader} must be able to open it"
    if offline:
        return (
            f"{hub_url()} is out of reach and it is not in the local cache; name a local directory"
        )
    if "gated repo" in error:
        return f"ask for access on {hub_url()}/{source} and log in with `hf auth login`"
    return f"check the name on {hub_url()}, or name a local directory"


def directory_hash(path: str) -> str:
    """A SHA-256 of the names and contents of the files that a model is loaded from, "" for a hub
    name. Other files, times and the directory's name do not matter. Reads all weights
    once a process, at about 1.5 GB/s."""
    source = Path(path)
    if not source.is_dir() and source.suffix != GGUF:
        return ""
    digest = hashlib.sha256()
    for file in _loaded_files(source) if source.is_dir() else [source]:
        stat = file.stat()
        content = _file_hash(file.resolve(), stat.st_size, stat.st_mtime_ns)
        digest.update(f"{file.relative_to(source)} {content}\n".encode())
    return digest.hexdigest()


@functools.cache
def _file_hash(file: Path, size: int, time_ns: int) -> str:
    """The SHA-256 of a file; size and time are arguments so that a changed file is read again."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _loaded_files(directory: Path) -> list[Path]:
    """The files of a directory from which a model and its tokenizer are loaded, including dangling
    links."""
    patterns = (*LOADED, "*.py") if _brings_code(directory) else LOADED
    names = {n for n in os.listdir(directory) if any(fnmatchcase(n, p) for p in patterns)}
    return [directory / name for name in sorted({*names, *_weights(directory)})]


def _weights(directory: Path) -> list[str]:
    """The names of the files with weights that transformers loads; an index of shards first."""
    for name in WEIGHTS:
        path = directory / name
        if not os.path.lexists(path):
            continue
        if path.suffix != ".json":
            return [name]
        try:
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            return [name, *(s for s in set(shards) if os.path.lexists(directory / s))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return [name]  # the loader will report the error
    return []


def _brings_code(directory: Path) -> bool:
    configs = (directory / "config.json", directory / "tokenizer_config.json")
    return any(b'"auto_map"' in file.read_bytes() for file in configs if file.is_file())


def _refuse_placeholders(directory: Path, field: str, name: str) -> None:
    """Raises ConfigError for a dangling link and for a Git LFS pointer instead of a file."""
    for file in _loaded_files(directory):
        if not file.exists():
            raise ConfigError(
                f"{field}={name!r}: {file.name} is a link to {file.readlink()}, which does not"
                " exist: copy the file itself there"
            )
        refuse_lfs_pointer(file, field=field)
