"""Files as crashes, disks and people leave them: what hypothesis draws for readers."""

import json
from typing import Any

from hypothesis import strategies as st

# Bytes that readers have stumbled over: what is no UTF-8, NUL, byte-order marks, ends of lines that
# are none, depth, digits without end, numbers that are none, half of a character.
NASTY = (
    b"\xff", b"\x00", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b"\xe2\x80\xa8", b"\xc2\x85",
    b"[" * 10_000, b'{"a":' * 5_000, b"9" * 5000, b"1e999", b"NaN", b"-Infinity", b'"\\ud800"',
    b"null", b"true", b"{}", b"[]", b'"', b"\t", b",", b"\\", b"-1", b"0.0000001", b"{",
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, real: bytes) -> bytes:
    """A real file cut, with bits flipped, with parts left out, doubled or replaced by what is
    nasty; now and then what is nasty alone, or bytes that were never a file."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(NASTY) | st.binary(max_size=200))
    content = real
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        to = draw(st.integers(at, min(len(content), at + 60)))
        how = draw(st.sampled_from(["cut", "flip", "drop", "double", "insert", "replace"]))
        nasty = draw(st.sampled_from(NASTY))
        if how == "cut":
            content = content[:at]
        elif how == "flip" and at < len(content):
            flipped = bytes([content[at] ^ (1 << draw(st.integers(0, 7)))])
            content = content[:at] + flipped + content[at + 1 :]
        elif how == "drop":
            content = content[:at] + content[to:]
        elif how == "double":
            content = content[:to] + content[at:]
        elif how == "insert":
            content = content[:at] + nasty + content[at:]
        else:
            content = content[:at] + nasty + content[to:]
    return content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["done", "failed", "running", 10**400, "\ud800", "../../x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def mistyped(draw: st.DrawFn, real: Any) -> bytes:
    """JSON of the right form but for one value somewhere, which is anything."""
    return json.dumps(_replaced(draw, real)).encode()


def _replaced(draw: st.DrawFn, value: Any) -> Any:
    if not value or not isinstance(value, dict | list) or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    place = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    changed = value.copy()
    changed[place] = _replaced(draw, value[place])
    return changed
