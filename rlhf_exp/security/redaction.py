"""What is secret in a configuration, and text without it.

A value is known as a secret by its key, or by the name of its environment variable if it also looks
random. It knows no file and no logger that might get to see one: each of them asks here.
"""

import functools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import quote

from rlhf_exp.security.printable import printable

REDACTED = "***"

# A tokenizer is none.
_SECRET = re.compile(r"token(?!i[sz])|key|secret|password|passwd", re.IGNORECASE)
# So ends a key whose value is one whatever its type, and so that of a mapping of secrets.
_SECRETS_END = re.compile(r"(token|key|secret|password|passwd)s?$", re.IGNORECASE)
_NUMBERS_END = re.compile(r"(token|key|secret|password|passwd)$", re.IGNORECASE)
# Keys of this project's own that are named alike; those that end in _env name a variable.
NO_SECRETS = frozenset({
    "max_tokens", "min_tokens", "first_tokens_min", "first_tokens_max", "target_tokens",
    "crop_min_tokens", "token_noise", "keyword", "keywords",
})  # fmt: skip
_REFERENCE = re.compile(r"\$\{(oc\.env:)?[\w.\[\]]+(,\s*null)?\}|\?\?\?|")
_QUERY = re.compile(r"[?&;]([\w.-]+)=([^&;#\s]+)")
_VALUE = (
    r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|\[[^\]]*\]?|\{[^}]*\}?"
    r"|\$\{[^}]*\}|(?:\\.|[^,\]}\s\\&])+"
)
_PATH = re.compile(r"[+~]*[\w./@:-]+")
_INSIDE = re.compile(
    rf"([\w.-]*(?:token|key|secret|passw)[\w-]*)(['\"]?\s*[:=]\s*)({_VALUE})", re.I
)
_NAME = r"[\w.-]*(?:token|key|secret|password|passwd)s?"
_QUOTED = re.compile(rf"(?i)({_NAME}['\"]?\s*[:=]\s*)(['\"])(?:\\.|(?!\2).)+\2")
_IN_YAML = re.compile(rf"(?im)^([-+ ]?\s*{_NAME}:\s+)(?!\$\{{|null\b|['\"])\S.*$")
# Shorter ones would be found in every other word, as would plain words.
_SHORTEST = 4
_SHORTEST_RANDOM = 8
_NUMBER = re.compile(r"\s*[-+]?\d[\d_]*\.?\d*(e[-+]?\d+)?\s*", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]?[a-z_/]{,14}|[A-Z_]{,15}")
# Where letters change their case, or letters, digits and signs follow each other.
_CHANGE = re.compile(
    r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[a-z0-9])|(?<=[0-9])(?=[A-Za-z])|[^\w\s\\./:,=+~-]"
)
# Not within a longer word or path; a line's end in a quoted text is no letter.
_BEFORE, _AFTER = r"(?:(?<![\w./-])|(?<=\\[nrt]))", r"(?![\w/-]|\.\w)"

_known: set[str] = set()


def is_secret(key: str, value: object = "") -> bool:
    """Whether what a key, or the last part of a dotted one, holds is a secret. Numbers are none
    unless the key ends in what secrets are called; true, false and null never are."""
    name = key.rpartition(".")[2]
    if name in NO_SECRETS or name.lower().endswith("_env") or not _SECRET.search(name):
        return False
    if isinstance(value, bool) or value is None:
        return False
    return isinstance(value, str) or bool(_NUMBERS_END.search(name))


def redact(config: Any) -> Any:
    """The configuration with REDACTED in place of secrets, wherever they are in it: what such a
    key holds, what a mapping or a list of that name does, and every text that repeats one that is
    not a plain word. Interpolations and targets stay. The secrets are remembered."""
    remember(config)
    return _replaced(config, "", within=False)


def redacted_keys(config: Any, prefix: str = "") -> list[str]:
    """The dotted keys of a configuration whose value is REDACTED, in their order."""
    if config == REDACTED:
        return [prefix]
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(config, Mapping):
        items = iter(config.items())
    elif isinstance(config, list | tuple):
        items = iter(enumerate(config))
    return [key for k, v in items for key in redacted_keys(v, f"{prefix}.{k}".lstrip("."))]


def remember(config: Any) -> None:
    """Has `scrub` replace the secrets of a configuration from now on."""
    for key, value in _secrets(config, "", within=False):
        plain = _WORD.fullmatch(value) and not re.search("secret|passw", key, re.IGNORECASE)
        if not plain and (_SECRETS_END.search(key) or "secret" in key.lower()):
            remember_secret(value)


def remember_secret(text: str) -> None:
    """Has `scrub` replace the text from now on, unless it is too short to tell."""
    if len(text) >= _SHORTEST:
        _known.add(text)


def remember_words(words: Sequence[str]) -> None:
    """The same for a command line, which may be one that says nothing sensible."""
    for word in words:
        for key, value in _assigned(word):
            bare = value.strip("'\"[]{}")
            remember({key: [value, bare, *re.split(r"\s*,\s*", bare)]})


def remember_environment() -> None:
    """The same for the variables of the environment that have such names, if their value looks
    random: they are other programs', and may be words that paths and configurations hold too."""
    for name, value in os.environ.items():
        if _NUMBERS_END.search(name) and looks_random(value):
            remember_secret(value)


def looks_random(text: str) -> bool:
    """Whether the text looks like a token or a generated password, in which every few characters
    letters change their case or turn into digits or signs, and not like words, a name or a path."""
    return len(text) >= _SHORTEST_RANDOM and 5 * len(_CHANGE.findall(text)) >= len(text)


