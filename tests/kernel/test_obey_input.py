"""With the setting `obey-input`, what the host's own firewall drops in INPUT holds for published ports."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.waiting import wait_until
from tests.kernel.street import HOST4, Street

pytestmark = pytest.mark.any_kernel

SETTING = "obey-input = true\n"


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def street(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Street, Path]]:
    """A street whose daemon has the setting, and the daemon's settings file."""
    file = tmp_path_factory.mktemp("settings") / "gangway.toml"
    file.write_text(SETTING)
    with Street("--config", str(file), "--firewall", request.param) as made:
        yield made, file


def test_input_decides_about_published_ports_if_it_has_to_be_obeyed(street: tuple[Street, Path]) -> None:
    made, file = street
    host, neighbour, daemon = made.host, made.neighbour, made.gangway.daemon
    assert daemon is not None
    with made.published(made.server, "8080:80", "8080:80/udp") as port:
        drop = ["INPUT", "-i", "eth0", "-p", "tcp", "--dport", str(port), "-j", "DROP"]
        assert made.reaches(neighbour, "tcp", HOST4, port)
        host.run("iptables", "-I", *drop)
        try:
            assert not made.reaches(neighbour, "tcp", HOST4, port)
            assert made.reaches(neighbour, "udp", HOST4, port)
            assert made.reaches(host, "tcp", HOST4, port)
            file.write_text("")
            os.kill(daemon.pid, signal.SIGHUP)
            wait_until(lambda: made.reaches(neighbour, "tcp", HOST4, port), "nat, which passes INPUT by")
        finally:
            file.write_text(SETTING)
            os.kill(daemon.pid, signal.SIGHUP)
            host.run("iptables", "-D", *drop)
