"""Ports published by the real launcher: how a test starts one, and the processes behind it.

A launcher reports on descriptor 3, and may be handed a socket as descriptor 4; bash puts the two in place, as a test's
own descriptors have other numbers.  It becomes the launcher then, so signals reach that.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from lab.gangwayd import runtime_folder
from lab.netns import Namespace
from lab.processes import pids_running
from lab.waiting import wait_until

LAUNCHER = Path(__file__).parents[2] / ".venv/bin/gangway-docker-proxy"
IPPROTO_SCTP = 132
_KINDS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "sctp": (socket.SOCK_STREAM, IPPROTO_SCTP),
}
_OUT_OF_THE_WAY = 10


def start(
    namespace: Namespace,
    *flags: str,
    program: str | Path = LAUNCHER,
    before: tuple[str, ...] = (),
    passed: int | None = None,
    **popen_options: Any,
) -> tuple[subprocess.Popen[Any], bytes]:
    """Starts a launcher; gives it, and all that its status pipe said.

    `before` are words to put before the program (`prlimit`, say), `passed` is a descriptor that it gets as its fourth.
    """
    reading, writing = os.pipe()
    status = fcntl.fcntl(writing, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY)
    os.close(writing)
    redirect, fds = f'exec "$@" 3>&{status} {status}>&-', [status]
    if passed is not None:
        fds.append(fcntl.fcntl(passed, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY))
        redirect += f" 4>&{fds[1]} {fds[1]}>&-"
    popen_options["pass_fds"] = (*popen_options.get("pass_fds", ()), *fds)
    with os.fdopen(reading, "rb") as said:
        try:
            process = namespace.popen("bash", "-c", redirect, "bash", *before, str(program), *flags, **popen_options)
        finally:
            for fd in fds:
                os.close(fd)
        return process, said.read()


def publish(
    namespace: Namespace,
    proto: str,
    host_ip: str,
    container_ip: str,
    container_port: int,
    before: tuple[str, ...] = (),
) -> tuple[subprocess.Popen[Any], int]:
    """Publishes a port that the kernel chooses; gives the launcher, and that port."""
    port = free_port(namespace, proto, host_ip)
    flags = ["-proto", proto, "-host-ip", host_ip, "-host-port", str(port)]
    flags += ["-container-ip", container_ip, "-container-port", str(container_port)]
    process, status = start(namespace, *flags, before=before)
    assert status == b"0\n", status
    return process, port


def open_socket(namespace: Namespace, proto: str, address: str, port: int = 0) -> socket.socket:
    """A bound socket in a namespace, of the address's family (an IPv6 one is for IPv6 only)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with namespace.entered():
        sock = socket.socket(family, *_KINDS[proto])
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if proto != "udp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def free_port(namespace: Namespace, proto: str, host_ip: str) -> int:
    """A port that nobody has at this moment."""
    with closing(open_socket(namespace, proto, host_ip)) as sock:
        return int(sock.getsockname()[1])


def processes(namespace: Namespace) -> Iterator[int]:
    """Yield the pids of the daemon, the relay and its workers in a namespace, in this order."""
    yield from pids_running("gangway.daemon", namespace)
    relays = pids_running("gangway.relay", namespace)
    yield from sorted(relays, key=lambda pid: int(status_of(pid)["PPid"]) in relays)


def end_processes(namespace: Namespace) -> None:
    """End the daemon and the relay of a namespace, and delete its runtime folder."""
    for pid in processes(namespace):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not list(processes(namespace)), "the end of the daemon, the relay and its workers", 10)
    shutil.rmtree(runtime_folder(namespace), ignore_errors=True)


def children(pid: int) -> list[int]:
    """The children of a process, those included that are dead and were not waited for."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def descriptors(pid: int) -> list[str]:
    """What a process's descriptors are: `socket:[INODE]`, `pipe:[INODE]`, a path."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def anonymous_kib(pid: int) -> int:
    """Memory that a process has written to, in KiB.  (Its part of what it shares grows when others end.)"""
    return int(status_of(pid)["RssAnon"].split()[0])
