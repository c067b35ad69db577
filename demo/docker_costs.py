"""What publishing costs in memory: gangway's launchers and their relay, and docker-proxy for the same ports.

How it works.  The figure is the PSS: a process's own pages, and its part of those that it shares.  docker-proxy is
started with the very command lines that dockerd gave to the launchers, in a namespace where the ports are free.
"""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lab.dockerd import Dockerd
from lab.netns import Namespace, end
from lab.processes import pss_kib

DOCKER_PROXY = Path("/usr/sbin/docker-proxy")
# dockerd's proxy reads nothing and says "0\n" on descriptor 3 when it serves.
_START = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", 'exec "$0" "$@" 3>&1 >/dev/null 2>&1')


class Cost(NamedTuple):
    """Memory in KiB for a number of published ports; a port counts once for each protocol and family."""

    ports: int
    launchers: int
    relay: int
    docker_proxy: int | None


def measure(docker: Dockerd, proxy: Path, scratch: Namespace) -> Cost:
    """What all that dockerd publishes now costs; docker-proxy's part is None if that is not installed."""
    processes = docker.processes()
    launchers = {pid: words for pid, words in processes.items() if words[:1] == [str(proxy)]}
    relay = [pid for pid, words in processes.items() if "gangway.docker_proxy" in words]
    return Cost(len(launchers), pss_kib(launchers), pss_kib(relay), _docker_proxy(launchers.values(), scratch))


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
