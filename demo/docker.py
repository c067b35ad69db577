"""gangway in docker-proxy's place under a real dockerd: the road that each kind of client gets, and what it costs."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from demo import common, docker_clients, docker_costs
from lab import echo_server
from lab.dockerd import Dockerd
from lab.gangwayd import Gangway
from lab.netns import Host

PROXY = Path(__file__).parents[1] / ".venv/bin/gangway-docker-proxy"
RANGE = "9000-9099"


def show() -> None:
    """Run the demo."""
    if not PROXY.exists():
        raise RuntimeError(f"{PROXY} is missing: run `make build`")
    with Host() as host, Dockerd(host, PROXY) as docker, _daemon(host, docker) as gangway:
        remote = host.container()
        run = ("run", "-d", "--init", "--name")
        docker.run(*run, docker_clients.SERVER, "-p", "8000:8000", "-p", "8000:8000/udp", docker.image, "sleep", "1h")
        docker.run(*run, docker_clients.OTHER, docker.image, "sleep", "1h")
        echo_server.serve(partial(docker.popen_in, docker_clients.SERVER), docker_clients.PORT)
        version = docker.run("version", "-f", "{{.Server.Version}}").stdout.strip()
        print(f"A real dockerd {version}, --userland-proxy-path={_short(PROXY)}, in a network namespace:")
        print("    docker run -p 8000:8000 -p 8000:8000/udp ...")
        print(
            f"The container is {docker.address_of(docker_clients.SERVER)} on docker0 (172.17.0.1); the host is "
            f"{host.gateway4} and {host.gateway6};\nanother machine is {remote.address4} and {remote.address6}.\n"
        )
        rows = [
            found
            for client in docker_clients.clients(host, remote, docker)
            for found in docker_clients.outcomes(host, client)
        ]
        common.table(("client", "connects to", "answer", "the container saw", "road"), rows)

        few = docker_costs.measure(host, docker, PROXY, remote)
        docker.run(*run, "range", "-p", f"{RANGE}:{RANGE}", docker.image, "sleep", "1h")
        many = docker_costs.measure(host, docker, PROXY, remote)
        docker.run("rm", "-f", "range")
        print("\ngangway ls: what it does for Docker's ports; dockerd's own rules carry the rest where they can.")
        print(gangway("ls"), end="")
        print(
            f"\nMemory (PSS) for these ports, and with 100 more (-p {RANGE}:{RANGE}); IPv4 and IPv6 count separately:"
        )
        common.table(
            ("", *(f"{cost.ports} ports" for cost in (few, many)), "per port"), _costs(few, many), right=(1, 2, 3)
        )


@contextmanager
def _daemon(host: Host, docker: Dockerd) -> Iterator[Gangway]:
    """Start gangway's daemon, which launchers would start otherwise: it has to know where this dockerd's API is."""
    with TemporaryDirectory() as folder:
        settings = Path(folder) / "gangway.toml"
        settings.write_text(f'[docker]\nsocket = "{docker.socket}"\n')
        with Gangway(host, "--config", str(settings)) as gangway:
            try:
                yield gangway
            finally:
                docker.remove_containers()  # launchers would start another daemon


def _costs(few: docker_costs.Cost, many: docker_costs.Cost) -> list[Sequence[str]]:
    def row(name: str, small: int | None, large: int | None) -> Sequence[str]:
        if small is None or large is None:
            return name, "-", "-", "-"
        return name, f"{small / 1024:.1f} MiB", f"{large / 1024:.1f} MiB", f"{large / many.ports:.0f} KiB"

    return [
        row("gangway's launchers, one per port", few.launchers, many.launchers),
        row("gangway's daemon and relay", few.shared, many.shared),
        row("gangway in total", few.launchers + few.shared, many.launchers + many.shared),
        row("docker-proxy for the same ports", few.docker_proxy, many.docker_proxy),
    ]


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


if __name__ == "__main__":
    sys.exit(common.run(show))
