"""A dockerd in the same namespace, from before or after: both work, and nothing of ours stays with it."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from lab import echo_server
from lab.dockerd import DOCKERD, Dockerd
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.crossings import Question, everywhere, reached
from tests.kernel.snapshot import Snapshot, is_as, make_tables, snapshot
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
        """Docker comes first."""
        self.add_docker(stack)
        make_tables(self.host)
        self.before = snapshot(self.host, iptables=True)

    def add_docker(self, stack: ExitStack) -> None:
        """Starts dockerd and the container."""
        self.docker = stack.enter_context(Dockerd(self.host))
        words = "run", "-d", "--init", "--name", "web", "-p", f"{DOCKERS_PORT}:{PORT}", self.docker.image
        self.docker.run(*words, "sleep", "1h")
        echo_server.serve(partial(self.docker.popen_in, "web"), PORT)
        self.dockers_address = self.docker.address_of("web")

    def dockers_port_works(self, *more: Namespace) -> None:
        """From wherever Docker itself makes it work."""
        asked = [
            Question(self.host, "tcp", "127.0.0.1", DOCKERS_PORT),
            *(Question(space, "tcp", HOST4, DOCKERS_PORT) for space in (self.host, self.neighbour, *more)),
        ]
        wait_until(lambda: reached(self, asked) == list(map(str, asked)), f"{[*map(str, asked)]}", 5)

    def seen_by_docker(self, address: str, port: int) -> str:
        """Asks from Docker's container; gives the address that is seen of it."""
        return echo_server.request(partial(self.docker.command_in, "web"), "tcp", address, port).peer

    def published_works(self, road: str = "nat") -> None:
        """Ours, from everywhere."""
        with self.published(self.server, "8080:80/tcp", "8080:80/udp") as port:
            for protocol in ("tcp", "udp"):
                for address, gateway in (("127.0.0.1", "172.30.0.1"), ("::1", "fd30::1")):
                    assert self.road(self.host, protocol, address, port) == ("redirect", gateway)
                for address in (HOST4, HOST6):
                    for space in (self.host, self.neighbour, self.far.space, self.near.space, self.server.space):
                        assert self.road(space, protocol, address, port)[0] == road, f"{space.name} at {address}"
            # Docker masquerades its containers wherever they go; that is seen where its rules come after ours.
            for address in (HOST4, "172.17.0.1"):
                assert self.seen_by_docker(address, port) in (self.dockers_address, "172.30.0.1")

    def is_isolated(self) -> None:
        """Ours from Docker's, and from everybody outside."""
        clients = [self.neighbour, self.far.space]
        direct = [*everywhere(clients, [self.server.address4, self.server.address6], PORT)]
        assert reached(self, direct) == []
        with pytest.raises(echo_server.NoAnswer):
            self.seen_by_docker(self.server.address4, PORT)

    def ways_out_are_open(self) -> None:
        """Of our containers, and of Docker's."""
        echo_server.serve(self.neighbour.popen, PORT)
        with self.server.space.entered():
            assert echo_server.request_here("tcp", NEIGHBOUR4, PORT).peer == HOST4
        assert self.seen_by_docker(NEIGHBOUR4, PORT) == HOST4

    def firewall(self) -> str:
        """The one that is in use."""
        with self.published(self.server, "8099:80"):
            told = self.gangway.json("explain", f"{HOST4}:8099")
        found = told[0]["firewall"]
        assert isinstance(found, str)
        return found


@pytest.fixture(scope="module")
def docker_first() -> Iterator[Shared]:
    with Shared() as made:
        yield made


def test_after_a_dockerd_auto_is_iptables(docker_first: Shared) -> None:
    assert docker_first.host.run("iptables", "-S", "FORWARD").stdout.startswith("-P FORWARD DROP\n")
    assert docker_first.firewall() == "iptables"


def test_after_a_dockerd_everything_works(docker_first: Shared) -> None:
    docker_first.published_works()
    docker_first.is_isolated()
    docker_first.ways_out_are_open()


def test_dockers_own_ports_work(docker_first: Shared) -> None:
    docker_first.dockers_port_works(docker_first.far.space)


def test_dockers_port_and_ours_cannot_be_the_same(docker_first: Shared) -> None:
    done = docker_first.gangway.run("publish", docker_first.server.name, "-p", f"{DOCKERS_PORT}:80")
    assert done.returncode == 1
    assert "taken by docker-proxy (pid " in done.stderr
    with docker_first.published(docker_first.server, "8001:80"):
        refused = docker_first.docker.run("run", "-p", "8001:80", docker_first.docker.image, "true", check=False)
        assert "already in use" in refused.stderr


def test_dockers_containers_come_and_go_beside_ours(docker_first: Shared) -> None:
    docker = docker_first.docker
    docker.run("network", "create", "theirs", "--subnet", "172.25.0.0/24")
    docker.run("run", "-d", "--name", "more", "--network", "theirs", "-p", "8002:80", docker.image, "sleep", "1h")
    echo_server.serve(partial(docker.popen_in, "more"), PORT)
    assert docker_first.reaches(docker_first.neighbour, "tcp", HOST4, 8002)
    docker_first.published_works()
    docker.run("rm", "-f", "more")
    docker.run("network", "rm", "theirs")
    docker_first.published_works()


def test_a_network_cannot_have_what_docker_has(docker_first: Shared) -> None:
    done = docker_first.gangway.run("network", "create", "bad", "--subnet", "172.17.0.0/24")
    assert (done.returncode, "docker0" in done.stderr) == (1, True)


def test_once_our_last_network_is_gone_everything_is_as_before(docker_first: Shared) -> None:
    """The last test of this scene."""
    docker_first.leave()
    is_as(docker_first.host, docker_first.before, iptables=True)
    docker_first.dockers_port_works()


def test_a_dockerd_that_comes_later_is_lived_with() -> None:
    class Later(Shared):
        def arrange(self, stack: ExitStack) -> None:
            """Docker comes when everything else is there."""

    with Later() as street, ExitStack() as stack:
        assert street.firewall() == "nftables"
        street.add_docker(stack)
        # Nobody forwarded before us, so what we closed has to be closed where Docker's rules can open it.
        wait_until(lambda: "the firewall is iptables from now on" in street.gangway.log.read_text(), "the switch", 5)
        assert "inet gangway" not in street.host.run("nft", "list", "tables").stdout
        street.published_works()
        street.is_isolated()
        street.dockers_port_works(street.far.space)
        street.ways_out_are_open()
        street.leave()
        docker_only = street.host.run("iptables-save").stdout
        assert "GANGWAY" not in docker_only
