"""A host with two containers for the tests of one file, and the relay that all their ports share."""

import os
import signal
from collections.abc import Iterator

import pytest

from lab.netns import Host
from tests.kernel.ground import SLOW_MACHINE, Ports, Site
from tests.kernel.street import Street


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # or who is tried here would inherit that


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SLOW_MACHINE:
        for item in items:
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    if os.geteuid():
        pytest.skip("only root can make network namespaces")


@pytest.fixture(scope="module")
def host(_able: None) -> Iterator[Host]:
    """A host with two containers."""
    with Host() as made:
        made.container()
        made.container()
        yield made


@pytest.fixture(scope="module")
def site(_able: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A host, two containers, and a relay with ordinary settings, and more threads than this machine may have cores."""
    with Site(tmp_path_factory.mktemp("site"), workers=3) as made:
        yield made


@pytest.fixture
def ports(site: Site) -> Iterator[Ports]:
    """What a test publishes on `site`; it ends with the test."""
    with Ports(site) as made:
        yield made


@pytest.fixture(scope="module", params=["nftables", pytest.param("iptables", marks=pytest.mark.any_kernel)])
def firewall(request: pytest.FixtureRequest) -> str:
    """Each firewall that has rules."""
    return str(request.param)


@pytest.fixture(scope="module")
def street(firewall: str) -> Iterator[Street]:
    """A street whose daemon uses that firewall."""
    with Street("--firewall", firewall) as made:
        yield made
