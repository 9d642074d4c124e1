"""Finds the secrets of a configuration and removes them from text.

A value is a secret if its key says so, or if its environment variable's name says so and the value
looks random. Files and loggers call this module; it knows none of them. Secret-finding libraries
look for tokens of known services, not for configuration keys.
"""

import functools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import quote

from rlhf_exp.security.printable import printable

REDACTED = "***"

# "tokenizer" does not match.
_SECRET = re.compile(r"token(?!i[sz])|key|secret|password|passwd", re.IGNORECASE)
# Keys with these endings hold secrets of any type; the plural holds a mapping of secrets.
_SECRETS_END = re.compile(r"(token|key|secret|password|passwd)s?$", re.IGNORECASE)
_NUMBERS_END = re.compile(r"(token|key|secret|password|passwd)$", re.IGNORECASE)
# Keys of this project that match but are no secrets; keys that end in _env name a variable.
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
# Shorter secrets, and plain words, would match inside ordinary text.
_SHORTEST = 4
_SHORTEST_RANDOM = 8
_NUMBER = re.compile(r"\s*[-+]?\d[\d_]*\.?\d*(e[-+]?\d+)?\s*", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]?[a-z_/]{,14}|[A-Z_]{,15}")
# A change of case, a change between letters and digits, or a sign.
_CHANGE = re.compile(
    r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[a-z0-9])|(?<=[0-9])(?=[A-Za-z])|[^\w\s\\./:,=+~-]"
)
# Not within a longer word or path; an escaped newline in quoted text is no letter.
_BEFORE, _AFTER = r"(?:(?<![\w./-])|(?<=\\[nrt]))", r"(?![\w/-]|\.\w)"

_secret_texts: set[str] = set()


def is_secret(key: str, value: object = "") -> bool:
    """Returns True if the value of a key is a secret. Only the last part of a dotted key counts. A
    number is a secret only if the key ends in a word such as token; true, false and null never
    are."""
    name = key.rpartition(".")[2]
    if name in NO_SECRETS or name.lower().endswith("_env") or not _SECRET.search(name):
        return False
    if isinstance(value, bool) or value is None:
        return False
    return isinstance(value, str) or bool(_NUMBERS_END.search(name))


def redact(config: Any) -> Any:
    """The configuration with REDACTED for every secret: the value of a secret key, everything in a
    mapping or list under one, and every text that contains a secret that is not a plain word.
    Interpolations and targets stay. Remembers the secrets for `scrub`."""

    def replacement(key: str, value: Any, is_secret_value: bool) -> Any:
        repeats = isinstance(value, str) and not key.startswith("_") and _repeats_secret(value)
        return REDACTED if is_secret_value or repeats else value

    remember(config)
    return _map_values(replacement, config)


def redacted_keys(config: Any, prefix: str = "") -> list[str]:
    """The dotted keys of a configuration whose value is REDACTED, in order."""
    if config == REDACTED:
        return [prefix]
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(config, Mapping):
        items = iter(config.items())
    elif isinstance(config, list | tuple):
        items = iter(enumerate(config))
    return [key for k, v in items for key in redacted_keys(v, f"{prefix}.{k}".lstrip("."))]


def remember(config: Any) -> None:
    """Makes `scrub` replace the secrets of a configuration from now on."""

    def remember_value(key: str, value: Any, is_secret_value: bool) -> None:
        pairs = [(key, str(value))] if is_secret_value else _in_query(str(value))
        for name, text in pairs:
            plain = _WORD.fullmatch(text) and not re.search("secret|passw", name, re.IGNORECASE)
            if not plain and (_SECRETS_END.search(name) or "secret" in name.lower()):
                remember_secret(text)

    _map_values(remember_value, config)


def remember_secret(text: str) -> None:
    """Makes `scrub` replace the text from now on, unless it has fewer than 4 characters."""
    if len(text) >= _SHORTEST:
        _secret_texts.add(text)


def remember_words(words: Sequence[str]) -> None:
    """Makes `scrub` replace the secrets of a command line, even of one that Hydra rejects."""

    def remember_value(key: str, value: str) -> str:
        bare = value.strip("'\"[]{}")
        remember({key: [value, bare, *re.split(r"\s*,\s*", bare)]})
        return value

    for word in words:
        _map_secrets(remember_value, word)


def remember_environment() -> None:
    """Makes `scrub` replace the values of environment variables with secret names that look random:
    others may belong to other programs and be plain words of paths and configurations."""
    for name, value in os.environ.items():
        if _NUMBERS_END.search(name) and looks_random(value):
            remember_secret(value)


def looks_random(text: str) -> bool:
    """Returns True if the text looks like a token or a generated password, not like words or a
    path: at least one character in five changes between upper case, lower case, digits and
    signs."""
    return len(text) >= _SHORTEST_RANDOM and 5 * len(_CHANGE.findall(text)) >= len(text)


def scrub(text: str) -> str:
    """The text with every known secret as REDACTED."""
    for secret in sorted(_secret_texts, key=len, reverse=True):
        text = _pattern(secret).sub(REDACTED, text)
    return text


