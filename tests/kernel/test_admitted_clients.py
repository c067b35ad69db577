"""A port that was published with `--from` is served to clients of these subnets and to the host, on every road."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.gangwayd import CommandFailed
from lab.netns import Namespace
from tests.kernel.crossings import everywhere, reached
from tests.kernel.host_ports import WITHOUT_STEERING
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, Street

NEIGHBOURS = "10.77.0.0/24", "fd77::/64"
FAR = "172.31.0.0/24", "fd31::/64"
OWN4, OWN6 = "198.51.100.9", "fd98::9"
_PREPARE = f"ip address add {OWN4}/32 dev lo; ip address add {OWN6}/128 dev lo nodad"


class Gated(Street):
    """A street whose daemon uses a firewall; `unsteered`, the relay has a socket for each port."""

    def __init__(self, firewall: str) -> None:
        self.firewall = "none" if firewall == "unsteered" else firewall
        within = WITHOUT_STEERING if firewall == "unsteered" else ()
        super().__init__("--firewall", self.firewall, within=within, prepare=_PREPARE)

    @contextmanager
    def restricted(self, subnets: tuple[str, ...], *ports: str) -> Iterator[int]:
        """Publish ports of the server to clients of some subnets; yield the first host port."""
        words = [f"--from={one}" for one in subnets] + [f"--publish={one}" for one in ports]
        line = self.gangway("publish", self.server.name, *words).splitlines()[0]
        try:
            yield int(line.partition(" -> ")[0].rpartition(":")[2].partition("-")[0])
        finally:
            self.gangway("unpublish", self.server.name)

    def clients(self) -> dict[str, Namespace]:
        """Return a client of each kind."""
        containers = {"near": self.near.space, "far": self.far.space}
        return {"host": self.host, "neighbour": self.neighbour, **containers}

    def served(self, port: int, addresses: tuple[str, ...] = (HOST4, HOST6)) -> list[str]:
        """Return the kinds of clients that are answered, each as often as it is."""
        questions = everywhere(self.clients().values(), addresses, port)
        answered = reached(self, questions)
        kinds = {space.name: kind for kind, space in self.clients().items()}
        return [kinds[one.split()[0]] for one in answered]


_FIREWALLS = "nftables", "none", *(pytest.param(one, marks=pytest.mark.any_kernel) for one in ("iptables", "unsteered"))


@pytest.fixture(scope="module", params=_FIREWALLS)
def street(request: pytest.FixtureRequest) -> Iterator[Gated]:
    with Gated(request.param) as made:
        yield made


def test_only_admitted_clients_are_served_also_by_a_later_daemon(street: Gated) -> None:
    with street.restricted(NEIGHBOURS, "8000:80", "8000:80/udp") as port:
        assert street.served(port) == 4 * ["host"] + 4 * ["neighbour"]
        assert len(reached(street, everywhere([street.host], ["127.0.0.1", "::1"], port))) == 4
    with street.restricted(FAR, "8000:80", "8000:80/udp") as port:
        street.gangway.stop()
        street.gangway.start()
        assert street.served(port) == 4 * ["host"] + 4 * ["far"]


def test_subnets_of_the_other_family_admit_nobody(street: Gated) -> None:
    with street.restricted(NEIGHBOURS[1:], f"{HOST4}:8000:80", f"{HOST4}:8000:80/udp") as port:
        assert street.served(port, (HOST4,)) == 2 * ["host"]
    with street.restricted(("0.0.0.0/0",), "8000:80", "8000:80/udp") as port:
        assert street.served(port, (HOST4,)) == [kind for kind in street.clients() for _ in range(2)]
        assert street.served(port, (HOST6,)) == 2 * ["host"]


def test_range_and_single_address_are_restricted(street: Gated) -> None:
    ports = "79-82:79-82", "79-82:79-82/udp", f"{HOST4}:8001:80", f"{HOST4}:8001:80/udp"
    with street.restricted((f"{NEIGHBOUR4}/32",), *ports):
        assert street.served(80) == 4 * ["host"] + 2 * ["neighbour"]
        assert street.served(8001, (HOST4,)) == 2 * ["host"] + 2 * ["neighbour"]


def test_every_address_of_the_host_is_admitted(street: Gated) -> None:
    with street.restricted(FAR, "8000:80") as port:
        for own, at in ((OWN4, HOST4), (OWN6, HOST6)):
            with street.host.entered():
                client = socket.create_connection((at, port), timeout=3, source_address=(own, 0))
            with client:
                client.sendall(b"hello\n")
                assert client.recv(100)


def test_refused_client_is_not_kept_waiting_by_the_relay(street: Gated) -> None:
    if street.firewall == "nftables":
        pytest.skip("a rule drops its packets")
    with (
        street.restricted(FAR, "8000:80") as port,
        street.neighbour.entered(),
        pytest.raises(ConnectionError),
        socket.create_connection((HOST4, port), timeout=3) as client,
    ):
        assert client.recv(1), "an orderly end"


def test_clients_are_listed_and_explained(street: Gated) -> None:
    with street.restricted(NEIGHBOURS, "8000:80"):
        (first, _) = street.gangway.json("ls", street.server.name)
        assert first["from"] == [*NEIGHBOURS]
        assert ", ".join(NEIGHBOURS) in street.gangway("ls", "--wide")
        text = street.gangway("explain", f"{HOST4}:8000", "--from", "remote")
        assert f"admitted clients: {', '.join(NEIGHBOURS)}, and this host" in text
        if street.firewall != "none":
            (rule,) = [
                line
                for line in text.splitlines()
                if NEIGHBOURS[0] in line and ": " in line and "admitted c" not in line
            ]
            assert "missing" not in rule


@pytest.mark.any_kernel
def test_invalid_subnet_publishes_nothing(street: Gated) -> None:
    for text, reason in (
        ("10.77.0.1/24", "host bits"),
        ("all", "ADDRESS/PREFIX"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
    ):
        with pytest.raises(CommandFailed, match=reason):
            street.gangway("publish", street.server.name, "-p", "8000:80", "--from", text)
    assert street.gangway.json("ls", street.server.name) == []
