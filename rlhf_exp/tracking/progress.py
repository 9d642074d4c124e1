"""The progress of a run: a bar on a terminal, otherwise a line for each step. The log file always
gets the lines."""

import logging
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)
# With a bar on the terminal, its lines go to the log file alone: see `file_log`.
line_log = logging.getLogger("rlhf_exp.progress")
package_log = logging.getLogger("rlhf_exp")

SHORT = {
    "objective/scores": "score",
    "eval/score": "score",
    "objective/kl": "kl",
    "objective/entropy": "entropy",
    "policy/clipfrac": "clipfrac",
    "train/loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "heldout/loss": "held-out loss",
    "heldout/accuracy": "held-out accuracy",
    "pairs/tie_fraction": "ties",
    "pairs/chosen_reward": "chosen",
    "pairs/rejected_reward": "rejected",
}


class Progress:
    """Counts the steps of one loop. Use it as a context manager."""

    def __init__(self, total: int, *, unit: str) -> None:
        self.total, self.unit = total, unit
        tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves
        self._stack = ExitStack()
        self._start: tuple[int, float] | None = None
        self.bar = tqdm(
            total=total, unit=unit, leave=False, dynamic_ncols=True, disable=not on_terminal()
        )

    def __enter__(self) -> "Progress":
        if not self.bar.disable:  # else log lines would break the bar
            self._stack.enter_context(logging_redirect_tqdm([logging.root, package_log]))
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self._stack.close()

    def start(self, step: int) -> None:
        """Begins after `step`. The next `advance` then logs how long the rest takes."""
        self._start = step, time.monotonic()

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` (1, 2, ...) is done, with the metrics that have a short name."""
        values = {SHORT[k]: f"{round(v, 3) + 0.0:.3f}" for k, v in metrics.items() if k in SHORT}
        self.bar.set_postfix(values, refresh=False)
        self.bar.update(step - self.bar.n)
        width = len(str(self.total))
        facts = "  ".join(f"{k} {v}" for k, v in values.items())
        line_log.info("%s %*d/%d  %s", self.unit, width, step, self.total, facts)
        if self._start is not None and step > self._start[0]:
            first, began = self._start
            each = (time.monotonic() - began) / (step - first)
            log_remaining(**{f"{self.unit}s": (self.total - step, each)})
            self._start = None


def log_remaining(**parts: tuple[int, float]) -> None:
    """Logs how long the rest of a loop takes, from the number of each part and its seconds."""
    if seconds := sum(number * each for number, each in parts.values()):
        terms = [f"{name} {n} x {each:.2f} s" for name, (n, each) in parts.items() if n]
        log.info("about %.0f s to go: %s", seconds, ", ".join(terms))


def on_terminal() -> bool:
    """Returns True if standard error, where the bar goes, is a terminal."""
    return sys.stderr.isatty()


def keep_log(file: Path, *, console: bool) -> None:
    """Logs this package to the file, and with `console` its warnings to the console, whatever
    Hydra's configuration says. The package has handlers of its own, since the user's code may
    replace those of the root logger, as logging.basicConfig(force=True) does."""
    handlers = [*logging.root.handlers]
    if not any(isinstance(handler, logging.FileHandler) for handler in handlers):
        to_file = logging.FileHandler(file, encoding="utf-8", delay=True)
        to_file.setFormatter(logging.Formatter("[%(asctime)s %(levelname)s] %(message)s"))
        handlers.append(to_file)
    if console and all(isinstance(handler, logging.FileHandler) for handler in handlers):
        to_console = logging.StreamHandler()
        to_console.setLevel(logging.WARNING)
        handlers.append(to_console)
    package_log.handlers, package_log.propagate = handlers, False
    package_log.setLevel(min(logging.root.level, logging.INFO))
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "rlhf_exp" and isinstance(logger, logging.Logger):
            logger.disabled = False  # hydra/job_logging=disabled disables it


def file_log() -> logging.Logger:
    """A logger that writes to train.log alone. The progress lines go there too while a bar is on
    the terminal."""
    handlers: list[logging.Handler] = [
        h for h in package_log.handlers if isinstance(h, logging.FileHandler)
    ]
    handlers = handlers or [logging.NullHandler()]  # none would mean standard error
    own = logging.getLogger("rlhf_exp.file")
    for logger in (own, line_log) if on_terminal() else (own,):
        logger.handlers, logger.propagate = handlers, False
    return own
