"""Where this package lies: in a clone of its repository, or installed from a wheel, which has no
repository and holds conf/ and scripts/ inside the package. It knows folders alone.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = None if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = (REPOSITORY or PACKAGE) / "conf"
SCRIPTS = (REPOSITORY or PACKAGE) / "scripts"
