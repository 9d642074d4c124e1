"""The report as one self-contained HTML file: the payload, Plotly and the page's own code.

It knows how to embed data safely in HTML; `assets/` knows what the data means.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.runs.files import write_whole

ASSETS = Path(__file__).parent / "assets"
# In the order of their dependencies.
SCRIPTS = ("base.js", "figures.js", "parameters.js", "tables.js", "between.js", "page.js")


def write_page(payload: Mapping[str, Any], path: Path) -> Path:
    """Writes the report of a payload atomically; returns its path. Raises ValueError if the payload
    has a NaN or an infinity, which JSON cannot hold."""
    write_whole(path, _page(payload))
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
    # For the filter tojson, so that HTML parsers read its JSON as plain text.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    sources = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    scripts = [f"\n{script}\n" for script in (get_plotlyjs(), "\n".join(sources))]
    assert not any("</script" in script.lower() for script in scripts)
    return environment.get_template("page.html.j2").render(
        title=payload["title"],
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        policy=_content_policy(scripts),
        payload=payload,
        scripts=scripts,
    )


def _content_policy(scripts: Sequence[str]) -> str:
    """The page's Content-Security-Policy: it runs only these scripts and sends no requests."""
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    # Plotly uses inline styles, and offers its figures as images.
    return (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
