"""The socket for reading: who may use it, that nothing is changed by it, and that commands find it by themselves."""

import grp
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gangway import runtime
from lab.gangwayd import GANGWAY, Gangway
from lab.netns import Namespace

pytestmark = pytest.mark.any_kernel

_CHANGERS, _READERS, _OTHERS = "tty", "games", "daemon"  # groups that every Debian has


@pytest.fixture(scope="module")
def gangway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gangway]:
    """A daemon with a network."""
    settings = tmp_path_factory.mktemp("etc") / "gangway.toml"
    settings.write_text(f'group = "{_CHANGERS}"\nread-group = "{_READERS}"\n')
    with Namespace("host") as host, Gangway(host, "--config", str(settings)) as started:
        started("network", "create", "web", "--subnet", "172.30.0.0/24")
        yield started


def _as_member(gangway: Gangway, group: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without rights who is a member of a group."""
    number = grp.getgrnam(group).gr_gid
    return gangway.host.run("setpriv", "--reuid=65534", f"--regid={number}", "--clear-groups", *words, check=False)


def _ask(gangway: Gangway, socket: Path, method: str, path: str, group: str = _READERS) -> tuple[int, Any]:
    """Send a request by curl; return the status and the answer."""
    words = (
        "curl",
        "-sS",
        "--unix-socket",
        str(socket),
        "-X",
        method,
        f"http://localhost{path}",
        "-w",
        "\n%{http_code}",
    )
    answer, _, status = _as_member(gangway, group, *words).stdout.rpartition("\n")
    return int(status), json.loads(answer or "null")


@pytest.mark.parametrize("words", [("ls",), ("network", "ls"), ("doctor",), ("config", "show"), ("daemon", "status")])
def test_reading_commands_use_it_by_themselves(gangway: Gangway, words: tuple[str, ...]) -> None:
    done = _as_member(gangway, _READERS, str(GANGWAY), *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == gangway(*words).splitlines()[0]


def test_readers_may_follow_the_log(gangway: Gangway) -> None:
    done = _as_member(gangway, _READERS, "timeout", "1", str(GANGWAY), "log")
    assert "network web created" in done.stdout


def test_other_commands_say_who_may(gangway: Gangway) -> None:
    done = _as_member(gangway, _READERS, str(GANGWAY), "network", "rm", "web")
    assert done.returncode == 1
    assert done.stderr.endswith(f"Permission denied; run as root, or as a member of the group {_CHANGERS}\n")
    done = _as_member(gangway, _OTHERS, str(GANGWAY), "ls")
    assert done.returncode == 1
    assert done.stderr.endswith(f"; run as root, or as a member of the group {_CHANGERS} or {_READERS}\n")
    assert [network["name"] for network in gangway.json("network", "ls")] == ["web"]


def test_every_change_is_refused_as_documented(gangway: Gangway) -> None:
    reading = gangway.folder / runtime.READ_SOCKET
    document = _ask(gangway, reading, "GET", "/openapi.json")[1]
    found = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    changes = [(method, path) for method, path in found if method != "GET"]
    assert len(changes) > 10
    for method, path in changes:
        status, answer = _ask(gangway, reading, method, path.replace("{name}", "web").replace("{container}", "box"))
        assert (status, answer["kind"]) == (403, "Forbidden"), (method, path)
        assert "this socket is for reading" in answer["error"]
    assert [network["name"] for network in gangway.json("network", "ls")] == ["web"]
    assert _ask(gangway, reading, "GET", "/networks/web")[1]["name"] == "web"
    assert _ask(gangway, reading, "GET", "/no/such")[0] == 404


def test_what_is_roots_alone_is_not_read_by_others(gangway: Gangway) -> None:
    status, answer = _ask(gangway, gangway.folder / runtime.READ_SOCKET, "GET", "/docker")
    assert (status, answer) == (403, {"kind": "Forbidden", "error": "only root may do this"})


def test_its_group_follows_a_reload(gangway: Gangway) -> None:
    reading = gangway.folder / runtime.READ_SOCKET
    settings = Path(
        next(one["source"] for one in gangway.json("config", "show") if one["name"] == "group").partition(":")[0]
    )
    text = settings.read_text()
    try:
        settings.write_text(text.replace(_READERS, _OTHERS))
        gangway("daemon", "reload")
        assert _ask(gangway, reading, "GET", "/networks", _OTHERS)[0] == 200
        assert "Permission denied" in _as_member(gangway, _READERS, str(GANGWAY), "ls").stderr
    finally:
        settings.write_text(text)
        gangway("daemon", "reload")
