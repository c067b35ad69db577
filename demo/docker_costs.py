"""The memory that published ports take: gangway's launchers, daemon and relay, and docker-proxy for the same ports.

The figure is the PSS (see lab/processes.py). docker-proxy is started with the same command lines that dockerd gave to
the launchers, in a namespace where the ports are free.
"""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lab.dockerd import Dockerd
from lab.netns import Namespace, end
from lab.processes import pids_running, pss_kib

DOCKER_PROXY = Path("/usr/sbin/docker-proxy")
# docker-proxy writes "0\n" to descriptor 3 when it serves.
_START = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", 'exec "$0" "$@" 3>&1 >/dev/null 2>&1')


class Cost(NamedTuple):
    """Memory in KiB for a number of published ports; a port counts once for each protocol and address family."""

    ports: int
    launchers: int
    shared: int
    """The processes that all launchers share: the daemon and the relay."""
    docker_proxy: int | None
    """None: docker-proxy is not installed."""


def measure(host: Namespace, docker: Dockerd, proxy: Path, scratch: Namespace) -> Cost:
    """Measure the memory for all ports that dockerd publishes now."""
    launchers = {pid: words for pid, words in docker.processes().items() if words[:1] == [str(proxy)]}
    shared = [*pids_running("gangway.daemon", host), *pids_running("gangway.relay", host)]
    return Cost(len(launchers), pss_kib(launchers), pss_kib(shared), _docker_proxy(launchers.values(), scratch))


def _docker_proxy(command_lines: Iterable[list[str]], scratch: Namespace) -> int | None:
    if not DOCKER_PROXY.exists():
        return None
    started = []
    try:
        for words in command_lines:
            started.append(scratch.popen(*_START, str(DOCKER_PROXY), *words[1:], stdout=subprocess.PIPE))
        for process in started:
            assert process.stdout is not None
            if process.stdout.read(2) != b"0\n":
                raise RuntimeError("docker-proxy did not start")
        return pss_kib(process.pid for process in started)
    finally:
        for process in started:
            end(process)
