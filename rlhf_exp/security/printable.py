"""Text of models and strangers as a terminal may show it: it is only read, never obeyed."""

import re

# Controls but for tabs and ends of lines, and marks that turn the direction of what follows.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with nothing that a terminal obeys (colours, titles, links, moves of its cursor) or
    that hides or turns what follows: U+FFFD stands for it. Lines stay lines."""
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
