"""The page in a browser: what a reader can do with it, and that it asks no host for anything."""

from datetime import datetime
from pathlib import Path

import pytest

from rlhf_exp.report.payload import Names, build_payload
from rlhf_exp.report.wording import INTERVALS
from tests.report.browsing import Open, column, lines, needs_browser, numbers
from tests.report.build_payload import payload
from tests.report.build_runs import (
    KL_COEFS,
    write_sweep,
)

pytestmark = needs_browser
UNKNOWN = "\u2013"


def test_the_headline_names_the_ends_of_the_front(show: Open) -> None:
    content = payload()
    page = show(content)
    text = page.locator("#headline").inner_text()
    best, least = content["groups"][0], content["groups"][-1]
    assert best["pareto"]
    assert least["pareto"]
    assert f"{best['label']} scores highest, {best['score']['mean']:.3g} at" in text
    assert f"{least['label']} stays closest to the reference" in text
    assert page.locator("#best tbody tr").count() == 4
    low = f"{best['score']['low']:.3g}"
    assert low in page.locator("#best tbody tr").first.inner_text()


def test_the_table_is_sorted_and_filtered(show: Open) -> None:
    content = payload()
    content["runs"][2] |= {"status": "failed", "error": "out of memory"}
    content["runs"][2]["final"]["score"] = None
    page = show(content)
    head = page.locator("#table thead th", has_text="score")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    rising = column(page, "score")
    assert rising[-1] == UNKNOWN
    assert numbers(rising[:-1]) == sorted(numbers(rising[:-1]))
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    falling = column(page, "score")
    assert falling == [*reversed(rising[:-1]), UNKNOWN]
    page.locator("#filter").fill("kl_coef=0.3 seed=2")
    assert column(page, "run") == [content["runs"][7]["name"]]
    assert page.locator("#shown").inner_text() == "1 of 12 runs"
    page.locator("#filter").fill("")
    page.locator("#status").select_option("failed")
    assert column(page, "run") == [content["runs"][2]["name"]]


def test_two_runs_are_compared(show: Open) -> None:
    content = payload()
    page = show(content)
    for number in (4, 9):
        page.get_by_label(f"Compare {content['runs'][number]['name']}").check()
    compared = page.locator("#comparison").inner_text()
    for number in (4, 9):
        for sample in content["runs"][number]["samples"]:
            assert sample["after"] in compared
    scores = [content["runs"][number]["final"]["score"] for number in (4, 9)]
    row = page.locator("#comparison tr", has_text="score").first.locator("td").all_inner_texts()
    assert numbers(row) == pytest.approx([*scores, scores[1] - scores[0]], abs=1e-4)
    differing = page.locator("#comparison table").nth(1).locator("tbody tr").all_inner_texts()
    assert [text.split("\t") for text in differing] == [
        ["stage.kl_coef", "0.1", "1"],
        ["seed", "2", "1"],
    ]
    page.locator("#pick-1").select_option(str(0))
    assert page.locator("#table tr.picked").count() == 2
    assert page.get_by_label(f"Compare {content['runs'][0]['name']}").is_checked()
    assert not page.get_by_label(f"Compare {content['runs'][9]['name']}").is_checked()


def test_seeds_and_settings_are_shown_and_hidden(show: Open) -> None:
    page = show(payload())
    before = lines(page, "#curve-panels")
    page.locator("#seeds input").first.check()
    # A line of its seed for each of four settings, in both panels.
    assert lines(page, "#curve-panels") == before + 8
    page.locator("#legend button").first.click()
    # Mean, band and seed of one setting go, in both panels.
    assert lines(page, "#curve-panels") == before + 8 - 6
    assert page.locator("#legend button").first.get_attribute("aria-pressed") == "false"
    page.locator("#seeds input").first.uncheck()
    page.locator("#legend button").first.press("Enter")
    assert lines(page, "#curve-panels") == before
    page.locator(".curve-panel select").first.select_option('["train","policy/clipfrac"]')
    assert lines(page, "#curve-panels") == before


