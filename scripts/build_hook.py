"""Compiles the launcher and the relay's data plane for a wheel, writes the manual pages (both by compile.mk), and says
which machines it is for.

The wheel fits every Python 3, as nothing in it is compiled against Python, and every Linux whose glibc is at least as
new as this machine's (PEP 600).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPLETIONS = {
    "gangway.bash": "bash-completion/completions/gangway",
    "_gangway": "zsh/site-functions/_gangway",
    "gangway.fish": "fish/vendor_completions.d/gangway.fish",
}
"""The shells' files of completion, and where each shell looks for them in a prefix's share/."""
_COMPILERS = {"make": "make", "gcc": "gcc libc6-dev", "musl-gcc": "musl-tools"}


class CompiledParts(BuildHookInterface[BuilderConfig]):
    """The hook that hatchling calls before it builds a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and add what was compiled.  An editable installation gets it by `make build`."""
        if version == "editable":
            return
        missing = [program for program in _COMPILERS if not shutil.which(program)]
        if missing:
            packages = " ".join(_COMPILERS[program] for program in missing)
            self.app.abort(f"gangway cannot be built without {', '.join(missing)}: apt-get install {packages}")
        command = ("make", "--silent", "--file=compile.mk", f"PYTHON={sys.executable}", "compiled", "man")
        if subprocess.run(command, cwd=self.root, check=False).returncode:
            self.app.abort("gangway cannot be built: the compiler's messages are above")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"
        build_data["shared_scripts"]["build/gangway-docker-proxy"] = "gangway-docker-proxy"
        for unit in sorted(Path(self.root, "systemd").glob("gangway*")):
            build_data["shared_data"][f"systemd/{unit.name}"] = f"share/gangway/systemd/{unit.name}"
        for page in sorted(Path(self.root, "build/man").glob("man?/*")):
            build_data["shared_data"][str(page)] = f"share/man/{page.parent.name}/{page.name}"
        for name, target in COMPLETIONS.items():
            build_data["shared_data"][f"packaging/completions/{name}"] = f"share/{target}"


def _platform() -> str:
    machine = sysconfig.get_platform().removeprefix("linux-").replace("-", "_")
    try:
        library, _, release = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except ValueError:  # musl does not know this name
        library = ""
    return f"manylinux_{release.replace('.', '_')}_{machine}" if library == "glibc" else f"linux_{machine}"
