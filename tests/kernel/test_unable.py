"""What a command or the daemon says where it cannot work: no permission, no firewall, a missing kernel feature, a
wrong configuration."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gangway.host.sockets import has_sockets
from lab.gangwayd import GANGWAY, Gangway
from lab.netns import Namespace
from tests.kernel.snapshot import Snapshot, compare, snapshot
from tests.kernel.street import HOST4, Street

pytestmark = pytest.mark.any_kernel

_AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
_LIBRARY = next((path for path in Path("/usr/lib").glob("*/libnftables.so.1")), None)
_NEEDS_LIBRARY = pytest.mark.skipif(_LIBRARY is None, reason="libnftables is not where Debian has it")


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace("host") as made:
        yield made


@pytest.fixture
def before(host: Namespace) -> Iterator[Snapshot]:
    """The host's state, which must be the same after the test."""
    found = snapshot(host)
    yield found
    assert compare(found, snapshot(host)) == []


def _line(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code, done
    assert re.fullmatch(r"gangway: .+\n", done.stderr), done.stderr
    return done.stderr


def _daemon(host: Namespace, directory: Path, *words: str, within: tuple[str, ...] = ()) -> str:
    """Return the line that a daemon prints that cannot start."""
    command = [*within, str(GANGWAY), "daemon", "--socket", str(directory / "sock"), *words]
    done = host.run(*command, check=False, timeout=20)
    assert not (directory / "sock").exists()
    return _line(done, 2 if done.returncode == 2 else 1)


def test_without_access_to_the_socket_a_command_says_to_run_as_root(host: Namespace) -> None:
    with Gangway(host) as gangway:
        gangway.directory.chmod(0o755)
        for words in (
            ("ls",),
            ("network", "create", "web", "--subnet", "172.30.0.0/24"),
            ("publish", "box", "-p", "80"),
        ):
            command = (*_AS_NOBODY, str(GANGWAY), *words, "--socket", str(gangway.socket))
            message = _line(host.run(*command, check=False))
            assert str(gangway.socket) in message
            assert re.search("ermission denied.*root", message)
        assert gangway.json("network", "ls") == []


def test_a_daemon_must_be_root(host: Namespace, tmp_path: Path, before: Snapshot) -> None:
    assert "run it as root" in _daemon(host, tmp_path, within=_AS_NOBODY)


def test_a_command_that_starts_the_daemon_must_be_root(host: Namespace, before: Snapshot) -> None:
    words = (*_AS_NOBODY, str(GANGWAY), "ls", "--socket", "/tmp/nobody-has-this.sock")
    assert "root" in _line(host.run(*words, check=False))


def test_root_without_capabilities_is_refused(host: Namespace, tmp_path: Path, before: Snapshot) -> None:
    within = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--")
    message = _daemon(host, tmp_path, within=within)
    assert re.search("root|CAP_NET_ADMIN|ermitted", message)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("", ("--firewall", "pf"), "'pf'.*auto, nftables, iptables, none"),
        ("", ("--chain-prefix", "a b"), "invalid chain-prefix 'a b'"),
        ('firewall = "pf"', (), "'pf'"),
        ("firewal = 'none'", (), "firewal"),
        ("= 3", (), "config.*line 1"),
        ("[relay]\nworkers = -1", (), "workers"),
    ],
)
def test_an_invalid_setting_is_named(
    host: Namespace, tmp_path: Path, before: Snapshot, text: str, words: tuple[str, ...], message: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    done = host.run(
        *(str(GANGWAY), "daemon", "--socket", str(tmp_path / "sock"), "--config", str(config), *words),
        check=False,
        timeout=20,
    )
    assert re.search(message, _line(done, 2))


def test_a_database_that_cannot_be_opened_is_named(host: Namespace, tmp_path: Path, before: Snapshot) -> None:
    assert "/proc/nowhere/state.db" in _daemon(host, tmp_path, "--state", "/proc/nowhere/state.db")
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"this is no database" * 1000)
    assert str(damaged) in _daemon(host, tmp_path, "--state", str(damaged))
    assert damaged.read_bytes().startswith(b"this is no database")
    assert str(tmp_path / "none.toml") in _daemon(host, tmp_path, "--config", str(tmp_path / "none.toml"))


