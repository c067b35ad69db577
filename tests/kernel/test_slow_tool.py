"""While a tool of the firewall keeps a request waiting, questions are answered."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.gangwayd import GANGWAY, Gangway
from lab.netns import Namespace

pytestmark = pytest.mark.any_kernel
REAL = shutil.which("iptables-restore")


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Return a pipe that iptables-restore waits at, if it exists."""
    tool = tmp_path / "iptables-restore"
    tool.write_text(f'#!/bin/sh\nif [ -e {tmp_path}/gate ]; then read -r _ < {tmp_path}/gate; fi\nexec {REAL} "$@"\n')
    tool.chmod(0o755)
    return tmp_path / "gate"


@pytest.fixture
def gangway(gate: Path) -> Iterator[Gangway]:
    environment = {"PATH": f"{gate.parent}:{os.environ['PATH']}"}
    with Namespace("host") as host, Gangway(host, "--firewall", "iptables", environment=environment) as found:
        yield found


def test_questions_are_answered_while_a_request_waits(gangway: Gangway, gate: Path) -> None:
    with Namespace("box") as box:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        gangway("attach", box.name, "--network", "web")
        gangway("publish", box.name, "-p", "8000:80")
        os.mkfifo(gate)
        request = gangway.host.popen(str(GANGWAY), "publish", box.name, "-p", "8001:80")
        with gate.open("w"):  # once the tool waits there
            assert gangway.json("ls")
            assert gangway.json("network", "ls")[0]["name"] == "web"
            assert gangway.json("explain", "0.0.0.0:8000")
            gangway("doctor")
            assert request.poll() is None
            gate.unlink()
        assert request.wait(10) == 0
        assert {one["host_ports"] for one in gangway.json("ls")} == {"8000", "8001"}
