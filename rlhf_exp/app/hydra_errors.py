"""Hydra's errors in a few lines, with the fix.

It knows how Hydra and OmegaConf fail and which options exist, and nothing of what a run does.
"""

import difflib
import errno
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    OmegaConfBaseException,
)

from rlhf_exp.app.overrides import command, quote
from rlhf_exp.security.redaction import redact_words
from rlhf_exp.settings import ConfigError

UNWRITABLE = {errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST}
# Launchers in separate packages, and the extra that installs each.
LAUNCHERS = {"joblib": "parallel", "submitit_local": "slurm", "submitit_slurm": "slurm",
             "ray": "ray"}  # fmt: skip

# Keys of earlier versions.
RENAMED = {
    "reference": "finetune=full, last_layers or lora",
    "stage.kl_target": "stage.adaptive_kl_target",
    "stage.target_kl": "stage.guards.max_approx_kl",
    "stage.kl_budget": "stage.guards.max_kl_sum",
    **{
        f"stage.{key}": f"stage.{group}.{key}"
        for group, keys in {
            "estimator": "gamma gae_lambda whiten_advantages",
            "guards": "on_nonfinite max_skipped on_reward_error reward_retries reward_retry_wait_s"
            " reward_timeout_s",
            "compute": "dtype compile rollout_batch_size micro_batch_size gradient_checkpointing"
            " async_reward",
        }.items()
        for key in keys.split()
    },
}


def explain(error: BaseException, conf: Path) -> str | None:
    """Hydra's error about a command line or a file, in a few lines with the fix; None for an error
    that is not Hydra's. `conf` is the folder of the groups."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, ConfigError):
            return str(link)
        if isinstance(link, MissingConfigException) and link.options:
            return _missing_option(link)
        if isinstance(link, OverrideParseException):
            return _unreadable(link)
    for link in chain:
        if isinstance(link, ConfigAttributeError | ConfigKeyError) and link.full_key:
            return "\n".join(_unknown_keys(str(link.full_key), conf))
        if isinstance(link, GrammarParseError) and link.full_key:
            reason = str(link).splitlines()[0]
            return f"{link.full_key}: {reason}; in a text write \\${{ instead of ${{"
        if isinstance(link, OmegaConfBaseException) and isinstance(link, TypeError):
            return f"{link.full_key}: {str(link).splitlines()[0]}"
    group = re.search(r"Could not override '([^']+)'", str(error))
    if isinstance(error, HydraException) and group:
        return f"{group[1]}: no such key or group.{_suggestion(group[1], conf, _known_keys(conf))}"
    required = re.match(r"You must specify '(\w+)'", str(error))
    if isinstance(error, HydraException) and required:
        return "\n".join(_required_groups(required[1], conf))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.filename}: {error.strerror}: shorten it"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return (
            f"cannot write {error.filename}: {error.strerror}; name other folders with"
            " hydra.run.dir=... and artifacts_dir=..."
        )
    if isinstance(error, ValueError) and "override must be a string or a list" in str(error):
        words = [w for w in _group_choices(conf) if re.search("=(null|true|false|[-+.0-9]+)$", w)]
        return (
            f"{', '.join(words)}: a group takes an option's name; leave it out with ~, as ~reward"
        )
    if isinstance(error, HydraException | OmegaConfBaseException) or _is_from_hydra(error):
        return "\n".join(line for line in str(error).splitlines() if line.strip())
    return None


def _unreadable(error: OverrideParseException) -> str:
    """The word that Hydra cannot parse, the reason, and how to quote its value."""
    [word] = redact_words([error.override])
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word}: write key=value to set a key, ~key to leave one out; see --help"
    *lines, last = error.message.partition("\nSee http")[0].splitlines()
    place = len(key)
    if lines and lines[0].startswith("LexerNoViableAltException: "):  # its last line is a mark
        place = len(last) - len("LexerNoViableAltException: ") - 1
        reason = f"{error.override[place]!r} has to be in quotes"
    else:
        reason = (lines[1:] or [last])[0].partition(" expecting ")[0]
    if place < len(key) or not re.fullmatch(r"[+~]*[\w./@:$-]+", key, re.ASCII):
        return f"{key!r} is not the name of a key; see: {command('--cfg', 'job')}"
    text = f"{key}={quote(value)}"
    fix = shlex.quote(text) if text.isprintable() else f"${text!r}"
    return f"{word} cannot be read: {reason}\nif the value is a text, quote it: {fix}"


def _is_from_hydra(error: BaseException) -> bool:
    modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith("hydra.")


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(error.options or ())
    close = difflib.get_close_matches(option, options, n=1)
    hint = f" Did you mean {group}={close[0]}?" if close else ""
    if group == "hydra/launcher" and option in LAUNCHERS:
        hint = f" It is there after: pip install 'rlhf_exp[{LAUNCHERS[option]}]'"
    return f"{group}={option}: no such option.{hint}\navailable: {', '.join(options)}"


def _unknown_keys(first: str, conf: Path) -> list[str]:
    """A line for each unknown key on the command line. Hydra stops at the `first`."""
    keys_and_groups = _known_keys(conf)
    keys = [first]
    for word in sys.argv[1:]:
        key, equals, _ = word.partition("=")
        is_key = bool(equals) and "." in key and re.fullmatch(r"[\w.]+", key)
        elsewhere = ("hydra.", "prepare.", *(f"{key}." for key in keys))
        if is_key and key not in keys_and_groups and not key.startswith(elsewhere):
            keys.append(key)
    return [
        f"{key}: no such key.{_suggestion(key, conf, keys_and_groups)}"
        for key in dict.fromkeys(keys)
    ]


def _suggestion(key: str, conf: Path, keys_and_groups: Sequence[str]) -> str:
    """A hint for an unknown key: its new name, the options that have it, or the closest key or
    group."""
    new = RENAMED.get(key, key)
    if new != key and new.partition("=")[0] in keys_and_groups:
        return f" It is {new} now"
    renamed = f" It is {new} now." if new != key else ""
    if options := _options_with(new, conf):
        group, listed = options[0].partition("=")[0], ", ".join(options)
        return f"{renamed} The chosen {group} does not have it; these do: {listed}"
    by_last = {path.rpartition(".")[2]: path for path in reversed(keys_and_groups)}
    close = difflib.get_close_matches(key, keys_and_groups, n=1, cutoff=0.7)
    close = close or [
        by_last[name]
        for name in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1, cutoff=0.7)
    ]
    return f" Did you mean {close[0]}?" if close else f" See: {command('--cfg', 'job')}"


def _known_keys(conf: Path) -> list[str]:
    """The keys of the options that the command line chooses, and the groups."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        try:
            config = hydra.compose("config", overrides=_group_choices(conf))
        except (HydraException, OmegaConfBaseException):  # the choices themselves are wrong
            config = hydra.compose("config")
        keys = list(_paths(OmegaConf.to_container(config)))
    return keys + [group.name for group in conf.iterdir() if group.is_dir()]


