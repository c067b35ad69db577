"""The dockerd that runs in this network namespace: its process, what its API says, and the settings that it uses.

dockerd reads `iptables`, `ip6tables` and `userland-proxy` at its start only, and its API does not show them.  But the
default bridge's `enable_ip_masquerade` does: without `iptables` it is false, whatever was wanted (20.10 to 29).
"""

import asyncio
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gangway.peers import peer_credentials

_LIMIT_S = 5.0
_READ_S = 0.1  # how long after its start dockerd reads its settings; both times are rounded, too
_MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
_TRUE, _FALSE = {"1", "t", "T", "true", "TRUE", "True"}, {"0", "f", "F", "false", "FALSE", "False"}  # Go: ParseBool


class Process(NamedTuple):
    """A dockerd."""

    pid: int
    flags: Mapping[str, str]  # of its command line; switches are `true` or `false`
    folder: Path  # the working directory, which relative paths start from
    unit: str  # systemd's name of it; empty if it was not started by systemd
    started_s: float  # in seconds since 1970

    @property
    def config_file(self) -> Path | None:
        """Its settings file, if a flag names one."""
        return self.folder / self.flags["config-file"] if self.flags.get("config-file") else None

    def __str__(self) -> str:
        return f"dockerd (pid {self.pid})"


class Engine(NamedTuple):
    """What dockerd's API says."""

    version: str
    pid: int  # of the process that listens: systemd's if it has passed the socket on
    is_swarm: bool
    is_live_restoring: bool  # containers go on while it restarts
    masquerades: bool | None  # on the default bridge; None if it has none


def read_engine(path: str) -> Engine:
    """Ask the API at a socket, in a thread that has no event loop.  HostRefused: why it cannot be read."""
    return asyncio.run(_read_engine(path))


def find_process(pid: int = 0) -> Process | None:
    """Return the dockerd with this pid, or else one that runs in our network namespace; None if there is none."""
    for candidate in (pid, *_pids()):
        with suppress(OSError, IndexError):  # it has ended
            if _is_dockerd(candidate):
                return _process(candidate)
    return None


def parse_flags(words: Sequence[str]) -> dict[str, str]:
    """Return the long flags of a command line, which have one of three forms: --name=value, --name value, --name."""
    found = {}
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if word.startswith("--"):
            name, is_given, value = word[2:].partition("=")
            if not is_given:
                value = "true" if following.startswith("-") else following
            found[name] = "true" if value in _TRUE else "false" if value in _FALSE else value
    return found


def in_use(
    key: str, default: bool, process: Process, settings: Mapping[str, Any], changed_s: float, engine: Engine | None
) -> bool | None:
    """Return how a switch is set in a process that runs; None if that cannot be told.

    `settings` are the file's, which was last changed at `changed_s`: perhaps after the process had read it.
    """
    if process.flags.get(key) in ("true", "false"):
        return process.flags[key] == "true"
    if key == "iptables" and engine is not None and engine.masquerades is not None:
        is_off_anyway = "false" in (process.flags.get("ip-masq"), str(settings.get("ip-masq")).lower())
        if engine.masquerades or not is_off_anyway:
            return engine.masquerades
    return settings.get(key, default) is not False if changed_s < process.started_s + _READ_S else None


async def _read_engine(path: str) -> Engine:
    from gangway.docker.client import DockerClient  # an HTTP client, which few daemons need

    async with DockerClient(path, _LIMIT_S) as client:
        info, networks = await client.info(), await client.networks()
    options = next((one.options or {} for one in networks if one.name == "bridge"), {})
    switch = options.get(_MASQUERADE)
    return Engine(
        info.version,
        _listener(path),
        info.is_swarm,
        info.is_live_restoring,
        None if switch is None else switch == "true",
    )


def _listener(path: str) -> int:
    """Return the pid of the process that listens at a socket; 0 if it listens no more."""
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.settimeout(_LIMIT_S)
        sock.connect(path)
        return peer_credentials(sock).pid
    return 0


def _pids() -> Iterator[int]:
    """Yield the processes called dockerd that share our network namespace."""
    with suppress(OSError):
        ours = os.stat("/proc/thread-self/ns/net")
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and (entry / "comm").read_text() == "dockerd\n":
                    theirs = (entry / "ns/net").stat()
                    if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
                        yield int(entry.name)


def _is_dockerd(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}/comm").read_text() == "dockerd\n"


def _process(pid: int) -> Process:
    folder = Path(f"/proc/{pid}")
    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    unit = re.search(r"/([^/]+\.service)$", (folder / "cgroup").read_text(), re.MULTILINE)
    ticks = int((folder / "stat").read_text().rpartition(")")[2].split()[19])  # proc_pid_stat(5): starttime
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    working = Path(os.readlink(folder / "cwd"))
    return Process(pid, parse_flags(words[1:]), working, unit[1] if unit else "", time.time() - age_s)
