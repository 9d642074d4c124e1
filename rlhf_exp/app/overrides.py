"""Overrides, the words `key=value` of a command line: quotes their values as Hydra needs it.

Hydra reads an unquoted value as a number, a list, a sweep or a text of few allowed characters.
Paths may hold any character, so values of keys that take a path are quoted first.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rlhf_exp.machine.locations import REPOSITORY
from rlhf_exp.security.redaction import redact_words
from rlhf_exp.settings import ConfigError

SCRIPT = "rlhf-exp"  # the console script that pyproject.toml names
# The last part of each key that takes a path; `name` belongs to a classifier.
PATH_KEYS = {
    "resume", "path", "base_model", "name", "function", "prefix_file", "artifacts_dir", "dir",
}  # fmt: skip


def command(*words: str) -> str:
    """A command to paste into a shell, with the same folders of groups as this command line."""
    return f"{program()} {shlex.join([*_search_words(), *words])}"


def program() -> str:
    """The program that starts a run here: train.py in a clone, or the console script."""
    if REPOSITORY and Path(sys.argv[0]).name != SCRIPT:
        return "python train.py"
    return SCRIPT if shutil.which(SCRIPT) else str(Path(sys.executable).with_name(SCRIPT))


def _search_words() -> list[str]:
    """The words of this command line that name the user's folders of groups."""
    if not HydraConfig.initialized():
        return []
    config = HydraConfig.get()
    sources = config.runtime.config_sources
    folders = [source.path for source in sources if source.provider == "command-line"]
    words = [word for word in config.overrides.hydra if word.startswith("hydra.searchpath=")]
    return [*(word for folder in folders for word in ("--config-dir", folder)), *words]


def quote(text: str) -> str:
    """The text in quotes, so that Hydra and OmegaConf read it unchanged."""
    text = without_interpolations(text)
    return '"' + re.sub(r'(\\*)"', r"\1\1\\" + '"', text) + "\\" * _count_backslashes(text) + '"'


def without_interpolations(text: str) -> str:
    """The text escaped, so that OmegaConf does not resolve a ${ in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def unquote(value: str) -> str:
    """The text of a value, the inverse of `quote`; a value without quotes is its own text."""
    quote = value[:1]
    if len(value) < 2 or quote not in ("'", '"') or value[-1] != quote:
        return value
    text = value[1:-1]
    text = text[: len(text) - _count_backslashes(text) // 2]
    text = re.sub(rf"(\\*)\1\\{quote}", rf"\1{quote}", text)
    return re.sub(r"(\\*)\1\\\$\{", r"\1${", text)


def _count_backslashes(text: str) -> int:
    """The number of backslashes at the end."""
    return len(text) - len(text.rstrip("\\"))


def quote_paths(words: Sequence[str]) -> list[str]:
    """A command line whose paths are quoted where Hydra cannot read them, or would read an existing
    path as a number or a list. A leading ~/ becomes the home folder. Raises ConfigError for a word
    without a key, with bytes that are not UTF-8, or with a carriage return at its end."""
    for word in words:
        text = ascii(redact_words([word])[0])
        if re.fullmatch(r"[+~]*([@=].*)?", word, re.DOTALL):
            raise ConfigError(f"{text} names no key: write key=value, or ~key to leave one out")
        if re.search("[\ud800-\udfff]", word):
            raise ConfigError(
                f"{text} is not UTF-8, as configuration files are: rename the file, or convert"
                " the text"
            )
        if word.endswith("\r"):
            raise ConfigError(
                f"{text} ends with a carriage return, as lines of Windows do: convert the script"
                " that holds the command, with: sed -i 's/\\r$//' SCRIPT"
            )
    return [_with_quoted_path(word) for word in words]


def _with_quoted_path(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or key.startswith("-") or key.lstrip("+").rpartition(".")[2] not in PATH_KEYS:
        return word
    path = os.path.expanduser(value) if value.startswith("~/") else value
    try:
        parsed = OverridesParser.create().parse_override(f"path={path}").value()
    except HydraException:
        return f"{key}={quote(path)}"
    is_itself = parsed == path and "${" not in path
    exists = os.path.lexists(path) or os.path.lexists(path.rpartition(":")[0])
    return f"{key}={quote(path)}" if exists and not is_itself else f"{key}={path}"
