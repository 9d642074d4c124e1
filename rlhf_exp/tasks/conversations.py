"""Messages as data: read from rows of files, compared, and shown in tables.

Knows roles and contents, not chat templates.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.protocol import Conversation
from rlhf_exp.tasks.text_files import check_unicode

ANSWERS = "assistant"
ROLES = ("system", "user", ANSWERS, "tool", "developer")
CALLS = ("tool_calls", "function_call")  # keys of a message that are not supported


def read_message(message: Any, what: str) -> dict[str, str]:
    """Role and content only: Arrow gives every message the keys of all messages. Raises ConfigError
    that begins with `what` for a malformed message."""
    is_valid = (
        isinstance(message, Mapping)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
        and not any(message.get(name) for name in CALLS)
    )
    if not is_valid:
        raise ConfigError(
            f"{what} holds the message {reprlib.repr(message)}; give role (one of"
            f" {', '.join(ROLES)}), content (a text) and no {' or '.join(CALLS)}"
        )
    return {"role": message["role"], "content": check_unicode(message["content"], what)}


def prompt_key(prompt: str | Conversation) -> str:
    """A text that only an equal prompt has: the text itself, or the messages in Python's form."""
    return prompt if isinstance(prompt, str) else repr(prompt)


def prompt_text(prompt: str | Conversation) -> str:
    """A prompt to read in tables: the text itself, or a line for each message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
