import pytest

from rlhf_exp.report.wording import (
    best_first,
    count_statuses,
    one_line,
    pareto_groups,
    show_interval,
    show_number,
)


def group(index, score, kl, pareto):
    return {"id": index, "score": {"mean": score}, "kl": {"mean": kl}, "pareto": pareto}


GROUPS = [group(0, 0.5, 0.1, True), group(1, None, None, False), group(2, 0.7, 0.3, False)]
GROUPS += [group(3, 0.9, 0.2, True), group(4, -0.5, 0.3, False)]


def test_numbers_and_intervals():
    assert [show_number(value) for value in (None, 0.5, 12345.678)] == ["-", "0.5", "1.235e+04"]
    assert show_interval({"mean": 0.97123, "low": 0.96, "high": 0.98}) == "0.971 [0.96, 0.98]"
    assert show_interval({"mean": 0.97123, "low": None, "high": None}) == "0.9712"
    assert show_interval({"mean": None, "low": None, "high": None}) == "-"


def test_groups_in_order():
    payload = {"groups": GROUPS}
    assert [g["id"] for g in pareto_groups(payload)] == [0, 3]
    assert [g["id"] for g in best_first(GROUPS)] == [3, 0, 2, 4, 1]


def test_statuses_are_counted():
    runs = [{"status": status} for status in ("done", "failed", "done")]
    assert count_statuses({"runs": runs}) == "2 done, 1 failed"
    assert count_statuses({"runs": []}) == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\r\nb\nc\u2028d", "a ↵ b ↵ c ↵ d"),
        ("\x1b[2J\u202ex\x9b\0", "�[2J�x��"),
        ("é 电\t", "é 电\t"),
    ],
)
def test_a_line_that_a_terminal_obeys_nothing_of(text, line):
    assert one_line(text) == line
