"""Network namespaces that act as hosts and containers, connected by a real bridge.

They are created with iproute2, under names that contain this process's pid, and deleted when the `with` block ends,
also after a failure: first the processes, then the namespaces (and with them their interfaces).

    with Host() as host:
        box = host.container()              # 172.30.0.2, fd30::2, behind the host's bridge 172.30.0.1, fd30::1
        server = box.popen("socat", "TCP-LISTEN:80,fork", "PIPE")
        with host.entered():                # sockets created here belong to the host
            socket.create_connection((box.address4, 80))
"""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, Self

from gangway import runtime
from lab.closing import Closing

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_numbers = count(1)
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace(Closing):
    """A network namespace with its loopback up, and the processes that were started in it."""

    def __init__(self, role: str) -> None:
        self.name = f"gw-{os.getpid()}-{next(_numbers)}-{role}"
        self.path = f"/run/netns/{self.name}"
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Self:
        try:
            ip("netns", "add", self.name)
            self.ip("link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop the processes that were started in here, and delete the namespace."""
        for process in reversed(self._processes):
            end(process)
        if os.path.exists(self.path):
            self._remove_traces()
            ip("netns", "delete", self.name)

    def _remove_traces(self) -> None:
        """Remove what a daemon that was killed here has left behind: its runtime folder, and an empty cgroup."""
        with self.entered():
            folder = Path(runtime.folder())
        if folder.exists():
            shutil.rmtree(folder)
            for group in _cgroups(f"gangway-{folder.name}"):
                with suppress(OSError):
                    group.rmdir()

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` in here, with nsenter: `ip netns exec` would mount another /sys."""
        return ["nsenter", f"--net={self.path}", "--", *words]

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in here. CalledProcessError: it failed, and `check` is not False."""
        options = {"check": True, "text": True, "capture_output": True, **options}
        return subprocess.run(self.command(*words), **options)

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a command in here; it is stopped when the namespace is deleted."""
        process = subprocess.Popen(self.command(*words), **options)
        self._processes.append(process)
        return process

    def ip(self, *words: str) -> str:
        """Run `ip` in here, and return its output."""
        return ip("-n", self.name, *words)

    def sysctl(self, name: str, value: object = None) -> str:
        """Return a sysctl, or set it if `value` is given."""
        words = ["sysctl", "-qn", name] if value is None else ["sysctl", "-qw", f"{name}={value}"]
        return self.run(*words).stdout.strip()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread in here for the block; sockets that it creates stay in this namespace."""
        with open("/proc/thread-self/ns/net") as home, open(self.path) as there:
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())


def _cgroups(name: str) -> Iterator[Path]:
    """Yield the cgroup with a name in each hierarchy, below its root."""
    root = Path("/sys/fs/cgroup")
    return chain(root.glob(name), root.glob(f"*/{name}"))


class Container(Namespace):
    """A namespace behind a host's bridge."""

    def __init__(self, number: int) -> None:
        super().__init__(f"c{number}")
        self.address4 = f"172.30.0.{number + 1}"
        self.address6 = f"fd30::{number + 1:x}"


class Host(Namespace):
    """A namespace with the bridge `br0` (172.30.0.1/24, fd30::1/64), and its containers."""

    gateway4, gateway6 = "172.30.0.1", "fd30::1"

    def __init__(self) -> None:
        super().__init__("host")
        self._containers = ExitStack()
        self._count = 0

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.ip("link", "add", "br0", "type", "bridge")
            self.ip("address", "add", f"{self.gateway4}/24", "dev", "br0")
            self.ip("address", "add", f"{self.gateway6}/64", "dev", "br0", "nodad")
            self.ip("link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Delete the containers, then the host."""
        with self._containers:
            pass
        super().close()

    def container(self) -> Container:
        """Create a container that is attached to the bridge."""
        self._count += 1
        box = self._containers.enter_context(Container(self._count))
        port = f"veth{self._count}"
        self.ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", box.name)
        self.ip("link", "set", port, "master", "br0", "up")
        box.ip("address", "add", f"{box.address4}/24", "dev", "eth0")
        box.ip("address", "add", f"{box.address6}/64", "dev", "eth0", "nodad")
        box.ip("link", "set", "eth0", "up")
        box.ip("route", "add", "default", "via", self.gateway4)
        box.ip("route", "add", "default", "via", self.gateway6)
        return box


class Neighbour(Namespace):
    """Another machine, connected to a host's eth0 (10.77.0.1, fd77::1), with its default routes by that host."""

    host4, host6 = "10.77.0.1", "fd77::1"
    address4, address6 = "10.77.0.2", "fd77::2"

    def __init__(self, host: Namespace) -> None:
        super().__init__("nbr")
        self._host = host

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._host.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.name)
            ends = (self._host, self.host4, self.host6), (self, self.address4, self.address6)
            for space, address4, address6 in ends:
                space.ip("address", "add", f"{address4}/24", "dev", "eth0")
                space.ip("address", "add", f"{address6}/64", "dev", "eth0", "nodad")
                space.ip("link", "set", "eth0", "up")
            self.ip("route", "add", "default", "via", self.host4)
            self.ip("route", "add", "default", "via", self.host6)
        except BaseException:
            self.close()
            raise
        return self


def ip(*words: str) -> str:
    """Run `ip` in the namespace of this process, and return its output."""
    done = subprocess.run(["ip", *words], text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def end(process: subprocess.Popen[Any], patience_s: float = 5.0) -> None:
    """End a process that we started with SIGTERM, or with SIGKILL if it still runs after `patience_s` seconds."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
