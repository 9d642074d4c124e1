"""The page in a browser: what a reader can do with it, and that it asks no host for anything."""

import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.report.page import write_page
from rlhf_exp.report.payload import Names, build_payload
from rlhf_exp.report.wording import BOOTSTRAP, COST_NAMES, INTERVALS
from tests.report.build_payload import payload
from tests.report.build_runs import (
    KL_COEFS,
    best_of_n_config,
    best_of_n_rows,
    config,
    rows,
    samples,
    write_run,
    write_stages,
    write_sweep,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: sudo apt-get install chromium"
)
HOSTILE = (
    "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'><b>bold</b>"
    "<svg onload='window.stolen = 3'></svg><a href='javascript:window.stolen = 4'>a</a>"
    '" onmouseover="window.stolen = 5" x=\'<!--'
)
UNKNOWN = "\u2013"
MARKUP = "<b>a</b>%{x}"
Open = Callable[..., Any]


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
    for column, (low, high) in enumerate(axes):
        at = [y[column] for y in traces]
        assert (low, high) == (0, 1)
        assert min(at) >= low
        assert max(at) <= high
        if column < len(grid):
            places = [y for x, y in ticks if x == column]
            room = 0.5 / len(places)
            assert all(min(abs(y - place) for place in places) < room / 2 for y in at)
            assert min(places) == pytest.approx(room), "the lowest value has room below"
    assert len({y[1] for y in traces}) == 8, "settings lie beside each other"


def test_text_of_models_and_settings_stays_text(show: Open) -> None:
    content = payload({"reward.words": (MARKUP, "good"), "stage.kl_coef": (0.1, 1.0)})
    content["title"] = HOSTILE
    content["problems"] = [HOSTILE]
    content["runs"][0] |= {"status": "failed", "error": HOSTILE, "warnings": [HOSTILE]}
    for run in content["runs"]:
        for sample in run["samples"]:
            sample |= {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}
    page = show(content)
    page.get_by_text("By phase").click()
    assert page.locator("#comparison .after p").first.inner_text() == HOSTILE
    assert page.locator("#problem-list li").first.inner_text() == HOSTILE
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.evaluate("window.stolen") is None
    assert page.locator("main img, main script, svg a").count() == 0
    # Plotly would make links and bold letters of it.
    labels = page.locator("#parallel-figure .annotation-text").all_text_contents()
    assert MARKUP in labels
    legend = page.locator("#legend button").first.inner_text()
    assert MARKUP in legend


def test_what_a_run_holds_on_disk_stays_text(show: Open, tmp_path: Path) -> None:
    shown = samples([0, 10])
    for row in shown:
        row |= {
            "prompt": f"{row['prompt']} {HOSTILE}",
            "completion": f"{row['completion']} {HOSTILE}",
        }
    for i, status in enumerate(("done", "failed")):
        settings = config(seed=i) | {"name": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE, i]}}
        folder = tmp_path / "sweep" / f"{i}_{HOSTILE.replace('/', '|')}"
        error = f"{HOSTILE} in {i}"
        write_run(folder, settings, rows(settings), status=status, error=error, shown=shown)
    page = show(build_payload([tmp_path / "sweep"], Names(), made=datetime(2026, 11, 21)))
    page.locator("#table tbody tr").first.hover()
    for text in ("compare", "table", "settings", "warning-list"):
        assert "window.stolen" in page.locator(f"#{text}").text_content(), text
    assert HOSTILE in page.locator("#comparison .after p").first.inner_text()
    assert page.evaluate("window.stolen") is None
    assert page.locator("main img, main script, main a[href^=javascript]").count() == 0
    assert page.locator("[onmouseover], [onload], [onerror]").count() == 0


def stages(folder: Path) -> dict[str, Any]:
    return build_payload([write_stages(folder / "s")], Names(), made=datetime(2026, 11, 21))


def test_stages_are_set_side_by_side(show: Open, tmp_path: Path) -> None:
    content = stages(tmp_path)
    page = show(content)
    improvement, tokens, seconds, estimates = page.locator("#between table").all()
    rows = improvement.locator("tbody tr").all_inner_texts()
    assert len(rows) == 6
    assert rows[0].split("\t") == [
        "stage=PPO, kl_coef=0.1",
        "stage=BestOfN, kl_coef=null",
        "1 [1, 1]",
    ]
    assert BOOTSTRAP in page.locator("#between .note").first.inner_text()
    for table, entry in ((tokens, content["equal_cost"][0]), (seconds, content["equal_cost"][1])):
        cells = table.locator("tbody tr").first.locator("td").all_inner_texts()
        first = next(g for g in entry["groups"] if g["group"] == 2)
        assert cells[0].startswith(f"{first['score']['mean']:.3g} [")
        assert float(cells[2].replace(",", "")) == pytest.approx(first["spent"])
    titles = page.locator("#between h3").all_inner_texts()
    assert titles[1] == f"At 25,590 {COST_NAMES['tokens']}"
    assert titles[2].endswith(COST_NAMES["seconds"])
    left_out = (
        "Left out, since the cost is not known or a run has no evaluation by then: stage=BestOfN"
    )
    assert left_out in page.locator("#between .note").nth(1).inner_text()
    exact = content["kl_estimates"][0]
    assert estimates.locator("tbody td").all_inner_texts()[:2] == [
        str(exact["kl"]), f"{exact['kl_k1']} ({exact['kl_k1_var']})",
    ]  # fmt: skip
    heads = page.locator("#best th").all_inner_texts()[:6]
    assert heads[3:] == ["runs", "IQM", "true reward"]