def _options_with(key: str, conf: Path) -> list[str]:
    """The options, as GROUP=OPTION, of the key's groups whose file has the key."""
    words = key.split(".")
    return [
        f"{'/'.join(words[:depth])}={file.stem}"
        for depth in range(1, len(words))
        for file in sorted(conf.joinpath(*words[:depth]).glob("*.yaml"))
        if ".".join(words[depth:]) in _paths(OmegaConf.to_container(OmegaConf.load(file)))
    ]


def refuse_old_keys(config: Mapping[str, Any], run: Path) -> None:
    """Raises ConfigError if a run's configuration has keys of earlier versions."""
    if old := sorted(RENAMED.keys() & set(_paths(config))):
        raise ConfigError(
            f"{run} is of an earlier version: its configuration has {old[0]}, which is"
            f" {RENAMED[old[0]]} now. Finish it with that version (see environment.txt in it), or"
            " start the run again"
        )


def _required_groups(group: str, conf: Path) -> Iterator[str]:
    """A line for each group that the experiment leaves open and the command line does not set;
    Hydra names one, `group`."""
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    experiment = conf / "experiment" / f"{words.get('experiment')}.yaml"
    if experiment.is_file():
        left_open = re.findall(r"override /(\w+): \?\?\?", experiment.read_text(encoding="utf-8"))
    else:  # of a user's own folder
        left_open = [group]
    for name in left_open:
        if name not in words:
            options = sorted(file.stem for file in (conf / name).glob("*.yaml"))
            yield f"{name} is required: choose one: {name}={' '.join(options)}"


def _group_choices(conf: Path) -> list[str]:
    groups = {str(group.relative_to(conf)) for group in conf.rglob("*") if group.is_dir()}
    return [word for word in sys.argv[1:] if word.partition("=")[0] in groups and "," not in word]


def _paths(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")
