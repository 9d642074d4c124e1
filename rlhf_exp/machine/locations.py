"""Where this package lies: in a clone of its repository, or installed from a wheel, which has no
repository and holds conf/ and scripts/ inside the package. It knows folders alone.
"""

import os
import shlex
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = None if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = (REPOSITORY or PACKAGE) / "conf"
SCRIPTS = (REPOSITORY or PACKAGE) / "scripts"


def script_command(name: str, *words: str) -> str:
    """A command to paste into a shell, which runs a script of this copy."""
    if REPOSITORY:
        return shlex.join(["python", os.path.relpath(SCRIPTS / f"{name}.py"), *words])
    return shlex.join([sys.executable, "-m", f"{PACKAGE.name}.scripts.{name}", *words])
