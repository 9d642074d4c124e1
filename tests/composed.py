"""Configurations for tests of what is in them: each choice of options is composed once."""

import copy
import functools

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from rlhf_exp.app.run import CONF


def compose(*words: str) -> DictConfig:
    """The configuration that Hydra composes of a command line's words."""
    options = tuple(word for word in words if is_choice(word))
    config = copy.deepcopy(compose_options(*options))
    keys = OverridesParser.create().parse_overrides([w for w in words if w not in options])
    ConfigLoaderImpl._apply_overrides_to_config(keys, config)
    return config


def is_choice(word: str) -> bool:
    """True if the word chooses an option of a group or leaves the group out."""
    group, _, value = word.lstrip("+~").partition("=")
    return (CONF / group.partition("@")[0]).is_dir() and not value.startswith("{")


@functools.cache
def compose_options(*options: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(options))
