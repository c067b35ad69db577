"""Ports published by the real launcher: functions to start it, and to find the processes behind it.

A launcher reports its status on descriptor 3, and may get a socket as descriptor 4.  A test's own descriptors have
other numbers, so bash moves them; then it replaces itself by the launcher, so that signals reach that.
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
    """Start a launcher; return its process, and all data from its status pipe.

    `before` is put before the program (`prlimit`, for example); `passed` is a descriptor that it gets as number 4.
    """
    reading, writing = os.pipe()
    status = fcntl.fcntl(writing, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY)
    os.close(writing)
    redirect, fds = f'exec "$@" 3>&{status} {status}>&-', [status]
    if passed is not None:
        fds.append(fcntl.fcntl(passed, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY))
        redirect += f" 4>&{fds[1]} {fds[1]}>&-"
    popen_options["pass_fds"] = (*popen_options.get("pass_fds", ()), *fds)
    with os.fdopen(reading, "rb") as status_pipe:
        try:
            process = namespace.popen("bash", "-c", redirect, "bash", *before, str(program), *flags, **popen_options)
        finally:
            for fd in fds:
                os.close(fd)
        return process, status_pipe.read()


def publish(
    namespace: Namespace,
    proto: str,
    host_ip: str,
    container_ip: str,
    container_port: int,
    before: tuple[str, ...] = (),
) -> tuple[subprocess.Popen[Any], int]:
    """Publish a free port; return the launcher's process, and the port."""
    port = free_port(namespace, proto, host_ip)
    flags = ["-proto", proto, "-host-ip", host_ip, "-host-port", str(port)]
    flags += ["-container-ip", container_ip, "-container-port", str(container_port)]
    process, status = start(namespace, *flags, before=before)
    assert status == b"0\n", status
    return process, port


def open_socket(namespace: Namespace, proto: str, address: str, port: int = 0) -> socket.socket:
    """Return a bound socket in a namespace, of the address's family (IPv6 sockets are for IPv6 only)."""
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
    """Return a port that is not in use at this moment."""
    with closing(open_socket(namespace, proto, host_ip)) as sock:
        return int(sock.getsockname()[1])


def processes(namespace: Namespace) -> Iterator[int]:
    """Yield the pids of the daemon and the relay in a namespace, in this order."""
    yield from pids_running("gangway.daemon", namespace)
    yield from pids_running("gangway.relay", namespace)


def end_processes(namespace: Namespace) -> None:
    """End the daemon and the relay of a namespace, and delete its runtime folder."""

    def are_ended() -> bool:
        pids = list(processes(namespace))
        for pid in pids:  # a launcher that has just ended may have started another daemon
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        return not pids

    wait_until(are_ended, "the end of the daemon and the relay", 10)
    shutil.rmtree(runtime_folder(namespace), ignore_errors=True)


def children(pid: int) -> list[int]:
    """Return the children of a process, zombies included; the kernel lists them by the thread that started them."""
    found = list[int]()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, thread.read_text().split())
    return sorted(found)


def status_of(pid: int) -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def descriptors(pid: int) -> list[str]:
    """Return what the descriptors of a process refer to: `socket:[INODE]`, `pipe:[INODE]`, a path."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def anonymous_kib(pid: int) -> int:
    """Return the private memory of a process in KiB.  (Its share of shared memory grows when other processes end.)"""
    return int(status_of(pid)["RssAnon"].split()[0])
