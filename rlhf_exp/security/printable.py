"""Makes text from models and files safe to print: a terminal must not execute anything in it."""

import re

# Control characters except tab and newline, and marks that change the direction of text.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with U+FFFD for every character that a terminal executes (colours, titles, links,
    cursor moves) or that hides or reverses text. Newlines stay."""
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
