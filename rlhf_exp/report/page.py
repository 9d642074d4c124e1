"""The report as one HTML file that needs nothing else: the payload, Plotly and the page's own code.

It knows how data gets into HTML without becoming HTML, and nothing of what the data means: that is
`assets/`.
"""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
# In the order in which they need each other.
SCRIPTS = ("base.js", "figures.js", "parameters.js", "tables.js", "page.js")


def write_page(payload: Mapping[str, Any], path: Path) -> Path:
    """Writes the report of a payload, whole or not at all; returns its path. Raises ValueError if
    the payload has a number that JSON has not (NaN, infinity)."""
    text = _page(payload)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, so that the file gets the permissions that the user's files get.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return path


def _page(payload: Mapping[str, Any]) -> str:
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    own = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    scripts = [f"\n{script}\n" for script in (get_plotlyjs(), "\n".join(own))]
    assert not any("</script" in script.lower() for script in scripts)
    return environment.get_template("page.html.j2").render(
        title=payload["title"],
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        policy=_content_policy(scripts),
        payload=_json(payload),
        scripts=scripts,
    )


def _json(payload: Mapping[str, Any]) -> str:
    """The payload as JSON in which no HTML can be recognized."""
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _content_policy(scripts: Sequence[str]) -> str:
    """What a browser lets the page do: run these scripts and no other, and ask no host for
    anything."""
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    # Plotly styles its figures as it draws them, and offers them as images.
    return (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