def test_the_true_reward_has_a_frontier_that_follows_the_legend(show: Open, tmp_path: Path) -> None:
    content = stages(tmp_path)
    page = show(content)
    data = "e => e.data.filter((t) => t.mode === 'markers').map((t) => [t.x[0], t.y[0]])"
    start, *ends = page.locator("#true-frontier-figure").evaluate(data)
    assert start == [0, 0.52]
    assert ends == [
        [group["kl"]["mean"], group["true_reward"]["score"]["mean"]]
        for group in content["groups"]
        if group["kl"]["mean"] is not None
    ]
    assert page.locator("#frontier-figure").evaluate(data)[1][1] == 0.93
    page.locator("#legend button").first.click()
    assert page.locator("#true-frontier-figure").evaluate(data) == [start, *ends[1:]]
    assert "open diamond: the model before training" in page.locator("#frontier-note").inner_text()
    assert not show(payload()).locator("#true-frontier").is_visible()


def test_curves_are_drawn_over_what_they_cost(show: Open, tmp_path: Path) -> None:
    content = stages(tmp_path)
    page = show(content)
    figure = page.locator(".curve-panel .figure").first
    means = "e => e.data.filter((t) => t.mode === 'lines+markers').map((t) => t.x)"
    known = [group["curves"]["eval"] for group in content["groups"] if group["label"][6:9] == "PPO"]
    assert len(figure.evaluate(means)) == 4, "best of n, DPO, and PPO twice"
    for cost in ("completions", "tokens", "seconds"):
        page.locator("#axes span", has_text=cost).click()
        assert figure.evaluate(means) == [curves[cost] for curves in known]
        assert cost in figure.evaluate("e => e.layout.xaxis.title.text")
        note = page.locator("#curves-note").inner_text()
        assert f"Not drawn, since their {cost} are not known: stage=BestOfN" in note
    page.locator("#seeds input").first.check()
    seeds = figure.evaluate("e => e.data.filter((t) => t.meta === 'seed').map((t) => t.x)")
    run = content["runs"][content["groups"][2]["runs"][0]]
    assert seeds[0][:-1] == run["curves"]["eval"]["seconds"]
    assert not show(payload()).locator("#axes").is_visible(), "runs that know no cost"


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


def test_the_best_of_n_samples_are_a_line_before_paths_are_shown(
    show: Open, tmp_path: Path
) -> None:
    write_sweep(tmp_path / "ppo", {"kl_coef": [0.1, 1.0], "seed": [1]})
    write_run(tmp_path / "best", best_of_n_config(), best_of_n_rows())
    page = show(build_payload([tmp_path], Names(), made=datetime(2026, 11, 21)))
    assert lines(page, "#frontier-figure") == 2  # the front, and the best of 1 to 8
    texts = "document.querySelector('#frontier-figure').data[1].hovertext"
    assert ["<br>n 4<br>" in text for text in page.evaluate(texts)] == [False, False, True, False]
    page.locator("input[name=frontier][value=path]").check(force=True)
    assert lines(page, "#frontier-figure") == 4


def test_a_figure_goes_nowhere_but_to_a_file(show: Open) -> None:
    page = show(payload())
    page.locator("#frontier-figure").hover()
    buttons = page.locator(".modebar-btn")
    titles = {b.get_attribute("data-title") for b in buttons.all()}
    assert titles == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}
    with page.expect_download() as download:
        buttons.first.click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def supervised() -> dict[str, Any]:
    content = payload({"optimizer.base_lr": (1e-4, 1e-3)}, seeds=(1,))
    content["metrics"] = {"train": ["train/loss"], "eval": []}
    unknown = {"mean": None, "low": None, "high": None}
    for run, group in zip(content["runs"], content["groups"], strict=True):
        run |= {"final": dict.fromkeys(run["final"]), "samples": []}
        run["curves"] = {
            "train": {"phase": [1, 2], "train/loss": [2.0, 1.0]},
            "eval": {"phase": []},
        }
        band = {"mean": [2.0, 1.0], "low": [None, None], "high": [None, None]}
        curves = {"train": {"phase": [1, 2], "train/loss": band}, "eval": {"phase": []}}
        group |= {"score": unknown, "kl": unknown, "path": [], "pareto": False, "curves": curves}
    return {**content, "importance": [], "interactions": []}


def unfinished() -> dict[str, Any]:
    content = supervised()
    content["metrics"] = {"train": [], "eval": []}
    for run, group in zip(content["runs"], content["groups"], strict=True):
        run |= {"status": "running", "phases": 0, "curves": {}}
        group |= {"score": None, "kl": None, "curves": {}}
    return content


def no_run() -> dict[str, Any]:
    content = {**unfinished(), "runs": [], "groups": [], "parameters": [], "common": {}}
    return {**content, "differing": {}, "problems": ["/runs: no run folder"]}


@pytest.mark.parametrize(
    ("content", "headline", "sections"),
    [
        (payload({"stage.kl_coef": (0.3,)}, seeds=(1,)), "Score ", {"parameters"}),
        pytest.param(supervised(), "There is no eval/score", set(), marks=pytest.mark.soak),
        pytest.param(unfinished(), "No run has finished", {"curves"}, marks=pytest.mark.soak),
        (
            no_run(),
            "There is no eval/score",
            {"frontier", "curves", "parameters", "runs", "compare"},
        ),
    ],
    ids=["one run", "no score and no KL", "unfinished", "no run"],
)
def test_what_is_missing_is_left_out(
    show: Open, content: dict[str, Any], headline: str, sections: set[str]
) -> None:
    page = show(content)
    assert headline in page.locator("#headline").inner_text()
    hidden = {e.get_attribute("id") for e in page.locator("section[hidden]").all()}
    assert hidden >= sections
    assert not hidden & {"runs", "compare"} - sections
    assert page.locator("#table tbody tr").count() == len(content["runs"])


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
