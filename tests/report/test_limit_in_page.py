"""The limit on the page, in a browser: its lines, and what hovering says."""

import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.report.page import write_page
from rlhf_exp.report.payload import Names, build_payload
from tests.report.build_payload import payload
from tests.report.build_runs import (
    best_of_n_config,
    best_of_n_rows,
    config,
    efficient,
    limit_points,
    rows,
    with_true_reward,
    write_limit,
    write_run,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: sudo apt-get install chromium"
)
MARKUP = "<b>a</b>%{x}"
LIMITS = "e => e.data.filter((t) => t.meta === 'limit')"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a payload; says afterwards whether it complained or asked for anything."""
    complaints: list[str] = []
    asked: list[str] = []
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url.split(":")[0]))

    def goto(content: dict[str, Any]) -> Any:
        page.goto(write_page(content, tmp_path / "report.html").as_uri())
        return page

    yield goto
    page.close()
    assert complaints == []
    assert set(asked) <= {"file", "data", "blob"}


def runs(folder: Path) -> dict[str, Any]:
    """Two penalties with two seeds, and the best of n."""
    for seed in (1, 2):
        for kl_coef in (0.1, 1.0):
            settings = config(kl_coef=kl_coef, seed=seed)
            metrics = with_true_reward(efficient(rows(settings), 0.2 + 0.1 * seed))
            run = write_run(folder / f"{kl_coef}_{seed}", settings, metrics)
            write_limit(run, limit_points(most=30.0), limit_points(0.5, most=30.0))
        best = write_run(folder / f"best_{seed}", best_of_n_config(seed=seed), best_of_n_rows())
        write_limit(best, limit_points(most=30.0))
    return build_payload([folder], Names(), made=datetime(2026, 11, 21))


def told(page: Any, figure: str, x: float, y: float) -> str:
    """What hovering a point of a figure says."""
    where = page.locator(f"#{figure}")
    where.scroll_into_view_if_needed()
    at = where.evaluate(
        """(e, [x, y]) => {
          const box = e.getBoundingClientRect(), { xaxis, yaxis } = e._fullLayout;
          return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
        }""",
        [x, y],
    )
    page.mouse.move(*at)
    page.locator(f"#{figure} .hovertext").first.wait_for()
    return page.locator(f"#{figure} .hoverlayer").text_content()


def test_the_limit_is_a_line_as_far_as_the_settings_reach(open_page: Open, tmp_path: Path) -> None:
    content = runs(tmp_path / "runs")
    page = open_page(content)
    for figure, limits in (
        ("frontier-figure", content["limits"]),
        ("true-frontier-figure", content["true_reward"]["limits"]),
    ):
        (line,) = page.locator(f"#{figure}").evaluate(LIMITS)
        _, high = page.locator(f"#{figure}").evaluate("e => e.layout.xaxis.range")
        reached = [p for p in limits[0]["points"] if p["kl"] <= high]
        assert 2 < len(reached) < len(limits[0]["points"])
        assert line["x"] == [point["kl"] for point in reached]
        assert line["y"] == [point["score"] for point in reached]
        bottom, top = page.locator(f"#{figure}").evaluate("e => e.layout.yaxis.range")
        assert bottom < min(line["y"]) < max(line["y"]) < top
    assert "solid line without marks: the limit" in page.locator("#frontier-note").inner_text()
    middle = reached[len(reached) // 2]
    text = told(page, "true-frontier-figure", middle["kl"], middle["score"])
    assert f"KL {middle['kl']:.4g}" in text
    assert "effective samples a prompt" in text


def test_hovering_a_setting_tells_its_efficiency(open_page: Open, tmp_path: Path) -> None:
    content = runs(tmp_path / "runs")
    page = open_page(content)
    group = next(g for g in content["groups"] if g["efficiency"])
    place = group["kl"]["mean"], group["score"]["mean"]
    assert "KL efficiency 0.35 [" in told(page, "frontier-figure", *place)
    true = group["true_reward"]["score"]["mean"]
    assert "efficiency" not in told(page, "true-frontier-figure", place[0], true)
    page.get_by_text("By phase").click()
    point = group["path"][1]
    text = told(page, "frontier-figure", point["kl"], point["score"])
    assert "KL efficiency 0.35" in text
    assert "phase 10" in text
    heads = page.locator("#table thead th").all_inner_texts()
    assert "efficiency" in [head.split("\n")[0].strip() for head in heads]


def test_several_limits_have_their_names_as_text(open_page: Open) -> None:
    content = payload({"reward.words": (MARKUP, "good")})
    points = [{"kl": i / 20, "score": 0.5 + i / 50, "samples": 100.0} for i in range(20)]
    content["kl"] = "eval/kl_sum"
    content["limits"] = [{"label": name, "samples": 3, "points": points} for name in (MARKUP, "b")]
    page = open_page(content)
    lines = page.locator("#frontier-figure").evaluate(LIMITS)
    assert [line["line"]["dash"] for line in lines] == ["solid", "9px,3px"]
    escaped = "<b>limit</b><br>&lt;b&gt;a&lt;/b&gt;&#37;{x}<br>"
    assert lines[0]["hovertext"][0].startswith(escaped)
    names = page.locator("#frontier-figure .annotation-text").all_text_contents()
    assert [name for name in names if "limit" in name] == [f"limit: {MARKUP}", "limit: b"]


def test_without_a_limit_nothing_is_said_of_it(open_page: Open) -> None:
    page = open_page(payload())
    assert page.locator("#frontier-figure").evaluate(LIMITS) == []
    assert "limit" not in page.locator("#frontier-note").inner_text()
    assert "efficiency" not in page.locator("#table").inner_text()
