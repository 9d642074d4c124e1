"""Output after a run's result is written: tables, figures, a model card.

It knows that a failure here must not fail the run, and nothing of what is shown.
"""

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Presentation:
    """Parts to show in order; a part that fails does not affect the others."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, Callable[[], object]]] = []

    def add(self, name: str, show: Callable[[], object]) -> None:
        """Registers `show()` for after the result. `name` is for the warning if it fails."""
        self._parts.append((name, show))

    def show(self) -> None:
        """Shows all parts."""
        for name, show in self._parts:
            attempt(name, show)


def attempt(name: str, call: Callable[[], object]) -> None:
    """Makes a call that a finished run does not need: warns if it fails."""
    try:
        call()
    except (Exception, SystemExit) as error:  # SystemExit: rich's answer to a closed pipe
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning("%s failed (%s); the result is complete without it", name, reason)
