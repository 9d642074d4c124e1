"""Several loggers at once: the chosen one and those of `logger.also`. If one of them fails, the run
and the other loggers go on."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rlhf_exp.runs.folder import Sink
from rlhf_exp.runs.presentation import attempt
from rlhf_exp.settings import ConfigError
from rlhf_exp.tracking.protocol import Logger, RunInfo

log = logging.getLogger(__name__)

# The options of the group `logger`, which `logger.also` may name.
LOGGERS = {
    "local": "rlhf_exp.tracking.protocol.LocalLogger",
    "tensorboard": "rlhf_exp.tracking.tensorboard_sink.TensorBoardLogger",
    "trackio": "rlhf_exp.tracking.trackio_sink.TrackioLogger",
    "wandb": "rlhf_exp.tracking.wandb_logger.WandbLogger",
}


def split_loggers(config: Mapping[str, Any], problems: list[str]) -> dict[str, Mapping[str, Any]]:
    """The settings of each logger, by their place in the configuration: `logger`, `logger.also.0`
    and so on. Appends problems of `also`."""
    main = dict(config)
    also = main.pop("also", None) or []
    loggers: dict[str, Mapping[str, Any]] = {"logger": main}
    if not isinstance(also, list):
        problems.append(f"logger.also={also!r}: Input should be a list, as [tensorboard]")
        also = []
    for index, entry in enumerate(also):
        where = f"logger.also.{index}"
        if isinstance(entry, Mapping):
            loggers[where] = entry
        elif entry in LOGGERS:
            loggers[where] = {"_target_": LOGGERS[entry]}
        else:
            problems.append(
                f"{where}={entry!r}: choose one of {', '.join(LOGGERS)}, or give"
                " {_target_: module.Class}"
            )
    return loggers


@contextmanager
def open_sinks(loggers: Sequence[Logger], info: RunInfo) -> Iterator[list[Sink]]:
    """The sinks of all loggers. A logger that fails to open or to close is left out with a warning,
    unless it raises ConfigError when it is opened."""
    with ExitStack() as stack:
        yield [
            sink for logger in loggers for sink in stack.enter_context(_open_logger(logger, info))
        ]


@contextmanager
def _open_logger(logger: Logger, info: RunInfo) -> Iterator[list[Sink]]:
    name = type(logger).__name__
    try:
        context = logger.open(info)
        sinks = context.__enter__()
    except ConfigError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning("%s cannot start (%s); going on without it", name, reason)
        yield []
        return
    error_info: tuple[Any, Any, Any] = (None, None, None)
    try:
        yield sinks
    except BaseException:
        error_info = sys.exc_info()
        raise
    finally:
        attempt(f"closing {name}", lambda: context.__exit__(*error_info))
