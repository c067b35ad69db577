"""iptables-restore(8) and iptables-save(8): write rules to the kernel, and read them.

iptables-restore carries out a transaction for each table.  If one fails, the caller has to undo those before it.
"""

import shutil
import subprocess
from collections.abc import Collection

from gangway.errors import HostRefused, Unsupported


class Iptables:
    """The tools of a family, of whatever variant (nft or legacy) the host uses.  Unsupported: not installed."""

    def __init__(self, family: int) -> None:
        self.command = {4: "iptables", 6: "ip6tables"}[family]
        self._save, self._restore = f"{self.command}-save", f"{self.command}-restore"
        for program in (self._save, self._restore):
            if shutil.which(program) is None:
                raise Unsupported(f"iptables cannot be used: {program} is not installed (Debian: iptables)")

    def apply(self, text: str) -> None:
        """Feed iptables-restore.  HostRefused: the table that failed, and those after it, were not changed."""
        self._run(self._restore, "--noflush", "--wait", feed=text)

    def listing(self, tables: Collection[str]) -> str:
        """Return what iptables-save prints of some tables."""
        return "".join(self._run(self._save, "-t", table) for table in tables)

    @property
    def is_legacy(self) -> bool:
        """True for the variant that has tables of its own, separate from nftables'."""
        return "legacy" in self._run(self.command, "--version")

    def policy(self) -> str:
        """Return the policy of FORWARD: ACCEPT or DROP."""
        return self._run(self.command, "--wait", "-S", "FORWARD").split()[2]

    def set_policy(self, policy: str) -> None:
        self._run(self.command, "--wait", "-P", "FORWARD", policy)

    def _run(self, *words: str, feed: str = "") -> str:
        done = subprocess.run(words, input=feed, text=True, capture_output=True, check=False)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("#")]
            raise HostRefused(f"{words[0]}: {lines[0] if lines else 'refused'}")
        return done.stdout