def test_hovering_a_point_of_the_frontier_tells_its_numbers(show: Open) -> None:
    content = payload()
    page = show(content)
    group = content["groups"][1]
    point = page.locator("#frontier-figure .scatterlayer .trace .points path").nth(1)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator("#frontier-figure .hovertext").wait_for()
    told = page.locator("#frontier-figure .hoverlayer").text_content()
    numbers = [
        f"{name} {group[key]['mean']:.3g} [" for name, key in (("score", "score"), ("KL", "kl"))
    ]
    for text in (group["label"], "seeds 1, 2, 3", *numbers):
        assert text in told
    page.get_by_text("By phase").click()
    assert lines(page, "#frontier-figure") == 1 + len(content["groups"])


def test_every_interval_is_called_what_it_is(show: Open) -> None:
    page = show(payload())
    for note in ("#best-note", "#frontier-note", "#curves-note", "#parameters-note"):
        assert INTERVALS in page.locator(note).inner_text()
    one_setting = {"stage.kl_coef": (0.3,)}
    assert INTERVALS in show(payload(one_setting)).locator("#headline").inner_text()
    alone = show(payload(one_setting, seeds=(1,)))
    assert INTERVALS not in alone.locator("body").inner_text()


def test_parallel_lines_stay_on_their_axes_and_by_their_values(show: Open) -> None:
    grid = {"stage.kl_coef": (0.03, 0.1, 0.3, 1.0), "reward": ("Length", "Keyword")}
    page = show(payload(grid))
    figure = page.locator("#parallel-figure")
    traces = figure.evaluate("e => e.data.map((trace) => trace.y)")
    axes = figure.evaluate("e => e.layout.shapes.map((line) => [line.y0, line.y1])")
    ticks = figure.evaluate("e => e.layout.annotations.map((tick) => [tick.x, tick.y])")
    for axis, (low, high) in enumerate(axes):
        at = [y[axis] for y in traces]
        assert (low, high) == (0, 1)
        assert min(at) >= low
        assert max(at) <= high
        if axis < len(grid):
            places = [y for x, y in ticks if x == axis]
            room = 0.5 / len(places)
            assert all(min(abs(y - place) for place in places) < room / 2 for y in at)
            assert min(places) == pytest.approx(room), "the lowest value has room below"
    assert len({y[1] for y in traces}) == 8, "settings lie beside each other"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_the_page_fits_the_screen(show: Open, scheme: str, width: int) -> None:
    grid = {
        "stage.kl_coef": (0.1, 1.0),
        "optimizer.base_lr": (1e-5, 1e-4),
        "reward.name": ("a" * 80, "b"),
    }
    page = show(payload(grid), viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    ink = page.locator("#frontier-figure .xtitle").evaluate("e => getComputedStyle(e).fill")
    other = "light" if scheme == "dark" else "dark"
    page.emulate_media(color_scheme=other)
    page.wait_for_function(
        "ink => getComputedStyle(document.querySelector('#frontier-figure .xtitle')).fill !== ink",
        arg=ink,
    )


def test_a_sweep_of_run_folders_is_shown(show: Open, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"kl_coef": KL_COEFS, "seed": (1, 2, 3)})
    page = show(build_payload([sweep], Names(), made=datetime(2026, 11, 21)))
    assert page.locator("#table tbody tr").count() == 12
    assert page.locator("#best tbody tr").count() == 4
    assert lines(page, "#curve-panels") == 2 * 2 * 4
    assert "this movie number 0 was" in page.locator("#comparison").inner_text()


def test_a_figure_goes_nowhere_but_to_a_file(show: Open) -> None:
    page = show(payload())
    page.locator("#frontier-figure").hover()
    buttons = page.locator(".modebar-btn")
    titles = {b.get_attribute("data-title") for b in buttons.all()}
    assert titles == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}
    with page.expect_download() as download:
        buttons.first.click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_two_hundred_runs_are_fluid(show: Open) -> None:
    grid = {"stage.kl_coef": (0.03, 0.1, 0.3, 1.0), "optimizer.base_lr": [*range(1, 11)]}
    page = show(payload(grid, seeds=range(5), phases=200))
    assert page.locator("#table tbody tr").count() == 200
    assert page.locator("#legend button").count() == 9
    # Ten times what it takes on two slow cores.
    assert (
        page.evaluate(
            "() => { const t = performance.now(); redraw(); return performance.now() - t; }"
        )
        < 5000
    )
    page.locator("#filter").fill("seed=3")
    assert page.locator("#table tbody tr").count() == 40
