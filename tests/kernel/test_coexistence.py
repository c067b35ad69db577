"""A dockerd in the same namespace, started before or after: both work, and our rules are removed in the end."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from lab import echo_server
from lab.dockerd import DOCKERD, Dockerd
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.crossings import Question, everywhere, reached
from tests.kernel.snapshot import Snapshot, make_tables, snapshot, wait_until_restored
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, PORT, Street

pytestmark = [
    pytest.mark.any_kernel,
    pytest.mark.skipif(not DOCKERD.exists(), reason=f"{DOCKERD} is not installed"),
    pytest.mark.timeout(180),
]
DOCKERS_PORT = 8000


class Shared(Street):
    """The street, with a dockerd that has a container with a published port."""

    docker: Dockerd
    dockers_address: str
    before: Snapshot

    def arrange(self, stack: ExitStack) -> None:
        """Start Docker first."""
        self.add_docker(stack)
        make_tables(self.host)
        self.before = snapshot(self.host, iptables=True)

    def add_docker(self, stack: ExitStack) -> None:
        """Start dockerd and the container."""
        self.docker = stack.enter_context(Dockerd(self.host))
        words = "run", "-d", "--init", "--name", "web", "-p", f"{DOCKERS_PORT}:{PORT}", self.docker.image
        self.docker.run(*words, "sleep", "1h")
        echo_server.serve(partial(self.docker.popen_in, "web"), PORT)
        self.dockers_address = self.docker.address_of("web")

    def dockers_port_works(self, *more: Namespace) -> None:
        """Assert that Docker's port is reached from wherever Docker serves it."""
        asked = [
            Question(self.host, "tcp", "127.0.0.1", DOCKERS_PORT),
            *(Question(space, "tcp", HOST4, DOCKERS_PORT) for space in (self.host, self.neighbour, *more)),
        ]
        wait_until(lambda: reached(self, asked) == list(map(str, asked)), f"{[*map(str, asked)]}", 5)

    def seen_by_docker(self, address: str, port: int) -> str:
        """Connect from Docker's container; return the address that the server sees."""
        return echo_server.request(partial(self.docker.command_in, "web"), "tcp", address, port).peer

    def published_works(self, road: str = "nat") -> None:
        """Assert that our port is reached from everywhere."""
        with self.published(self.server, "8080:80/tcp", "8080:80/udp") as port:
            for protocol in ("tcp", "udp"):
                for address, gateway in (("127.0.0.1", "172.30.0.1"), ("::1", "fd30::1")):
                    assert self.road(self.host, protocol, address, port) == ("redirect", gateway)
                for address in (HOST4, HOST6):
                    for space in (self.host, self.neighbour, self.far.space, self.near.space, self.server.space):
                        assert self.road(space, protocol, address, port)[0] == road, f"{space.name} at {address}"
            # Docker masquerades its containers' connections; the order of the rules decides which address is seen.
            for address in (HOST4, "172.17.0.1"):
                assert self.seen_by_docker(address, port) in (self.dockers_address, "172.30.0.1")

    def is_isolated(self) -> None:
        """Assert that Docker's container and clients outside cannot reach ours directly."""
        clients = [self.neighbour, self.far.space]
        direct = [*everywhere(clients, [self.server.address4, self.server.address6], PORT)]
        assert reached(self, direct) == []
        with pytest.raises(echo_server.NoAnswer):
            self.seen_by_docker(self.server.address4, PORT)

    def ways_out_are_open(self) -> None:
        """Assert that our containers and Docker's reach the outside."""
        echo_server.serve(self.neighbour.popen, PORT)
        with self.server.space.entered():
            assert echo_server.request_here("tcp", NEIGHBOUR4, PORT).peer == HOST4
        assert self.seen_by_docker(NEIGHBOUR4, PORT) == HOST4

    def firewall(self) -> str:
        """Return the firewall that is in use."""
        with self.published(self.server, "8099:80"):
            answer = self.gangway.json("explain", f"{HOST4}:8099")
        found = answer[0]["firewall"]
        assert isinstance(found, str)
        return found


@pytest.fixture(scope="module")
def docker_first() -> Iterator[Shared]:
    with Shared() as made:
        yield made


def test_with_dockerd_auto_selects_iptables(docker_first: Shared) -> None:
    assert docker_first.host.run("iptables", "-S", "FORWARD").stdout.startswith("-P FORWARD DROP\n")
    assert docker_first.firewall() == "iptables"


def test_with_dockerd_everything_works(docker_first: Shared) -> None:
    docker_first.published_works()
    docker_first.is_isolated()
    docker_first.ways_out_are_open()


def test_dockers_own_ports_work(docker_first: Shared) -> None:
    docker_first.dockers_port_works(docker_first.far.space)


def test_a_port_cannot_be_published_twice(docker_first: Shared) -> None:
    done = docker_first.gangway.run("publish", docker_first.server.name, "-p", f"{DOCKERS_PORT}:80")
    assert done.returncode == 1
    assert f"{DOCKERS_PORT}/tcp is in use: choose another port, or stop docker-proxy (pid " in done.stderr
    with docker_first.published(docker_first.server, "8001:80"):
        refused = docker_first.docker.run("run", "-p", "8001:80", docker_first.docker.image, "true", check=False)
        assert "already in use" in refused.stderr


def test_docker_adds_and_removes_containers(docker_first: Shared) -> None:
    docker = docker_first.docker
    docker.run("network", "create", "theirs", "--subnet", "172.25.0.0/24")
    docker.run("run", "-d", "--name", "more", "--network", "theirs", "-p", "8002:80", docker.image, "sleep", "1h")
    echo_server.serve(partial(docker.popen_in, "more"), PORT)
    assert docker_first.reaches(docker_first.neighbour, "tcp", HOST4, 8002)
    docker_first.published_works()
    docker.run("rm", "-f", "more")
    docker.run("network", "rm", "theirs")
    docker_first.published_works()


def test_a_subnet_of_dockers_is_refused(docker_first: Shared) -> None:
    done = docker_first.gangway.run("network", "create", "bad", "--subnet", "172.17.0.0/24")
    assert (done.returncode, "docker0" in done.stderr) == (1, True)


def test_removing_our_last_network_restores_everything(docker_first: Shared) -> None:
    """This has to be the last test with this fixture."""
    docker_first.leave()
    wait_until_restored(docker_first.host, docker_first.before, iptables=True)
    docker_first.dockers_port_works()


def test_a_dockerd_that_is_started_later() -> None:
    class Later(Shared):
        def arrange(self, stack: ExitStack) -> None:
            """Start Docker later."""

    with Later() as street, ExitStack() as stack:
        assert street.firewall() == "nftables"
        street.add_docker(stack)
        # The host did not forward before, so gangway drops other traffic; by iptables Docker can still accept its own.
        wait_until(lambda: "switching to iptables" in street.gangway.log.read_text(), "the switch", 5)
        wait_until(lambda: "inet gangway" not in street.host.run("nft", "list", "tables").stdout, "the table's removal")
        street.published_works()
        street.is_isolated()
        street.dockers_port_works(street.far.space)
        street.ways_out_are_open()
        street.leave()
        docker_only = street.host.run("iptables-save").stdout
        assert "GANGWAY" not in docker_only
