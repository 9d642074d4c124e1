from datetime import datetime

import pytest

from rlhf_exp.report.figures import write_figures
from rlhf_exp.report.markdown import escape, write_markdown
from rlhf_exp.report.payload import Names, build_payload
from tests.report.build_runs import (
    config,
    rows,
    samples,
    supervised_rows,
    write_run,
    write_stages,
    write_sweep,
)


def write(tmp_path, *paths):
    payload = build_payload(paths, Names(), made=datetime(2026, 11, 21, 2, 0))
    pictures = write_figures(payload, tmp_path / "out")
    return write_markdown(payload, pictures, tmp_path / "out" / "report.md").read_text("utf-8")


def table_of(text, head):
    """The cells of the rows of the table whose head begins so."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(line.replace(r"\|", "PIPE").strip("| ").split(" | "))
    return rows


def test_a_sweep(tmp_path):
    write_sweep(tmp_path / "s", {"kl_coef": [0.1, 1.0], "seed": [1, 2, 3]})
    failed = config(kl_coef=1.0, seed=4)
    lines = rows(failed, phases=20)
    for row in lines[10:]:
        row["policy/clipfrac"] = 0.9
    write_run(tmp_path / "s" / "6_x", failed, lines, status="failed", error="out|of memory")
    text = write(tmp_path, tmp_path / "s")
    assert text.startswith("# reviews: 7 runs\n\n2026-11-21 02:00, from ")
    assert "6 done, 1 failed." in text
    for picture in ("frontier.png", "curves.png", "parameters.png"):
        assert f"]({picture})" in text
        assert (tmp_path / "out" / picture).is_file()
    groups = table_of(text, "parameters")
    assert [row[0] for row in groups] == [r"kl\_coef=0.1", r"kl\_coef=1"]
    assert groups[0][1] == "3"
    assert groups[0][2].startswith("0.9")
    assert groups[0][4] == "yes"
    assert r"- **kl\_coef=1**: eval/score 0." in text
    told = "in brackets 95 % t-intervals of the mean"
    assert text.count(told) == 3, "front, table and equal costs"
    (row,) = [row for row in table_of(text, "run") if row[1] != "done"]
    assert row[1] == "failed: outPIPEof memory"
    assert r"- **6\_x**: clip fraction above 0.4" in text
    assert r"| stage.kl\_coef | 9" in text
    assert "stage.clip_coef: 0.2\n" in text
    assert table_of(text, "key")[-1] == [r"stage.kl\_coef", "0.1, 1"]
    assert "left out of means" in text.split("## What could not be read")[1]


NASTY = (
    "<script>alert(1)</script> `code` | pipe\nnew\r\nline\u2028x **bold** [a](javascript:b) ![i](j)"
    " https://evil.example www.evil.example @someone $math$ \x1b[31mred\u202eturned &amp; \\ ```"
)


def test_what_a_model_wrote_stays_one_readable_cell(tmp_path):
    shown = samples([0, 20], count=3)
    shown[0]["completion"] = shown[3]["completion"] = NASTY
    shown[4]["completion"] = "# 1. - "
    folder = write_run(tmp_path / NASTY[-3:], config(), rows(config()), shown=shown)
    text = write(tmp_path, folder)
    cells = table_of(text, "prompt")
    assert [len(row) for row in cells] == [5, 5, 5]
    assert (
        cells[0][2]
        == cells[0][4]
        == (
            r"&lt;script&gt;alert\(1\)&lt;/script&gt; \`code\` PIPE pipe ↵ new ↵ line ↵ x"
            r" \*\*bold\*\* \[a\]\(javascript:b\) \!\[i\]\(j\) https&#58;//evil.example"
            r" www&#46;evil.example &#64;someone \$math\$ �\[31mred�turned &amp;amp; \\ \`\`\`"
        )
    )
    assert cells[1][4] == r"\# 1. \-"
    assert "<script" not in text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("1. item", r"1\. item"),
        ("0.5", "0.5"),
        ("a\tb\0c", "a b�c"),
        ("x" * 600, "x" * 500 + "…"),
        ("电影 é", "电影 é"),
        ("\n\n", "↵  ↵"),
    ],
)
def test_texts_are_escaped(text, escaped):
    assert escape(text) == escaped


def test_configuration_cannot_leave_its_fence(tmp_path):
    settings = config()
    settings["task"]["prefix"] = "x\n```\n</details><script>"
    text = write(tmp_path, write_run(tmp_path / "run", settings, rows(settings)))
    assert text.count("\n```") == 2
    assert r'task.prefix: "x\n```\n</details><script>"' in text


def test_long_lists_are_bounded_and_say_so(tmp_path):
    write_sweep(tmp_path / "s", {"lr": [n * 1e-5 for n in range(1, 36)]}, phases=1)
    text = write(tmp_path, tmp_path / "s")
    assert len(table_of(text, "parameters")) == 30
    assert "... and 5 more in report.html" in text
    values = dict(table_of(text, "key"))[r"optimizer.base\_lr"]
    assert values.endswith("8e\\-05 and 27 more")


def test_supervised_failed_and_missing_runs_have_their_place(tmp_path):
    sft = write_run(tmp_path / "sft", config(), supervised_rows())
    failed = write_run(tmp_path / "failed", None, [], status="failed", error="no data")
    text = write(tmp_path, sft, failed, tmp_path / "nowhere")
    assert "frontier.png" not in text
    assert [row[:2] for row in table_of(text, "run")] == [
        ["sft", "done"],
        ["failed", "failed: no data"],
    ]
    assert "nowhere: No such file or directory" in text


def test_stages_are_compared(tmp_path):
    text = write(tmp_path, write_stages(tmp_path / "s"))
    assert "](true_reward.png)" in text
    assert "](costs.png)" in text
    first, best, *_ = table_of(text, "parameters")
    assert first[0] == r"stage=ppo, kl\_coef=0.1"
    assert best[2:] == [
        "0.93 [0.93, 0.93]", "1.2 [1.2, 1.2]", "yes", "0.93 [0.93, 0.93]", "0.87 [0.87, 0.87]",
    ]  # fmt: skip
    start = r"eval/score 0.52 \[0.52, 0.52\], eval/kl\_sum 0 \[0, 0\]."
    assert f"Before training, the model that all of these begin from: {start}" in text
    pairs = table_of(text, "first")
    assert len(pairs) == 6
    assert pairs[0] == [first[0], best[0], "1 [1, 1]"]
    assert "a bootstrap over seeds, where both have at least five seeds" in text
    costs = table_of(text.split("## At equal samples")[1], "parameters")
    assert [row[0] for row in costs] == [first[0], r"stage=ppo, kl\_coef=1"]
    assert [row[3] for row in costs] == ["25,600", "25,600"]  # 20 phases of 64 x 20 tokens
    assert r"(left out: stage=best\_of\_n, kl\_coef=null, stage=dpo, kl\_coef=null)" in text
    assert "left out if its cost is not known or a run has no evaluation by then" in text
    estimates = table_of(text.split("## Estimates of the KL")[1], "parameters")
    exact, k1 = float(estimates[0][1]), estimates[0][2].rstrip(")").split(" (")
    assert [float(number) for number in k1] == pytest.approx([exact, 2 * exact], rel=0.01)


def test_a_sweep_without_five_seeds_has_no_interquartile_means(tmp_path):
    text = write(tmp_path, write_sweep(tmp_path / "s", {"kl_coef": [0.1, 1.0], "seed": [1, 2]}))
    assert "IQM" not in text
    assert [row[2] for row in table_of(text, "first")] == ["1"]
