"""Install those Debian packages that are missing, and show the progress; silent if none is missing.

    python3 scripts/apt_need.py PACKAGE...

The package lists that are there are good enough if every package is found and can be downloaded; else they are updated.
What was downloaded is not kept. Packages that were downloaded earlier stay.
"""

import os
import subprocess
import sys
from tempfile import TemporaryFile

_APT = ("apt-get", "-qq", "--yes", "--no-install-recommends", "-o", "APT::Keep-Downloaded-Packages=false")
_NO_CACHES = ("-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=")  # 75 MB that nobody needs afterwards
_STEPS = {"dlstatus": "downloading", "pmstatus": "installing"}  # apt's README.progress-reporting
_STRIDE = 20  # percent between two lines, if a line cannot be written over


class _Progress:
    """What apt does, in one line on a terminal, elsewhere in a few."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._shown = ("", -_STRIDE)

    def show(self, status: str) -> None:
        """Show a line of apt's status: `pmstatus:PACKAGE:PERCENT:TEXT`."""
        kind, _, rest = status.partition(":")
        percent = int(float(rest.split(":")[1])) if kind in _STEPS else -1
        step, last = self._shown
        if percent < 0 or (step == kind and percent < last + (1 if self._is_terminal else _STRIDE)):
            return
        self._shown = (kind, percent)
        text = f"make: Debian packages: {_STEPS[kind]}, {percent} %"
        print(*(("\r", text, "\033[K") if self._is_terminal else (text, "\n")), sep="", end="", flush=True)

    def end(self) -> None:
        """End the line."""
        if self._is_terminal and self._shown[0]:
            print(flush=True)


def main() -> int:
    """Return the exit code."""
    missing = [package for package in sys.argv[1:] if not _is_installed(package)]
    if not missing:
        return 0
    print("make: installing Debian packages:", *missing, flush=True)
    refused = _apt("install", *missing)  # installs nothing unless all is downloaded
    if refused:
        print("make: updating the lists of Debian packages", flush=True)
        refused = _apt("update") or _apt("install", *missing)
    if refused:
        print(f"make: apt-get install {' '.join(missing)} failed:\n{refused}", file=sys.stderr)
    return 1 if refused else 0


def _is_installed(package: str) -> bool:
    asked = ("dpkg-query", "--show", "--showformat", "${db:Status-Abbrev}", package)
    return subprocess.run(asked, capture_output=True, check=False).stdout.startswith(b"ii")


def _apt(*words: str) -> str:
    """Run apt-get; return what it says if it fails, else an empty string."""
    reader, writer = os.pipe()
    options = (*_APT, *_NO_CACHES, "-o", f"APT::Status-Fd={writer}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with TemporaryFile("w+") as said, open(reader) as statuses:
        apt = subprocess.Popen(
            (*options, *words), stdout=said, stderr=subprocess.STDOUT, pass_fds=[writer], env=environment
        )
        os.close(writer)
        progress = _Progress()
        for status in statuses:
            progress.show(status)
        progress.end()
        if not apt.wait():
            return ""
        said.seek(0)
        return said.read().strip() or f"exit code {apt.returncode}"


if __name__ == "__main__":
    sys.exit(main())
