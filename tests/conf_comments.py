"""Write comments and missing keys of the options in conf/ from the fields of their classes.

    python -m tests.conf_comments

A field's docstring is its key's comment. A value in a file stays; a field without a key gets one
with the class's default. Options that begin from another one stay as they are. Run it after a
field or its docstring has changed.
"""

import argparse
import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class

CONF = Path(__file__).resolve().parents[1] / "conf"
KEY = re.compile(r"(?P<start> *(?P<key>\w+):[^#]*?) *(?<=[: ])?( #.*)?")
COLUMN = 32


def options() -> list[Path]:
    """The files in conf/ that have a key for each field of a class."""
    files = [*sorted(CONF.glob("*/*.yaml")), *sorted(CONF.glob("stage/*/*.yaml"))]
    return [path for path in files if "\n_target_: " in path.read_text(encoding="utf-8")]


def written(option: Path) -> str:
    """What the option's file has to be."""
    text = option.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    kind = get_class(content["_target_"])
    chosen = [entry for entry in content.get("defaults", []) if isinstance(entry, dict)]
    there = {*content}.union(*chosen)
    missing = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in there}
    return "\n".join(_commented([*text.splitlines(), *_plain(missing)], kind)) + "\n"


def _plain(values: dict[str, Any]) -> list[str]:
    plain = {
        name: "???" if value is dataclasses.MISSING
        else dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
    }  # fmt: skip
    return yaml.safe_dump(plain, sort_keys=False).splitlines() if plain else []


def _commented(lines: list[str], kind: type) -> list[str]:
    docs = docstrings(kind)
    nested: dict[str, str] = {}
    result = []
    for line in lines:
        match = KEY.fullmatch(line)
        indented = line.startswith(" ")
        if match and not indented:
            default = {f.name: f.default for f in dataclasses.fields(kind)}.get(match["key"])
            nested = docstrings(type(default)) if dataclasses.is_dataclass(default) else {}
        doc = (nested if indented else docs).get(match["key"]) if match else None
        result.append(f"{match['start']:<{COLUMN - 1}} # {doc}" if match and doc else line)
    return result


def docstrings(kind: type) -> dict[str, str]:
    """The docstrings of a class's fields, those it inherits included, as comments."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            [definition] = ast.parse(inspect.getsource(base)).body
            for field, text in zip(definition.body, definition.body[1:], strict=False):
                match field, text:
                    case (ast.AnnAssign(target=ast.Name(id=name)),
                          ast.Expr(value=ast.Constant(value=str(doc)))):  # fmt: skip
                        doc = " ".join(doc.split()).removesuffix(".")
                        docs[name] = (
                            doc[:1].lower() + doc[1:]
                            if doc[1:2] == " " or doc[1:2].islower()
                            else doc
                        )
    return docs


def main() -> None:
    """Writes every option."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for option in options():
        option.write_text(written(option), encoding="utf-8")


if __name__ == "__main__":
    main()
