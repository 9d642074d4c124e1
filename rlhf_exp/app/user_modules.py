"""The user's own modules: the folders to import them from, and the message for a `_target_` that
cannot be imported. It knows nothing of what the modules hold.
"""

import sys
import traceback
from pathlib import Path
from typing import Any


def config_folders(hydra: Any) -> list[Path]:
    """The user's folders of groups, which --config-dir and hydra.searchpath name. `hydra` is
    Hydra's own configuration."""
    return [
        Path(source.path).absolute()
        for source in hydra.runtime.config_sources
        if source.schema == "file" and source.provider != "main"
    ]


def import_from_config_folders(hydra: Any) -> None:
    """Appends the user's folders of groups to the import path: a class can be imported from beside
    its option, and hides no module of a library."""
    sys.path += [str(path) for path in config_folders(hydra) if str(path) not in sys.path]


def import_problem(target: str, error: BaseException | None) -> str:
    """The reason that a target cannot be imported, in a line; `error` is Hydra's error."""
    cause = error.__cause__ if error else None
    if cause is None:
        return str(error).partition("\n")[0]
    missing = cause.name if isinstance(cause, ModuleNotFoundError) and cause.name else ""
    if "." not in missing and target.startswith(f"{missing}."):
        return (
            f"there is no module {missing} in {', '.join(_folders())} or among the packages of"
            f" {sys.prefix}; name the folder that holds it with --config-dir FOLDER"
        )
    if f"{target}.".startswith(f"{missing}."):
        module, _, name = missing.rpartition(".")
        file = getattr(sys.modules[module], "__file__", None)
        return f"{module}{f' ({file})' if file else ''} has no {name}"
    modules = [
        call for call in traceback.extract_tb(cause.__traceback__) if call.name == "<module>"
    ]
    place = f", at {modules[-1].filename}:{modules[-1].lineno}" if modules else ""
    return f"{type(cause).__name__}: {cause}{place}"


def _folders() -> list[str]:
    """The folders of the import path that belong neither to the interpreter nor to its packages."""
    interpreter = {sys.prefix, sys.base_prefix, sys.exec_prefix}
    folders = dict.fromkeys(Path(folder).absolute() for folder in sys.path)
    return [str(f) for f in folders if not any(f.is_relative_to(p) for p in interpreter)]
