"""The report of a real sweep of twelve jobs, made by the commands that users type, in a browser."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.app.test_run import TINY, TRAIN, train
from tests.report.browsing import column, lines, needs_browser, numbers

pytestmark = [
    pytest.mark.soak,  # test_page_in_browser.py sees the same page of runs that are made up
    needs_browser,
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    words = ["stage.kl_coef=0.03,0.1,0.3,1", "seed=1,2,3", "reward=length", "stage.total_phases=3"]
    words += ["stage.eval_every=1", "logger=local", "hydra.sweep.dir=sweep", "sampler.gen_len=8"]
    outcome = train(folder, "-m", *TINY, *words, "sampler.stop_at_eos=true")
    assert outcome.code == 0, outcome.out + outcome.err
    script = TRAIN.parent / "scripts" / "compare.py"
    subprocess.run([sys.executable, str(script), "sweep"], cwd=folder, check=True, timeout=120)
    return folder / "sweep" / "report" / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_read_sorted_filtered_compared(
    report: Path, browser: Any, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url.split(":")[0]))
    page.goto(report.as_uri())
    assert "12 runs" in page.locator("h1").inner_text()
    scores = numbers(column(page, "score"))
    assert len(scores) == 12
    head = page.locator("#table thead th", has_text="score")
    head.get_by_role("button").click()
    assert numbers(column(page, "score")) == sorted(scores)
    page.locator("#filter").fill("seed=2")
    assert page.locator("#shown").inner_text() == "4 of 12 runs"
    page.locator("#filter").fill("")
    for name in ("0_kl_coef=0.03,seed=1", "11_kl_coef=1,seed=3"):
        page.get_by_label(f"Compare {name}").check()
    compared = page.locator("#comparison").inner_text()
    assert "stage.kl_coef" in compared
    before = lines(page, "#curves")
    page.get_by_label("2", exact=True).check()
    page.wait_for_function(
        f"document.querySelectorAll('#curves .scatterlayer .js-line').length > {before}"
    )
    if width == 1280:  # a phone has no pointer to hover with
        point = page.locator("#frontier .scatterlayer .point").last
        point.scroll_into_view_if_needed()
        point.hover(force=True)
        page.locator("#frontier .hoverlayer .hovertext").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert complaints == []
    assert set(asked) <= {"file", "data", "blob"}