def _without(directory: Path, *missing: str) -> tuple[str, ...]:
    """Return a command prefix that hides libnftables or iptables."""
    assert _LIBRARY is not None
    programs = directory / "bin"
    programs.mkdir()
    for name in ("nsenter", "unshare", "env", "sh", "mount", "sleep", "true", "sysctl"):
        (programs / name).symlink_to(shutil.which(name) or "/nonexistent")
    path = str(programs) if "iptables" in missing else "/usr/sbin:/usr/bin:/sbin:/bin"
    hide = f"mount --bind /dev/null {_LIBRARY} && " if "nftables" in missing else ""
    return ("unshare", "--mount", "--propagation", "slave", "sh", "-c", f'{hide}PATH={path} exec "$0" "$@"')


@_NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("flags", "missing", "message"),
    [
        ((), ("nftables", "iptables"), "neither nftables nor iptables.*--firewall none"),
        (("--firewall", "nftables"), ("nftables",), "nftables cannot be used.*libnftables.*--firewall none"),
        (("--firewall", "iptables"), ("iptables",), "iptables cannot be used.*iptables-save.*--firewall none"),
    ],
    ids=["neither", "nftables", "iptables"],
)
def test_a_missing_firewall_is_named_with_an_alternative(
    host: Namespace, tmp_path: Path, before: Snapshot, flags: tuple[str, ...], missing: tuple[str, ...], message: str
) -> None:
    assert re.search(message, _daemon(host, tmp_path, *flags, within=_without(tmp_path, *missing)))


def test_nftables_without_the_list_of_protocols_names_the_package(host: Namespace, before: Snapshot) -> None:
    hidden = "mount --bind /dev/null /etc/protocols"
    within = ("unshare", "--mount", "--propagation", "slave", "sh", "-ec", f'{hidden}; exec "$0" "$@"')
    with Gangway(host, "--firewall", "nftables", within=within) as gangway:
        done = gangway.run("network", "create", "web", "--subnet", "172.30.0.0/24")
        assert re.search("nftables: .*/etc/protocols.*apt-get install netbase", _line(done))


@_NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("missing", "firewall", "road"),
    [(("iptables",), "nftables", "nat"), (("nftables",), "iptables", "nat")],
    ids=["no-iptables", "no-nftables"],
)
def test_auto_uses_the_firewall_that_is_installed(
    tmp_path: Path, missing: tuple[str, ...], firewall: str, road: str
) -> None:
    with Street(within=_without(tmp_path, *missing)) as street, street.published(street.server, "8080:80") as port:
        answer = street.gangway.json("explain", f"{HOST4}:{port}", "--from", "remote")[0]
        assert answer["firewall"] == firewall
        assert street.road(street.neighbour, "tcp", HOST4, port)[0] == road


@_NEEDS_LIBRARY
def test_without_a_firewall_the_relay_serves_all_clients(tmp_path: Path) -> None:
    within = _without(tmp_path, "nftables", "iptables")
    with Street("--firewall", "none", within=within) as street, street.published(street.server, "8080:80") as port:
        assert street.road(street.host, "tcp", HOST4, port) == ("redirect", "172.30.0.1")
        for space in (street.neighbour, street.far.space, street.server.space):
            assert street.road(space, "tcp", HOST4, port) == ("relay", "172.30.0.1")


@pytest.mark.skipif(has_sockets("sctp"), reason="this kernel has SCTP")
@pytest.mark.parametrize("firewall", ["nftables", "iptables", "none"])
def test_without_sctp_sockets_no_client_is_relayed(firewall: str) -> None:
    with Street("--firewall", firewall) as street:
        done = street.gangway.run("publish", street.server.name, "-p", "8080:80/sctp")
        if firewall == "none":
            assert "sctp" in _line(done)
            assert street.gangway.json("ls") == []
            return
        assert done.returncode == 0
        for mapping in street.gangway.json("ls"):
            roads = {route["origin"]: route["road"] for route in mapping["routes"]}
            assert roads == {"loopback": "blocked", "host": "nat", "remote": "nat", "container": "nat"}
