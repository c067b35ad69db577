"""`--chain-prefix DOCKER` in the kernel: the article's four listings, rule for rule, and how clients are served."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import echo_server
from lab.gangwayd import Gangway
from lab.netns import Namespace, Neighbour
from tests.kernel.street import HOST4, NEIGHBOUR4, Box, Street

pytestmark = pytest.mark.any_kernel

_EXPECTED = Path(__file__).parents[1] / "golden/article.iptables"
_PORT = 8000


class Article(Street):
    """The article's host: docker0, and one container with the published port 8000."""

    def __enter__(self) -> "Article":
        with ExitStack() as stack:
            self.host = stack.enter_context(Namespace("host"))
            self.neighbour = stack.enter_context(Neighbour(self.host))
            flags = "--firewall", "iptables", "--chain-prefix", "DOCKER"
            self.gangway = stack.enter_context(Gangway(self.host, *flags))
            self.gangway("network", "create", "docker0", "--bridge", "docker0", "--subnet", "172.17.0.0/16")
            space = stack.enter_context(Namespace("container"))
            address = self.gangway("attach", space.name, "--network", "docker0").strip()
            echo_server.serve(space.popen, _PORT)
            self.server = Box(space, address, "")
            self.gangway("publish", space.name, "-p", f"0.0.0.0:{_PORT}:{_PORT}")
            self._stack = stack.pop_all()
        return self


@pytest.fixture(scope="module")
def article() -> Iterator[Article]:
    with Article() as made:
        yield made


def _sections() -> dict[str, list[str]]:
    """Return the expected rules by the file's headings: table and chains."""
    found: dict[str, list[str]] = {}
    rules: list[str] = []
    for line in _EXPECTED.read_text().splitlines():
        if line.startswith("# "):
            rules = found.setdefault(line[2:], [])
        elif line:
            rules.append(line)
    return found


@pytest.mark.parametrize("heading", list(_sections()))
def test_rules_are_the_articles(article: Article, heading: str) -> None:
    table, *chains = heading.split()
    listed = article.host.run("iptables", "-t", table, "-S").stdout.splitlines()
    rules = [line for line in listed if line.startswith("-A") and line.split()[1] in chains]
    assert rules == _sections()[heading]


def test_there_are_no_other_chains(article: Article) -> None:
    for table in ("nat", "filter"):
        listed = article.host.run("iptables", "-t", table, "-S").stdout.splitlines()
        assert [line for line in listed if line.startswith("-N")] == ["-N DOCKER"]


def test_addresses_are_the_articles(article: Article) -> None:
    assert article.server.address4 == "172.17.0.2"
    assert "inet 172.17.0.1/16" in article.host.ip("address", "show", "docker0")


def test_every_client_reaches_the_port_and_the_container_itself_by_relay(article: Article) -> None:
    assert article.road(article.neighbour, "tcp", HOST4, _PORT) == ("nat", NEIGHBOUR4)
    assert article.road(article.host, "tcp", HOST4, _PORT) == ("nat", HOST4)
    assert article.road(article.host, "tcp", "127.0.0.1", _PORT) == ("redirect", "172.17.0.1")
    for address in (HOST4, "172.17.0.1"):
        assert article.road(article.server.space, "tcp", address, _PORT) == ("relay", "172.17.0.1")


def test_unpublish_removes_the_rules(article: Article) -> None:
    """This has to be the last test with this fixture."""
    article.gangway("unpublish", article.server.name)
    for table in ("nat", "filter"):
        assert f"{_PORT}" not in article.host.run("iptables", "-t", table, "-S").stdout
    article.leave()
    for table in ("raw", "mangle", "nat", "filter"):
        listed = article.host.run("iptables", "-t", table, "-S").stdout.splitlines()
        assert [line for line in listed if not line.startswith("-P")] == []
