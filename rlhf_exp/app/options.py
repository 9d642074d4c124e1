"""What the files of conf/, and of the user's folders, say about groups, options and keys.

It reads files and comments; it composes nothing and builds nothing.
"""

import contextlib
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig

from rlhf_exp.app.user_modules import config_folders
from rlhf_exp.machine.locations import CONF
from rlhf_exp.settings import ConfigError

COMMENTS = "--comments"
WIDTH = 79
INTERNAL = "# Internal: "  # begins the comment of an option that no user chooses by hand
PURPOSE = re.compile(r"^(?:  - )?(\w+): .*?# (.*)$", re.MULTILINE)


def list_groups() -> str:
    """What each group is for, and its options: yours (from --config-dir), published, internal."""
    ours, yours = _options(CONF), _options(*_user_folders())
    lines = []
    for group in sorted(ours | yours):
        texts = {file.stem: _read(file) for file in ours.get(group, [])}
        options = {
            # Hydra takes the first file of a name, which is ours.
            "yours": [file.stem for file in yours.get(group, []) if file.stem not in texts],
            "published": [name for name, text in texts.items() if INTERNAL not in text],
            "internal": [name for name, text in texts.items() if INTERNAL in text],
        }
        lines += textwrap.wrap(f"{group}: {_purpose(group)}", WIDTH, subsequent_indent="    ")
        for kind, names in options.items():
            head, margin = f"  {kind:<9}  ", " " * 13
            text = ", ".join(names)
            lines += textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=margin)
    return "\n".join(lines)


def _options(*folders: Path) -> dict[str, list[Path]]:
    """The files of each group in the folders."""
    options: dict[str, list[Path]] = {}
    for folder in folders:
        for file in sorted([*folder.glob("[!.]*/*.yaml"), *folder.glob("[!.]*/[!.]*/*.yaml")]):
            options.setdefault(file.parent.relative_to(folder).as_posix(), []).append(file)
    return {group: files for group, files in options.items() if not group.startswith("hydra/")}


def _purpose(group: str) -> str:
    """The comment on the group's line in config.yaml, or in the option that chooses from it."""
    parent, _, name = group.rpartition("/")
    lines = "\n".join(_read(file) for file in (CONF / parent).glob("*.yaml"))
    return dict(PURPOSE.findall(lines)).get(name, "")


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _user_folders() -> list[Path]:
    return config_folders(HydraConfig.get()) if HydraConfig.initialized() else []


def print_commented(main: Callable[[], None]) -> None:
    """Has `--cfg job` print the comment of each key after its value. Raises ConfigError without
    --cfg."""
    sys.argv.remove(COMMENTS)
    if not any(word.partition("=")[0] in ("--cfg", "-c") for word in sys.argv):
        raise ConfigError(f"{COMMENTS} is for printing the configuration: add --cfg job")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main()
    print(with_comments(output.getvalue(), [CONF, *_user_folders()]), end="")


def with_comments(text: str, folders: Sequence[Path]) -> str:
    """A configuration in YAML with the comment of each key after its value. A key has the comment
    that it has in config.yaml, or in an option with the `_target_` of the mapping around it."""
    main = CONF / "config.yaml"
    comments = {("", key): purpose for key, purpose in PURPOSE.findall(_read(main))}
    for file in [main, *(file for files in _options(*folders).values() for file in files)]:
        content = _read(file)
        lines = content.splitlines()
        with contextlib.suppress(yaml.YAMLError):  # an option that is not chosen may be broken
            for key in _keys(yaml.compose(content)):
                comment = lines[key.line][key.column :].partition("# ")[2]
                if comment and (key.places[-1][0] or file == main):
                    comments.setdefault(key.places[-1], comment)
    lines = text.splitlines()
    for key in _keys(yaml.compose(text)):
        comment = next((comments[place] for place in key.places if place in comments), "")
        if comment and key.column >= len(lines[key.line]):
            lines[key.line] = f"{lines[key.line]:<31} # {comment}"
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class _Key:
    """A key of a YAML document: the place of its comment, and the key's path from the root and from
    each mapping around it that has a `_target_`, as (target, path), the innermost last."""

    line: int
    column: int
    places: Sequence[tuple[str, str]]


def _keys(
    node: yaml.Node | None, places: Sequence[tuple[str, str]] = (("", ""),)
) -> Iterator[_Key]:
    if not isinstance(node, yaml.MappingNode):
        return
    targets = [value.value for key, value in node.value if key.value == "_target_"]
    places = [*places, *((target, "") for target in targets)]
    for key, value in node.value:
        paths = [(target, f"{path}.{key.value}".lstrip(".")) for target, path in places]
        is_text = isinstance(value, yaml.ScalarNode)
        is_block = value.style in ("|", ">") if is_text else not value.flow_style
        end = key.end_mark if is_block else value.end_mark
        yield _Key(line=end.line, column=end.column + is_block, places=paths)
        yield from _keys(value, paths)
