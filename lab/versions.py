"""Another version of gangway: a copy of this one that differs by its number, for tests of an upgrade."""

import re
import shutil
import sysconfig
import venv
from pathlib import Path

import gangway


def installed(folder: Path, release: str) -> Path:
    """Install gangway with another version's number in an environment of its own; return its command."""
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    copied = site / "gangway"
    shutil.copytree(Path(gangway.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    version = copied / "__init__.py"
    version.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{release}"', version.read_text()))
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # what gangway needs
    command = folder / "bin/gangway"
    command.write_text(f"#!{folder}/bin/python3\nfrom gangway.cli import main\nmain()\n")
    command.chmod(0o755)
    return command
