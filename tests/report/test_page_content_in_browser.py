"""What the page shows of runs of other kinds, and of hostile text, in a browser."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.report.payload import Names, build_payload
from rlhf_exp.report.wording import BOOTSTRAP, COST_NAMES
from tests.report.browsing import Open, lines, needs_browser
from tests.report.build_payload import payload
from tests.report.build_runs import (
    best_of_n_config,
    best_of_n_rows,
    config,
    rows,
    samples,
    write_run,
    write_stages,
    write_sweep,
)

pytestmark = needs_browser
HOSTILE = (
    "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'><b>bold</b>"
    "<svg onload='window.stolen = 3'></svg><a href='javascript:window.stolen = 4'>a</a>"
    '" onmouseover="window.stolen = 5" x=\'<!--'
)
MARKUP = "<b>a</b>%{x}"


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
        "stage=ppo, kl_coef=0.1",
        "stage=best_of_n, kl_coef=null",
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
        "Left out, since the cost is not known or a run has no evaluation by then: stage=best_of_n"
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
    known = [group["curves"]["eval"] for group in content["groups"] if group["label"][6:9] == "ppo"]
    assert len(figure.evaluate(means)) == 4, "best of n, DPO, and PPO twice"
    for cost in ("completions", "tokens", "seconds"):
        page.locator("#axes span", has_text=cost).click()
        assert figure.evaluate(means) == [curves[cost] for curves in known]
        assert cost in figure.evaluate("e => e.layout.xaxis.title.text")
        note = page.locator("#curves-note").inner_text()
        assert f"Not drawn, since their {cost} are not known: stage=best_of_n" in note
    page.locator("#seeds input").first.check()
    seeds = figure.evaluate("e => e.data.filter((t) => t.meta === 'seed').map((t) => t.x)")
    run = content["runs"][content["groups"][2]["runs"][0]]
    assert seeds[0][:-1] == run["curves"]["eval"]["seconds"]
    assert not show(payload()).locator("#axes").is_visible(), "runs that know no cost"


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
