"""The page as a file: whole, alone, and without anything in it that others could have written."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.report.page import write_page
from tests.report.build_payload import payload

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> &amp; \u2028."
LIMIT = 15_000_000


class Reader(HTMLParser):
    """The elements of a page with their attributes, and the text of those that have one."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.found if name == tag]


def written(folder: Path, content: dict[str, Any]) -> str:
    return write_page(content, folder / "report.html").read_text(encoding="utf-8")


def test_the_payload_comes_back_as_it_was(tmp_path: Path) -> None:
    content = payload()
    content["runs"][0]["samples"][0]["after"] = HOSTILE
    texts = Reader(written(tmp_path, content)).texts("script")
    assert json.loads(texts[0]) == content


def test_no_text_becomes_an_element(tmp_path: Path) -> None:
    clean = Reader(written(tmp_path, payload()))
    content = payload()
    content["title"] = HOSTILE
    content["problems"] = [HOSTILE]
    content["runs"][0] |= {"name": HOSTILE, "error": HOSTILE, "warnings": [HOSTILE]}
    content["runs"][0]["samples"][0] |= {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}
    content["groups"][0]["label"] = HOSTILE
    content["common"] = {HOSTILE: HOSTILE}
    page = Reader(written(tmp_path, content))
    assert [tag for tag, _, _ in page.found] == [tag for tag, _, _ in clean.found]
    assert [text.strip() for text in page.texts("h1") + page.texts("title")] == [HOSTILE] * 2


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = Reader(written(tmp_path, payload()))
    policy = next(a["content"] for _, a, _ in page.found if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert not re.search("https?:|unsafe-eval|script-src[^;]*unsafe-inline", policy)
    addresses = [a[n] for _, a, _ in page.found for n in ("src", "href") if n in a]
    assert addresses == ["data:,"]
    own = [*page.texts("style"), page.texts("script")[-1]]
    assert [len(re.findall("https?:|@import|url\\(", text)) for text in own] == [0, 0]


def test_two_hundred_runs_of_two_hundred_phases_are_small(tmp_path: Path) -> None:
    grid = {"stage.kl_coef": (0.03, 0.1, 0.3, 1.0), "optimizer.base_lr": [*range(1, 11)]}
    content = payload(grid, seeds=range(5), phases=200)
    assert len(content["runs"]) == 200
    path = write_page(content, tmp_path / "report.html")
    plotly = 4_900_000
    assert path.stat().st_size < len(json.dumps(content, separators=(",", ":"))) + plotly < LIMIT


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_page(payload(), path)
    before = path.read_bytes()
    broken = payload()
    broken["runs"][0]["final"]["score"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_page(broken, path)
    # A title that cannot be written is found out when the file is open.
    with pytest.raises(ValueError, match="surrogates"):
        write_page({**payload(), "title": "\ud800"}, path)
    assert path.read_bytes() == before
    later = {**payload(), "title": "another"}
    assert write_page(later, path) == path
    assert path.read_bytes() != before
    assert [found.name for found in path.parent.iterdir()] == ["report.html"]
    beside = path.with_name("made by open")
    beside.touch()
    assert path.stat().st_mode == beside.stat().st_mode
