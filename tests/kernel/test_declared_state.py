"""What is declared in files is there as soon as its containers are, and again after a reboot."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.gangwayd import CommandFailed, Gangway
from lab.netns import Namespace
from lab.waiting import wait_until

pytestmark = pytest.mark.any_kernel

NETWORK = '[[network]]\nname = "web"\nsubnets = ["172.30.0.0/24"]\n'


def ports(box: Namespace, *texts: str) -> str:
    return f'[[publish]]\ncontainer = "{box.name}"\nnetwork = "web"\nports = {list(texts)}\n'


class Site:
    """A folder with settings and what is declared, for the daemons of hosts that come one after the other."""

    def __init__(self, folder: Path) -> None:
        self.settings, self.folder = folder / "gangway.toml", folder / "conf.d"
        self.state = folder / "state.db"
        self.settings.write_text(f'firewall = "none"\nstate = "{self.state}"\n')
        self.folder.mkdir()

    def declare(self, text: str, name: str = "web.toml") -> None:
        (self.folder / name).write_text(text)

    @contextmanager
    def booted(self) -> Iterator[Gangway]:
        """A host that has just been booted, with its daemon; at the end the power fails."""
        with Namespace("host") as host, Gangway(host, "--config", str(self.settings)) as gangway:
            yield gangway
            gangway.kill()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def is_served(gangway: Gangway, box: Namespace, port: int = 8000) -> bool:
    """True if a client of the port reaches the container; the relay may take it while its former container ends."""
    with box.entered(), socket.create_server(("", 80)) as server, gangway.host.entered():
        server.settimeout(1)
        try:
            with socket.create_connection(("127.0.0.1", port), 5), server.accept()[0]:
                return True
        except OSError:
            return False


def networks_of(gangway: Gangway, box: Namespace) -> dict[str, bool]:
    """Return a container's networks, and whether each is the first one."""
    endpoints = (one for network in gangway.json("network", "ls") for one in network["endpoints"])
    return {one["network"]: one["is_first"] for one in endpoints if one["container"] == box.name}


def health(gangway: Gangway) -> tuple[int, list[str]]:
    """Return the status that GET /health has, and the reasons."""
    socket_options = ("--unix-socket", str(gangway.socket))
    said = gangway.host.run("curl", "-sS", "-w", "\n%{http_code}", *socket_options, "http://gangway/health").stdout
    answer, _, status = said.rpartition("\n")
    return int(status), json.loads(answer)["reasons"]


def lines(gangway: Gangway) -> list[str]:
    return [f"{one['source']} {one['host_address']}:{one['host_ports']} {one['note']}" for one in gangway.json("ls")]


@pytest.mark.parametrize("has_database", [True, False])
def test_everything_is_there_after_a_reboot(site: Site, has_database: bool) -> None:
    box, typed = Namespace("box"), Namespace("typed")
    site.declare(NETWORK + ports(box, "127.0.0.1:8000:80"))
    with site.booted() as gangway:
        assert lines(gangway) == ["declared 127.0.0.1:8000 container does not exist"]
        assert health(gangway) == (200, [])
        with box, typed:
            wait_until(lambda: is_served(gangway, box), "the container to be served")
            gangway("network", "create", "other")
            gangway("attach", typed.name, "--network", "other")
            gangway("attach", typed.name, "--network", "web")
            gangway("publish", typed.name, "--keep", "-p", "127.0.0.1:8001:80")
            assert is_served(gangway, typed, 8001)
        wait_until(lambda: "container does not exist" in gangway("ls"), "the container to be detached")
        with box:
            wait_until(lambda: is_served(gangway, box), "a new container of that name to be served")
    if not has_database:
        for path in site.state.parent.glob("state.db*"):
            path.unlink()
    with site.booted() as gangway:
        assert {one["name"] for one in gangway.json("network", "ls")} == {"web", "other"}
        with box, typed:
            wait_until(lambda: is_served(gangway, box) and is_served(gangway, typed, 8001), "everything to be served")
            wait_until(lambda: networks_of(gangway, typed) == {"other": True, "web": False}, "its further network")
            gangway("unpublish", typed.name)
            assert lines(gangway) == ["declared 127.0.0.1:8000 "]
    with site.booted() as gangway, box, typed:
        wait_until(lambda: lines(gangway) == ["declared 127.0.0.1:8000 "], "what is declared, and nothing else")


def test_files_are_applied_and_read_again(site: Site, tmp_path: Path) -> None:
    source, later = tmp_path / "app.toml", Namespace("later")
    with Namespace("box") as box, site.booted() as gangway:
        source.write_text(NETWORK + ports(box, "127.0.0.1:8000:80"))
        words = "apply", str(source)
        changes = gangway(*words, "--dry-run")
        assert len(changes.splitlines()) == 3
        assert gangway.json("ls") == []
        assert gangway(*words) == changes
        assert gangway(*words) == ""
        assert is_served(gangway, box)
        with gangway.host.entered(), socket.create_server(("127.0.0.1", 8002)):
            source.write_text(NETWORK + ports(box, "127.0.0.1:8001:80", "127.0.0.1:8002:80"))
            with pytest.raises(CommandFailed, match=r"publish .*: port 127\.0\.0\.1:8002/tcp is in use"):
                gangway(*words)
        assert is_served(gangway, box)
        source.write_text(NETWORK + ports(box, "127.0.0.1:8000:80") + ports(later, "127.0.0.1:8000:81"))
        with later:
            refused = [gangway.run(*words, *flags) for flags in (("--dry-run",), ())]
        assert [(one.returncode, one.stdout) for one in refused] == [(1, "")] * 2
        assert {one.stderr for one in refused} == {
            f"gangway: publish {later.name}: 127.0.0.1:8000:81: 127.0.0.1:8000/tcp is already published for container "
            f"{box.name}: choose another port\n"
        }
        source.write_text("[[publish]]\nkontainer = 1\n")
        with pytest.raises(CommandFailed, match=r"^gangway: app\.toml: Object contains unknown field `kontainer`"):
            gangway(*words)
        with pytest.raises(CommandFailed, match=f"is declared in {site.folder}/app.toml: remove it there"):
            gangway("unpublish", box.name)
        site.declare("[[publish]]\nkontainer = 1\n", "wrong.toml")
        for command in (("daemon", "reload"), ("config", "check", str(site.settings))):
            done = gangway.run(*command)
            assert f"{site.folder}/wrong.toml: Object contains unknown field `kontainer`" in done.stderr
            assert done.returncode == (2 if command[0] == "config" else 1)
        assert is_served(gangway, box)
        status, (mistake,) = health(gangway)
        assert (status, mistake.startswith(f"{site.folder}/wrong.toml: ")) == (503, True)
        (site.folder / "wrong.toml").unlink()
        (site.folder / "app.toml").unlink()
        assert gangway("daemon", "reload") == ""
        assert gangway.json("network", "ls") == []
