"""The demo from its first line to its last: sets the scene, shows the tables, and proves that nothing stays behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from demo import clients, costs
from lab import mirror
from lab.dockerd import Dockerd, DockerFailed
from lab.netns import Host

PROXY = Path(__file__).parents[1] / ".venv/bin/gangway-docker-proxy"
RANGE = "9000-9099"


def main() -> int:
    """Runs the demo; 1, and the reason in one line, if something is not as it should be."""
    if os.geteuid():
        return _fail("only root can make network namespaces and run dockerd")
    if not PROXY.exists():
        return _fail(f"{PROXY} is missing: `make build` makes it")
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(1))  # an exception, so that everything is cleaned up
    before = _machine()
    try:
        show()
    except (mirror.NoAnswer, DockerFailed, AssertionError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return _fail(" ".join(str(error).split()))
    after = _machine()
    for what, was in before.items():
        if after[what] != was:
            return _fail(f"something stayed behind: {what}: {sorted(set(after[what]) ^ set(was))}")
    print(f"\nEverything was cleaned up: no {', '.join(before)} stays behind.")
    return 0


def show() -> None:
    """Everything between setting up and cleaning up."""
    with Host() as host, Dockerd(host, PROXY) as docker:
        remote = host.container()
        run = ("run", "-d", "--init", "--name")
        docker.run(*run, clients.SERVER, "-p", "8000:8000", "-p", "8000:8000/udp", docker.image, "sleep", "1h")
        docker.run(*run, clients.OTHER, docker.image, "sleep", "1h")
        mirror.serve(partial(docker.popen_in, clients.SERVER), clients.PORT)
        version = docker.run("version", "-f", "{{.Server.Version}}").stdout.strip()
        print(f"A real dockerd {version}, --userland-proxy-path={_short(PROXY)}, in a network namespace:")
        print("    docker run -p 8000:8000 -p 8000:8000/udp ...")
        print(
            f"The container is {docker.address_of(clients.SERVER)} on docker0 (172.17.0.1); the host is {host.gateway4}"
            f" and {host.gateway6};\nanother machine is {remote.address4} and {remote.address6}.\n"
        )
        rows = [found for client in clients.clients(host, remote, docker) for found in clients.outcomes(host, client)]
        _table(("client", "asks", "answer", "the container saw", "road"), rows)

        few = costs.measure(docker, PROXY, remote)
        docker.run(*run, "range", "-p", f"{RANGE}:{RANGE}", docker.image, "sleep", "1h")
        many = costs.measure(docker, PROXY, remote)
        print(f"\nMemory (PSS) for these ports, and with 100 more (-p {RANGE}:{RANGE}), IPv4 and IPv6 counted apart:")
        _table(("", *(f"{cost.ports} ports" for cost in (few, many)), "each"), _costs(few, many), right=(1, 2, 3))


def _costs(few: costs.Cost, many: costs.Cost) -> list[Sequence[str]]:
    def row(name: str, small: int | None, large: int | None) -> Sequence[str]:
        if small is None or large is None:
            return name, "-", "-", "-"
        return name, f"{small / 1024:.1f} MiB", f"{large / 1024:.1f} MiB", f"{large / many.ports:.0f} KiB"

    return [
        row("gangway's launchers, one for each", few.launchers, many.launchers),
        row("their one shared relay", few.relay, many.relay),
        row("gangway in all", few.launchers + few.relay, many.launchers + many.relay),
        row("docker-proxy for the same", few.docker_proxy, many.docker_proxy),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _machine() -> dict[str, list[str]]:
    """What the demo could leave on the machine, by kind.

    Its namespaces, mounts and processes bear its pid in their names.
    """

    def lines(*command: str) -> list[str]:
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout.splitlines()

    mark = f"gw-{os.getpid()}-"
    return {
        "network namespace": [line for line in lines("ip", "netns", "list") if mark in line],
        "mount": [line for line in Path("/proc/self/mounts").read_text().splitlines() if mark in line],
        "process": [line for line in lines("ps", "-eo", "pid,args") if mark in line],
        "firewall rule": [line for line in lines("iptables-save") if line.startswith("-")],
        "kernel setting": [Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()],
    }


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _fail(reason: str) -> int:
    print(f"demo: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
