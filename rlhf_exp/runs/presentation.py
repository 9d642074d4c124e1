"""What a run shows once its result is written: tables, figures, a model card.

It knows that none of this is worth losing a run for, and nothing of what is shown.
"""

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Presentation:
    """Parts to show in their order, each by itself: one that fails takes no other down."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, Callable[[], object]]] = []

    def add(self, name: str, show: Callable[[], object]) -> None:
        """Has `show()` called once the result is written. `name` is for the warning if it fails."""
        self._parts.append((name, show))

    def show(self) -> None:
        """Shows all parts."""
        for name, show in self._parts:
            attempt(name, show)


def attempt(name: str, call: Callable[[], object]) -> None:
    """Makes a call that a finished run can do without: warns if it fails."""
    try:
        call()
    except (Exception, SystemExit) as error:  # SystemExit: rich's answer to a closed pipe
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning("%s failed (%s); the result is complete without it", name, reason)
