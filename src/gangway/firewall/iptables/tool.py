"""iptables-restore(8) and iptables-save(8): write rules to the kernel, and read them.

iptables-restore carries out a transaction for each table.  If one fails, the caller has to undo those before it.

Every program that changes legacy iptables' rules takes the same lock (iptables(8), --wait), and one that hangs keeps it
from all others.  So a change waits for it for a limited time.  Rules and policies are read by iptables-save, which
needs no lock.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gangway.errors import HostRefused, TimedOut, Unsupported

_LOCK_S = 3  # how long to wait for the lock
_LIMIT_S = 10.0  # how long a tool may take: longer than the lock, and than 10,000 rules on a slow machine
_LOCK_FILE = "/run/xtables.lock"  # iptables/xshared.h: or what the environment's XTABLES_LOCKFILE says
_RESOURCE_PROBLEM = 4  # include/xtables.h, enum xtables_exittype: also if the lock is held
# The kernel loads all modules that iptables needs but this one, which the legacy variant would load, with the privilege
# (libxtables/xtables.c, xtables_load_ko).  Without, it asks: libiptc/libip4tc.c, iptc_strerror.
_MODULES, _MISSING = {4: "ip_tables", 6: "ip6_tables"}, "do you need to insmod?"


class Iptables:
    """The tools of a family, of whatever variant (nft or legacy) the host uses, or of one.  Unsupported: not installed.

    `variant` is what the names of another variant's programs have after `iptables`: `-nft` or `-legacy`.
    """

    def __init__(self, family: int, variant: str = "") -> None:
        self.family, self.is_usual = family, not variant
        self.command = {4: "iptables", 6: "ip6tables"}[family] + variant
        self._save, self._restore = f"{self.command}-save", f"{self.command}-restore"
        for program in (self._save, self._restore):
            if shutil.which(program) is None:
                raise Unsupported(f"iptables cannot be used: {program} is not installed (Debian: iptables)")

    def apply(self, text: str) -> None:
        """Feed iptables-restore.  HostRefused: tables before the one that failed may have been changed."""
        self._run(self._restore, "--noflush", f"--wait={_LOCK_S}", feed=text)

    def listing(self, table: str | None = None) -> str:
        """Return what iptables-save prints of a table, or of all tables that there are."""
        return self._run(self._save, *(() if table is None else ("-t", table)))

    @property
    def is_legacy(self) -> bool:
        """True for the variant that has tables of its own, separate from nftables'."""
        return "legacy" in self._run(self.command, "--version")

    def policy(self) -> str:
        """Return the policy of FORWARD: ACCEPT or DROP."""
        heads = [line.split() for line in self.listing("filter").splitlines() if line.startswith(":FORWARD ")]
        return heads[0][1] if heads else "ACCEPT"  # nft's variant has no chain yet

    def set_policy(self, policy: str) -> None:
        self._run(self.command, f"--wait={_LOCK_S}", "-P", "FORWARD", policy)

    def _run(self, *words: str, feed: str = "") -> str:
        try:
            done = subprocess.run(words, input=feed, text=True, capture_output=True, check=False, timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise TimedOut(f"{words[0]} timed out after {_LIMIT_S:.0f} s and was ended") from None
        except OSError as error:
            raise HostRefused(f"{words[0]} failed to start: {error.strerror}") from None
        if done.returncode == _RESOURCE_PROBLEM and "lock" in done.stderr:
            raise TimedOut(f"{words[0]} timed out after {_LOCK_S} s: {_held(_lock_file())}; end it, or try again later")
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("#")]
            is_name = len(lines) > 1 and lines[0].endswith(":")  # nft's variant: the reason is on the next line
            reason = lines[is_name] if lines else "refused"
            if _MISSING in reason:
                module = _MODULES[self.family]
                reason = f"the kernel module {module} is not loaded: modprobe {module}, and add it to /etc/modules"
            raise HostRefused(f"{words[0]}: {reason}")
        return done.stdout


def all_tools() -> Iterator[Iptables]:
    """Yield the tools of both families: of the host's usual variant, and of the other one, as far as installed."""
    for family in (4, 6):
        with suppress(Unsupported):
            usual = Iptables(family)
            yield usual
            yield Iptables(family, "-nft" if usual.is_legacy else "-legacy")


def _lock_file() -> Path:
    return Path(os.environ.get("XTABLES_LOCKFILE", _LOCK_FILE))


def _held(lock: Path) -> str:
    """Name the program that holds a lock, as far as that can be seen: proc_locks(5)."""
    with suppress(OSError):
        inode = lock.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, *_, pid, place, _, _ = line.split()
            if kind == "FLOCK" and int(place.rpartition(":")[2]) == inode and int(pid) > 0:
                return f"{Path('/proc', pid, 'comm').read_text().strip()} (pid {pid}) holds the lock {lock}"
    return f"another program holds the lock {lock}"
