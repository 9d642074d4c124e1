"""Gather the pages of the site: those of docs/, two of the repository's own, and the reference of
keys, which is generated from the configuration and the docstrings of the fields.

    python -m tests.docs_pages FOLDER
"""

import argparse
import dataclasses
import re
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.utils import get_class
from pydantic.fields import FieldInfo

from tests.conf_comments import CONF, docstrings

ROOT = CONF.parent
OF_THE_REPOSITORY = ("SECURITY.md", "CONTRIBUTING.md")
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
PLAIN = {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}
HEAD = "| key | meaning | default | takes |\n| --- | --- | --- | --- |"


def gather(folder: Path) -> None:
    """Writes all pages and their pictures to the folder, their links as they are there."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder)
    for name in OF_THE_REPOSITORY:
        shutil.copy(ROOT / name, folder / name.lower())
    for page in folder.glob("*.md"):
        text = page.read_text(encoding="utf-8").replace("](docs/", "](")
        for name in OF_THE_REPOSITORY:
            text = re.sub(rf"\]\((?:\.\./)?{re.escape(name)}", f"]({name.lower()}", text)
        page.write_text(text, encoding="utf-8")
    (folder / "keys.md").write_text(keys_page(), encoding="utf-8")


def keys_page() -> str:
    """The reference of keys. Raises ValueError naming a key without documentation."""
    sections = ["# Configuration keys", (
        "Every key of the configuration, by group. `GROUP=OPTION` on the command line chooses an"
        " option, and `KEY=VALUE` sets a key. The defaults are those of the classes; an option or"
        " an experiment may set another, and `.venv/bin/python train.py --cfg job` prints what"
        " holds. The files themselves are in `conf/`."
    ), *_run_section()]  # fmt: skip
    for group in _groups():
        sections += _group_section(group)
    return "\n\n".join(sections) + "\n"


def _groups() -> list[str]:
    """The groups in the order of config.yaml, each followed by those nested in it."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    chosen = [next(iter(entry)) for entry in entries if isinstance(entry, dict)]
    top = [group for group in chosen if (CONF / group).is_dir()]
    nested = {group: sorted(path.name for path in (CONF / group).iterdir() if path.is_dir())
              for group in top}  # fmt: skip
    return [name for group in top for name in (group, *(f"{group}/{n}" for n in nested[group]))]


def _run_section() -> Iterator[str]:
    lines = (CONF / "config.yaml").read_text(encoding="utf-8").splitlines()
    matches = [re.fullmatch(r" *(\w+): (.*?) +# (.*)", line) for line in lines]
    comments = {match[1]: match for match in matches if match}
    yield "## The run"
    rows = ["| key | meaning | default |\n| --- | --- | --- |"]
    content = yaml.safe_load("\n".join(lines))
    content = {key: value for key, value in content.items() if key not in ("defaults", "hydra")}
    for key in [*content.keys() - {"logger"}, *(f"logger.{key}" for key in content["logger"])]:
        match = comments.get(key.rpartition(".")[2])
        if match is None:
            raise ValueError(f"{key}: needs a comment in conf/config.yaml")
        rows.append(f"| `{key}` | {_cell(match[3])} | `{match[2]}` |")
    yield "\n".join([rows[0], *sorted(rows[1:])])


def _group_section(group: str) -> Iterator[str]:
    """The options of a group, then the keys of each of their classes."""
    options = sorted((CONF / group).glob("*.yaml"))
    texts = {path.stem: path.read_text(encoding="utf-8") for path in options}
    yield f"## {group}"
    rows = [f"| `{group}={name}` | {_cell(_header(text))} |" for name, text in texts.items()]
    yield "\n".join(["| option | |\n| --- | --- |", *rows])
    classes: dict[type, list[str]] = {}
    for name, text in texts.items():
        target = yaml.safe_load(text).get("_target_")
        if target:
            classes.setdefault(get_class(target), []).append(name)
    for kind, names in classes.items():
        rows = list(key_rows(kind, group.replace("/", ".")))
        if rows:
            yield f"### {kind.__name__}\n\nOf " + ", ".join(f"`{group}={n}`" for n in names) + "."
            yield "\n".join([HEAD, *rows])


def _header(text: str) -> str:
    """The comment at the head of an option's file that says what it is."""
    comments = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    sentences = [c for c in comments if not c.startswith(("@package", "python train.py"))]
    return " ".join(sentences[: 1 if "@package" not in text else None])


def key_rows(kind: type, path: str) -> Iterator[str]:
    """A row of the table for each field of a settings class, which stands at `path` in the
    configuration. Raises ValueError for a field without a docstring."""
    docs, hints = docstrings(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        key, default = f"{path}.{field.name}", field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if (CONF / path.replace(".", "/") / field.name).is_dir():
            continue  # a group with a section of its own
        if dataclasses.is_dataclass(default):
            yield from key_rows(type(default), key)
            continue
        shown = "required" if default is dataclasses.MISSING else f"`{_plain(default)}`"
        if field.name not in docs:
            raise ValueError(f"{key}: the field of {kind.__name__} needs a docstring")
        yield f"| `{key}` | {_cell(docs[field.name])} | {shown} | {takes(hints[field.name])} |"


def _plain(value: Any) -> str:
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, width=999)
    return text.removesuffix("\n").removesuffix("\n...")


def takes(hint: Any) -> str:
    """What values a field of this type takes."""
    arguments = get_args(hint)
    if get_origin(hint) is Annotated:
        fields = [m for m in arguments[1:] if isinstance(m, FieldInfo)]
        limits = [f"{BOUNDS[name]} {getattr(bound, name):g}" for f in fields for bound in f.metadata
                  for name in BOUNDS if hasattr(bound, name)]  # fmt: skip
        return " ".join([takes(arguments[0]), ", ".join(limits)]).strip()
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(takes(argument) for argument in arguments)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if get_origin(hint) in (list, tuple):
        return f"list of {takes(arguments[0])}"
    return "`null`" if hint is type(None) else PLAIN.get(hint, "group")


def _cell(text: str) -> str:
    """The text as Markdown of a cell, in which only backticks have a meaning."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<\[])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def main() -> None:
    """Reads the folder and fills it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="is emptied first")
    gather(parser.parse_args().folder)


if __name__ == "__main__":
    main()
