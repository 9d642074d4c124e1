"""The browser that is installed, and what is read of a page in it."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: sudo apt-get install chromium"
)
Open = Callable[..., Any]


def column(page: Any, title: str) -> list[str]:
    """The cells of a column of the table of runs, from above."""
    place = [text.split()[0] for text in page.locator("#table thead th").all_inner_texts()].index(
        title
    )
    return page.locator(f"#table tbody tr td:nth-child({place + 1})").all_inner_texts()


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace("\u2212", "-")) for text in texts]


def lines(page: Any, figure: str) -> int:
    """How many lines a figure has."""
    return page.locator(f"{figure} .scatterlayer .js-line").count()
