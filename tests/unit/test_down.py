"""What `gangway down` removes and refuses, and what a failure leaves; what `uninstall-check` reads of a database."""

import os
import signal
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from gangway.cli import uninstall
from gangway.cli.client import Refused
from gangway.daemon.processes import Process, kind_of, running
from gangway.daemon.remains import Remain, _declared, _of_process
from gangway.errors import Conflict, HostRefused
from gangway.firewall.iptables import timeouts
from gangway.host import sysctl
from gangway.model import Endpoint, Network, Source
from gangway.reconcile.dataplane import TW_REUSE
from gangway.relay import protocol
from gangway.relay.protocol import Destination
from gangway.state.adopted import Adopted, AdoptedContainer
from gangway.state.database import Database
from gangway.state.memory import Memory
from lab.netns import Namespace
from tests.unit.fake_daemon import Daemon, listening
from tests.unit.samples import WEB, mapping


@pytest.fixture
def used(own_namespace: Namespace, daemon: Daemon, box: Namespace) -> Iterator[Daemon]:
    """A daemon with two networks, and a container with ports."""
    daemon.requests.create_network(WEB)
    daemon.requests.attach(box.name, None, ())
    daemon.requests.publish(box.name, ["127.0.0.1:8000:80/udp", "9000-9001:90-91"])
    relay = subprocess.Popen(["sleep", "60"])
    daemon.relay.pid = relay.pid
    yield daemon
    relay.kill()
    relay.wait()


def test_down_removes_what_it_has_named(used: Daemon, box: Namespace) -> None:
    before = {"net.ipv4.ip_forward": "0", TW_REUSE: "2"}
    planned = used.down.planned()
    assert planned[:3] == ["network web", "network gangway0", f"container {box.name} on it, 3 published ports"]
    assert f"saved setting, restored: {TW_REUSE}" in planned
    assert planned[-3:] == [
        f"relay (pid {used.relay.pid})",
        f"daemon (pid {os.getpid()})",
        f"database {used.database.path}",
    ]
    assert used.down.carry_out() == planned
    assert used.is_consistent()
    assert used.requests.networks() == ()
    assert used.settings.unrestored() == {}
    assert {name: sysctl.read(name) for name in before} == before
    assert used.calls.names[-1] == "relay.stop"
    assert used.relay.pid is not None
    assert os.waitpid(used.relay.pid, 0)[1] == signal.SIGTERM


def test_what_is_dockers_keeps_all_but_the_rules(own_namespace: Namespace, daemon: Daemon, box: Namespace) -> None:
    subnets, gateways = (ip_network("172.17.0.0/16"),), (ip_address("172.17.0.1"),)
    bridge = Network("docker:bridge", "docker0", subnets, gateways, source=Source.DOCKER)
    endpoint = Endpoint("docker:web", bridge.name, (ip_address("172.17.0.2"),))
    daemon.adopt(Adopted((bridge,), (AdoptedContainer("id", endpoint, f"/run/netns/{box.name}", ()),)))
    daemon.registry.parked.park("other", "docker:other", [mapping("0.0.0.0", "8000", "80", container="docker:other")])
    assert daemon.down.carry_out()[:3] == [
        "network docker:bridge (rules only: it is Docker's)",
        "container docker:web on it, 0 published ports",
        "port 0.0.0.0:8000:80/tcp, which waits for docker:other",
    ]
    assert daemon.requests.is_idle
    assert daemon.is_consistent()


def test_timeout_policies_are_found_and_removed(used: Daemon) -> None:
    timeouts.create()
    assert timeouts.existing() == ["gw-4", "gw-6"]
    used.down.carry_out()
    assert timeouts.existing() == []


def test_failure_names_what_is_left(used: Daemon, box: Namespace) -> None:
    used.calls.fail("relay.remove")
    with pytest.raises(HostRefused) as refused:
        used.down.carry_out()
    for text in ("relay.remove failed", "network web", f"container {box.name} on it, 3 published ports"):
        assert text in str(refused.value)
    assert len(used.requests.mappings()) == 3
    used.calls.fail()
    used.down.carry_out()
    assert used.is_consistent()


