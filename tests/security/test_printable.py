"""What a model says is shown in a terminal and not obeyed by it."""

import io
import logging

import pytest
from rich.console import Console

from rlhf_exp.report.continuations import side_by_side
from rlhf_exp.report.talk import Talk
from rlhf_exp.security.printable import printable
from rlhf_exp.security.redaction import Scrubbing
from rlhf_exp.stages.pair_data import print_pairs
from rlhf_exp.tracking.curves import print_before_after
from tests.rl.toy import saved_model

# A colour, a title, a link, a cleared screen, the same with C1 controls, a bell, a turned name.
OBEYED = (
    "\x1b[31m\x1b]0;mine\x07\x1b]8;;http://evil\x1b\\\x1b[2J\x9b31m\x9d0;x\x9c\r\b\x7f\u202egpj.exe"
)


def assert_harmless(text: str) -> None:
    assert not {c for c in text if ord(c) < 32 and c not in "\n\t"}
    assert not {*"\x7f\x9b\x9c\x9d\u202e"} & {*text}


def test_what_a_terminal_obeys_is_replaced_and_the_rest_stays():
    assert_harmless(printable(OBEYED))
    assert printable("a\x1b[31mb") == "a\ufffd[31mb"
    for text in ("tab\there", "two\nlines", "na\u00efve \u2192 \U0001f600", ""):
        assert printable(text) == text
    assert printable("two\r\nlines") == "two\nlines"


@pytest.mark.parametrize("mark", "\u200b\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
def test_a_mark_that_hides_or_turns_text_is_replaced(mark: str) -> None:
    assert printable(f"a{mark}b") == "a\ufffdb"


def test_tables_of_completions_and_pairs_obey_none():
    out = io.StringIO()
    console = Console(file=out, width=200)
    row = {"prompt": OBEYED, "completion": OBEYED, "score": 1.0}
    print_before_after([row], [row], console)
    pair = {"prompt": OBEYED, "chosen": OBEYED, "rejected": OBEYED}
    print_pairs([{**pair, "chosen_score": 1.0, "rejected_score": 0.0}], console)
    console.print(side_by_side([OBEYED], [OBEYED], [OBEYED]))
    assert "gpj.exe" in out.getvalue()
    assert_harmless(out.getvalue())


def test_log_lines_obey_none():
    record = logging.LogRecord("x", logging.ERROR, "", 1, "the judge says %s", (OBEYED,), None)
    assert_harmless(Scrubbing(logging.Formatter("%(message)s")).format(record))


def test_a_talk_obeys_none(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    talk = Talk(saved_model(tmp_path).base_model, temperature=0.0, seed=0)
    monkeypatch.setattr(talk._tokenizer, "decode", lambda *_, **__: OBEYED + " ")
    talk.answer("w0", max_new_tokens=2)
    said = capsys.readouterr().out
    assert "gpj.exe" in said
    assert_harmless(said)
