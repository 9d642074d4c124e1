"""Messages: prompts are told apart by all that is in them, and can be read in a table."""

from rlhf_exp.tasks.conversations import prompt_key, prompt_text, read_message

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def test_equal_prompts_alone_have_equal_keys():
    others = ["Why?", ASKED[1:], [ASKED[1], ASKED[0]], [ASKED[0], {**ASKED[1], "role": "tool"}]]
    keys = [prompt_key(prompt) for prompt in (ASKED, *others)]
    assert len({*keys}) == 5
    assert prompt_key([dict(message) for message in ASKED]) == keys[0]
    assert prompt_key("Why?") == "Why?"


def test_a_prompt_is_shown_with_a_line_for_each_message():
    assert prompt_text(ASKED) == "system: Be brief.\nuser: Why?"
    assert prompt_text("Why?\n") == "Why?\n"


def test_of_a_message_role_and_content_are_read():
    # A key that other messages have is None in Arrow's rows.
    given = {"tool_calls": None, "content": "Why?", "name": "x", "role": "user"}
    assert read_message(given, "row 1") == ASKED[1]