def scrub(text: str) -> str:
    """The text with REDACTED in place of every secret that is remembered."""
    for secret in sorted(_known, key=len, reverse=True):
        text = _pattern(secret).sub(REDACTED, text)
    return text


def redact_words(words: Sequence[str]) -> list[str]:
    """Words of a command line with REDACTED in place of secrets: key=value, with the value as
    Hydra's grammar has it, lists and mappings included."""
    return [_redact_word(word) for word in words]


def redact_source(text: str) -> str:
    """The lines of a source or a configuration file with REDACTED in place of what is quoted after
    a key that is secret, or is all that follows it in YAML."""
    return scrub(_IN_YAML.sub(rf"\1{REDACTED}", _QUOTED.sub(rf"\1\2{REDACTED}\2", text)))


class Scrubbing(logging.Formatter):
    """Another formatter's lines, scrubbed and printable, tracebacks included."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(scrub(self._inner.format(record)))


def scrub_logs() -> None:
    """Has the handlers that the root logger and this package's have now write no secret, and
    nothing that a terminal obeys."""
    for handler in {*logging.getLogger().handlers, *logging.getLogger("rlhf_exp").handlers}:
        if not isinstance(handler.formatter, Scrubbing):
            handler.setFormatter(Scrubbing(handler.formatter or logging.Formatter()))


def scrub_tracebacks() -> None:
    """Has what ends the process be printed without secrets."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = traceback.format_exception(kind, error, trace)
        print(printable(scrub("".join(lines))), end="", file=sys.stderr)

    sys.excepthook = show


def _passes_on(key: str, config: Mapping[Any, Any], within: bool) -> bool:
    """Whether all that a mapping holds is secret: that of api_keys is, that of a part named so, or
    of parts, is not, since they have keys of their own."""
    own = bool(_SECRETS_END.search(key)) and is_secret(key)
    return (within or own) and not _has_target(config)


def _has_target(config: Mapping[Any, Any]) -> bool:
    below = (value for value in config.values() if isinstance(value, Mapping))
    return "_target_" in config or any(map(_has_target, below))


def _replaced(value: Any, key: str, *, within: bool) -> Any:
    if isinstance(value, Mapping):
        inside = _passes_on(key, value, within)
        return {k: _replaced(v, str(k), within=inside) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(v, key, within=within) for v in value]
    if _is_one(key, value, within=within):
        return REDACTED
    if isinstance(value, str) and not key.startswith("_") and _repeats_secret(value):
        return REDACTED
    return value


def _repeats_secret(value: str) -> bool:
    """Whether a value has a secret in it. A plain word is looked for in messages alone: what is
    redacted here is missing from a file that is read back."""
    if _in_query(value):
        return True
    return any(not _WORD.fullmatch(known) and _pattern(known).search(value) for known in _known)


def _is_one(key: str, value: Any, *, within: bool) -> bool:
    if isinstance(value, str) and _REFERENCE.fullmatch(value):
        return False
    if within and not isinstance(value, bool | None):
        return True
    return is_secret(key, value)


def _secrets(value: Any, key: str, *, within: bool) -> Iterator[tuple[str, str]]:
    """The secrets of a configuration, each with its key."""
    if isinstance(value, Mapping):
        inside = _passes_on(key, value, within)
        for k, v in value.items():
            yield from _secrets(v, key if inside else str(k), within=inside)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _secrets(v, key, within=within)
    elif _is_one(key, value, within=within) and value != REDACTED:
        yield key, str(value)
    elif isinstance(value, str):
        yield from _in_query(value)


def _in_query(url: str) -> list[tuple[str, str]]:
    """The secrets in the query of a URL, each with its key."""
    found = _QUERY.findall(url) if "://" in url else []
    return [(key, value) for key, value in found if is_secret(key) and value != REDACTED]


@functools.cache
def _pattern(secret: str) -> re.Pattern[str]:
    """A secret as messages, files and URLs write it: anywhere if it looks random, else not within a
    longer word or path."""
    ways = (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""))
    forms = "|".join(map(re.escape, sorted({*ways}, key=len, reverse=True)))
    return re.compile(forms if looks_random(secret) else f"{_BEFORE}(?:{forms}){_AFTER}")


def _holds_secrets(path: str, value: str) -> bool:
    """Whether the value of a dotted key in a command line is a secret."""
    if not _PATH.fullmatch(path) or not value.strip() or _REFERENCE.fullmatch(value):
        return False
    if all(re.fullmatch("true|false|null", v.strip(), re.IGNORECASE) for v in value.split(",")):
        return False
    *above, last = path.lstrip("+~").split(".")
    if any(_SECRETS_END.search(part) and is_secret(part) for part in above):
        return True
    numbers = all(_NUMBER.fullmatch(part) for part in value.split(","))
    return is_secret(last, 0 if numbers else value)


def _assigned(word: str) -> Iterator[tuple[str, str]]:
    path, equals, value = word.partition("=")
    if equals and _holds_secrets(path, value):
        yield path.rpartition(".")[2], value
        return
    for key, _, inner in _INSIDE.findall(word):
        if _holds_secrets(key, inner):
            yield key, inner


def _redact_word(word: str) -> str:
    path, equals, value = word.partition("=")
    if equals and _holds_secrets(path, value):
        return f"{path}={REDACTED}"

    def replacement(match: re.Match[str]) -> str:
        key, between, inner = match.groups()
        return f"{key}{between}{REDACTED}" if _holds_secrets(key, inner) else match[0]

    shown = _INSIDE.sub(replacement, word)
    is_target = path.rpartition(".")[2] == "_target_"
    if is_target or not _repeats_secret(shown):
        return shown
    return f"{path}={REDACTED}" if _PATH.fullmatch(path) and equals else scrub(shown)
