"""iptables-restore(8) and iptables-save(8): how rules get into the kernel, and how those there are read.

iptables-restore makes a transaction of each table; so what it was that failed, and what was there before, is its
caller's to know.
"""

import shutil
import subprocess
from collections.abc import Collection

from gangway.errors import HostRefused, Unsupported


class Iptables:
    """iptables-restore and iptables-save of a family, of whatever variant (nft or legacy) the host has set up."""

    def __init__(self, family: int) -> None:
        name = {4: "iptables", 6: "ip6tables"}[family]
        self._save, self._restore = f"{name}-save", f"{name}-restore"
        self._command = name
        for program in (self._save, self._restore):
            if shutil.which(program) is None:
                raise Unsupported(f"iptables cannot be used: there is no {program} (Debian: iptables)")

    def apply(self, text: str) -> None:
        """One call.  HostRefused: the table that failed, and those after it, were not changed."""
        self._run(self._restore, "--noflush", "--wait", feed=text)

    def listing(self, tables: Collection[str]) -> str:
        """What iptables-save says of some tables."""
        return "".join(self._run(self._save, "-t", table) for table in tables)

    @property
    def is_legacy(self) -> bool:
        """The variant that has tables of its own, apart from nftables'."""
        return "legacy" in self._run(self._command, "--version")

    def policy(self) -> str:
        """The policy of FORWARD: ACCEPT or DROP."""
        return self._run(self._command, "--wait", "-S", "FORWARD").split()[2]

    def set_policy(self, policy: str) -> None:
        """Sets it."""
        self._run(self._command, "--wait", "-P", "FORWARD", policy)

    def _run(self, *words: str, feed: str = "") -> str:
        done = subprocess.run(words, input=feed, text=True, capture_output=True, check=False)
        if done.returncode:
            raise HostRefused(f"{words[0]}: {_first_line(done.stderr)}")
        return done.stdout


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return lines[0] if lines else "refused"
