"""The browser, and the page in it, for the tests of the page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.report.page import write_page
from tests.report.browsing import CHROMIUM, Open


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a payload; says afterwards whether it complained or asked for anything."""
    complaints: list[str] = []
    asked: list[str] = []
    pages = []

    def open_page(content: dict[str, Any], **options: Any) -> Any:
        path = write_page(content, tmp_path / f"{len(pages)}.html")
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url.split(":")[0]))
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []
    assert set(asked) <= {"file", "data", "blob"}
