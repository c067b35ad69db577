"""A database that is lost: what is published stays published, nothing is listed as if it were all, and one command
deletes what is left."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gangway.reconcile.state import link_name
from tests.kernel.street import HOST4, Street

pytestmark = pytest.mark.any_kernel


def _delete(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _damage(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


@pytest.mark.parametrize(("firewall", "lose"), [("nftables", _delete), ("iptables", _empty), ("nftables", _damage)])
def test_what_is_published_stays_until_cleanup(firewall: str, lose: Callable[[Path], None]) -> None:
    with Street("--firewall", firewall) as street:
        _try(street, lose)


def _try(street: Street, lose: Callable[[Path], None]) -> None:
    gangway, path = street.gangway, street.gangway.folder / "state.db"
    street.publish(street.server, "8080:80", "9000-9010:9000-9010/udp")
    gangway.stop()
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    lose(path)
    gangway.start()
    log = gangway.log.read_text()
    assert "gw-web" in log
    assert "gangway cleanup deletes them" in log
    assert "Traceback" not in log
    for words in (
        ("ls",),
        ("network", "ls"),
        ("publish", street.server.name, "-p", "8081:80"),
        ("network", "rm", "web"),
    ):
        done = gangway.run(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert "left by a daemon whose database is lost" in done.stderr
        assert "gangway cleanup" in done.stderr
    assert any(
        check["check"].startswith("no links of a daemon") and not check["holds"] for check in gangway.json("doctor")
    )
    for space, address in ((street.host, "127.0.0.1"), (street.neighbour, HOST4)):
        assert street.reaches(space, "tcp", address, 8080)
    kept = list(gangway.folder.glob("state.db.damaged-*"))
    assert (len(kept) == 1 and str(kept[0]) in log) if lose is _damage else not kept
    deleted = gangway("cleanup").split()
    assert {"gw-web", link_name(street.server.name)} <= set(deleted)
    assert "gw-web" not in street.host.ip("link")
    assert not street.reaches(street.host, "tcp", "127.0.0.1", 8080)
    assert gangway.json("ls") == []
    rules = street.host.run("nft", "list", "ruleset").stdout + street.host.run("iptables-save").stdout
    assert "gw-web" not in rules
    assert "8080" not in rules
    gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
    assert gangway("cleanup") == ""
    assert [network["name"] for network in gangway.json("network", "ls")] == ["web"]
