"""The dockerd that runs in this network namespace: its process, what its API says, and the settings that it uses.

dockerd reads `iptables`, `ip6tables` and `userland-proxy` at its start only, and its API does not show them.  But the
default bridge's `enable_ip_masquerade` does: without `iptables` it is false, whatever was wanted (20.10 to 29).
"""

import http.client
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from gangway.errors import HostRefused

_LIMIT_S = 5.0
_READ_S = 0.1  # how long after its start dockerd reads its settings; both times are rounded, too
_MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
_TRUE, _FALSE = {"1", "t", "T", "true", "TRUE", "True"}, {"0", "f", "F", "false", "FALSE", "False"}  # Go: ParseBool
_PEER = struct.Struct("iII")  # struct ucred: socket(7)


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


class _Version(msgspec.Struct):
    version: str = msgspec.field(name="Version", default="")


class _Swarm(msgspec.Struct):
    state: str = msgspec.field(name="LocalNodeState", default="inactive")


class _Info(msgspec.Struct):
    swarm: _Swarm = msgspec.field(name="Swarm", default_factory=_Swarm)
    live_restore: bool = msgspec.field(name="LiveRestoreEnabled", default=False)


class _Bridge(msgspec.Struct):
    options: dict[str, str] | None = msgspec.field(name="Options", default=None)


_Answer = TypeVar("_Answer", _Version, _Info, _Bridge)


def read_engine(path: str) -> Engine:
    """Ask the API at a socket.  HostRefused: why it cannot be read."""
    connection = http.client.HTTPConnection("docker")
    connection.auto_open = 0
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_LIMIT_S)
            sock.connect(path)
            connection.sock = sock
            peer = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            version = _get(connection, "/version", _Version)
            info, bridge = _get(connection, "/info", _Info), _get(connection, "/networks/bridge", _Bridge)
    except (OSError, ValueError, http.client.HTTPException, msgspec.MsgspecError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise HostRefused(f"Docker's API at {path} cannot be read: {reason}") from None
    switch = (bridge.options or {}).get(_MASQUERADE)
    is_swarm = info.swarm.state not in ("", "inactive")
    masquerades = None if switch is None else switch == "true"
    return Engine(version.version, peer[0], is_swarm, info.live_restore, masquerades)


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


def _get(connection: http.client.HTTPConnection, target: str, kind: type[_Answer]) -> _Answer:
    """Return what the API says; nothing of what it does not have."""
    connection.request("GET", target)
    response = connection.getresponse()
    body = response.read()
    if response.status not in (http.client.OK, http.client.NOT_FOUND):
        raise ValueError(f"{target}: {response.status} {response.reason}")
    return msgspec.json.decode(b"{}" if response.status == http.client.NOT_FOUND else body, type=kind)


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