def test_launchers_are_named_and_nothing_is_removed(used: Daemon) -> None:
    lease = protocol.Lease("tcp", Destination("172.17.0.2", 80))
    used.leases.grant(lease, listening("127.0.0.1", 8888), os.getpid())
    for call in (used.down.planned, used.down.carry_out):
        with pytest.raises(Conflict, match=r"nothing was removed: .*\(127.0.0.1:8888:80/tcp\).*stop the containers"):
            call()
    assert len(used.requests.networks()) == 2


def test_nothing_is_recorded_any_more_after_the_database_is_deleted(used: Daemon) -> None:
    used.down.carry_out()
    used.database.delete()
    assert not used.database.path.exists()
    with pytest.raises(HostRefused, match="database"):
        used.requests.create_network(WEB)
    assert WEB.bridge not in used.links.all()


def test_down_has_to_be_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(Refused, match="add --yes"):
        uninstall.down("/run/no.sock", is_confirmed=False)


@pytest.mark.parametrize("is_closed", [True, False])
def test_memory_is_read_without_changing_a_file(tmp_path: Path, is_closed: bool) -> None:
    database = Database(tmp_path / "state.db")
    database.remember("what", "value")
    if is_closed:
        database.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith("-shm")}
    assert Memory(database.path).recall("what") == "value"
    assert Memory(database.path).recall("nothing") is None
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith("-shm")}
    assert after == before
    database.close()


@pytest.mark.parametrize("content", [None, b"", b"nonsense" * 1000])
def test_memory_of_no_database_is_empty(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "state.db"
    if content is not None:
        path.write_bytes(content)
    assert Memory(path).recall("what") is None
    assert path.exists() == (content is not None)


def test_files_that_a_daemon_reads_are_left(tmp_path: Path) -> None:
    folder = tmp_path / "conf.d"
    assert list(_declared(folder)) == []
    folder.mkdir()
    texts = {"b.toml": '[[network]]\nname = "web"\n', "a wrong.toml": "nonsense", ".b.toml.new": "", "notes": ""}
    for name, text in texts.items():
        (folder / name).write_text(text)
    assert list(_declared(folder)) == [
        Remain(f"file {folder}/a wrong.toml, which the next daemon reads", f"rm '{folder}/a wrong.toml'"),
        Remain(f"file {folder}/b.toml, which the next daemon reads", f"rm {folder}/b.toml"),
    ]


_LAUNCHER, _RELAY, _DAEMON = "gangway-docker-proxy", "gangway.relay", "gangway.daemon"


@pytest.mark.parametrize(
    ("line", "uid", "daemons", "kind"),
    [
        ("python3 -I -OO -m gangway.daemon {}", 0, 0, _DAEMON),
        ("python3 -OO -I -m gangway.relay {}", 65534, 0, _RELAY),
        ("python3 -m gangway.relay {}", 1000, 1000, _RELAY),
        ("/usr/bin/docker-proxy -proto udp", 1000, 0, _LAUNCHER),
        ("less gangway.relay", 0, 0, None),
        ("less gangway.relay", 65534, 0, None),
        ("vi gangway.daemon", 0, 0, None),
        ("python3 -m gangway.daemon {}", 1000, 0, None),
        ("python3 -m gangway.relay {}", 1000, 0, None),
        ("python3 -m gangway.relay {}", 0, 0, None),
        ("python3 -m pytest -m", 0, 0, None),
    ],
)
def test_processes_are_gangways_by_module_and_user(line: str, uid: int, daemons: int, kind: str | None) -> None:
    program = _LAUNCHER if kind == _LAUNCHER else "python3.11"
    assert kind_of(program, line.split(), uid, daemons) == kind


def test_argument_of_another_program_makes_no_process_of_gangways() -> None:
    shown = subprocess.Popen(["sh", "-c", "sleep 60; :", "gangway.relay"], start_new_session=True)
    try:
        assert shown.pid not in [one.pid for one in running()]
    finally:
        os.killpg(shown.pid, signal.SIGKILL)
        shown.wait()


def test_processes_are_ended_by_whoever_runs_them() -> None:
    words = ["/usr/bin/docker-proxy", "-proto", "udp", "-host-ip", "0.0.0.0", "-host-port", "53"]
    assert _of_process(Process(7, "gangway-docker-proxy", words)) == Remain(
        "gangway-docker-proxy (pid 7)", "docker stop $(docker ps --quiet --filter publish=53/udp)"
    )
    assert _of_process(Process(8, "gangway.relay", [])) == Remain("relay (pid 8)", "kill 8")