def redact_words(words: Sequence[str]) -> list[str]:
    """Words of a command line (key=value in Hydra's grammar, lists and mappings included) with
    REDACTED for every secret."""
    return [_redact_word(word) for word in words]


def redact_source(text: str) -> str:
    """The text of a source or configuration file with REDACTED for the quoted text, or in YAML the
    whole value, after a secret key."""
    return scrub(_IN_YAML.sub(rf"\1{REDACTED}", _QUOTED.sub(rf"\1\2{REDACTED}\2", text)))


class Scrubbing(logging.Formatter):
    """Formats with another formatter, then scrubs the text and makes it printable."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(scrub(self._inner.format(record)))


def scrub_logs() -> None:
    """Makes the current handlers of the root logger and of this package's logger write scrubbed,
    printable text."""
    for handler in {*logging.getLogger().handlers, *logging.getLogger("rlhf_exp").handlers}:
        if not isinstance(handler.formatter, Scrubbing):
            handler.setFormatter(Scrubbing(handler.formatter or logging.Formatter()))


def scrub_tracebacks() -> None:
    """Makes Python print the traceback that ends the process without secrets."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = traceback.format_exception(kind, error, trace)
        print(printable(scrub("".join(lines))), end="", file=sys.stderr)

    sys.excepthook = show


def _holds_only_secrets(key: str, config: Mapping[Any, Any], within: bool) -> bool:
    """Returns True if everything in a mapping is secret, as under api_keys. If it or a nested
    mapping has a _target_, it describes parts, whose keys are judged one by one."""
    named_secret = bool(_SECRETS_END.search(key)) and is_secret(key)
    return (within or named_secret) and not _has_target(config)


def _has_target(config: Mapping[Any, Any]) -> bool:
    children = (value for value in config.values() if isinstance(value, Mapping))
    return "_target_" in config or any(map(_has_target, children))


def _map_values(
    change: Callable[[str, Any, bool], Any], value: Any, key: str = "", within: bool = False
) -> Any:
    """The configuration with `change(key, value, is_secret)` for every value. In a mapping that
    holds only secrets, the key is that of the mapping."""
    if isinstance(value, Mapping):
        inside = _holds_only_secrets(key, value, within)
        return {
            k: _map_values(change, v, key if inside else str(k), inside) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_values(change, v, key, within) for v in value]
    return change(key, value, _is_secret_value(key, value, within=within))


def _repeats_secret(value: str) -> bool:
    """Returns True if a value contains a secret that is not a plain word. `scrub` replaces plain
    words in messages, but here they must stay: the redacted files are read back."""
    if _in_query(value):
        return True
    return any(not _WORD.fullmatch(s) and _pattern(s).search(value) for s in _secret_texts)


def _is_secret_value(key: str, value: Any, *, within: bool) -> bool:
    if isinstance(value, str) and _REFERENCE.fullmatch(value):
        return False
    if within and not isinstance(value, bool | None):
        return True
    return is_secret(key, value)


def _in_query(url: str) -> list[tuple[str, str]]:
    """Pairs of key and secret in the query of a URL."""
    pairs = _QUERY.findall(url) if "://" in url else []
    return [(key, value) for key, value in pairs if is_secret(key) and value != REDACTED]


@functools.cache
def _pattern(secret: str) -> re.Pattern[str]:
    """Matches a secret as messages, files and URLs write it; unless it looks random, it must not be
    part of a longer word or path."""
    ways = (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""))
    forms = "|".join(map(re.escape, sorted({*ways}, key=len, reverse=True)))
    return re.compile(forms if looks_random(secret) else f"{_BEFORE}(?:{forms}){_AFTER}")


def _holds_secrets(path: str, value: str) -> bool:
    """Returns True if the value of a dotted key on a command line is a secret."""
    if not _PATH.fullmatch(path) or not value.strip() or _REFERENCE.fullmatch(value):
        return False
    if all(re.fullmatch("true|false|null", v.strip(), re.IGNORECASE) for v in value.split(",")):
        return False
    *parents, last = path.lstrip("+~").split(".")
    if any(_SECRETS_END.search(part) and is_secret(part) for part in parents):
        return True
    numbers = all(_NUMBER.fullmatch(part) for part in value.split(","))
    return is_secret(last, 0 if numbers else value)


def _map_secrets(change: Callable[[str, str], str], word: str) -> str:
    """A word of a command line with `change(key, value)` in place of every secret."""
    path, equals, value = word.partition("=")
    if equals and _holds_secrets(path, value):
        return f"{path}={change(path.rpartition('.')[2], value)}"

    def replacement(match: re.Match[str]) -> str:
        key, between, inner = match.groups()
        return f"{key}{between}{change(key, inner)}" if _holds_secrets(key, inner) else match[0]

    return _INSIDE.sub(replacement, word)


def _redact_word(word: str) -> str:
    path, equals, _ = word.partition("=")
    redacted = _map_secrets(lambda key, value: REDACTED, word)
    is_target = path.rpartition(".")[2] == "_target_"
    if is_target or not _repeats_secret(redacted):
        return redacted
    return f"{path}={REDACTED}" if _PATH.fullmatch(path) and equals else scrub(redacted)
