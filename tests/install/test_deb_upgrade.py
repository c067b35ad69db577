"""An upgrade of the Debian package under systemd, of which clients notice nothing, and its removal."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from gangway import __version__
from lab.closing import Closing
from lab.echo_server import Answer, NoAnswer, request_here, request_over, serve
from lab.netns import Namespace, Neighbour
from lab.processes import pids_running
from lab.roots import Root, copy_sources
from lab.systemd import Systemd
from lab.waiting import wait_until

_FORMER = "0.0.9"
_DROP_IN = "[Unit]\nDefaultDependencies=no\nAfter=\nBefore=\nWants=\n[Service]\nStandardError=append:{log}\n"
_ENVIRONMENT = ("env", "LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
_PORT = 8080


@pytest.fixture(scope="session")
def former_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """These sources with a lower version number, and their wheel in `dist`."""
    sources = tmp_path_factory.mktemp("former")
    copy_sources(sources)
    version = sources / "src/gangway/__init__.py"
    lines = [
        f'__version__ = "{_FORMER}"' if "__version__ =" in line else line for line in version.read_text().split("\n")
    ]
    version.write_text("\n".join(lines))
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps")
    subprocess.run((*build, "--wheel-dir", str(sources / "dist"), str(sources)), check=True)
    return sources


@pytest.fixture
def former_package(suite: str, former_sources: Path) -> Path:
    """The package of the former version."""
    wheel = next((former_sources / "dist").glob("*.whl"))
    script = former_sources / "scripts/build_deb.py"
    environment = os.environ | {"SOURCE_DATE_EPOCH": "0", "DEBEMAIL": "gangway <gangway@localhost>"}
    command = (sys.executable, str(script), suite, str(wheel))
    return Path(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=environment).stdout.strip())


class Traffic(Closing):
    """Clients in a namespace, for a `with` block: one that stays connected, and others, one after the other."""

    def __init__(self, space: Namespace, address: str) -> None:
        self._space, self._address = space, address
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answered, self.failed = 0, list[str]()

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self.answered or self.failed, f"a client of {self._address}")
        return self

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with self._space.entered(), socket.create_connection((self._address, _PORT), 15) as staying:
            while not self._over.wait(0.005):
                self._try(lambda: request_here("tcp", self._address, _PORT))
            self._try(lambda: request_over(staying))

    def _try(self, request: Callable[[], Answer]) -> None:
        try:
            request()
            self.answered += 1
        except (OSError, NoAnswer) as error:
            self.failed.append(f"{self._address}: {error}")


def test_clients_notice_nothing_of_an_upgrade(root: Root, package: Path, former_package: Path, tmp_path: Path) -> None:
    root.install("systemd")
    (root.path / "root" / former_package.name).write_bytes(former_package.read_bytes())
    (tmp_path / "systemd").mkdir()
    units = {"gangway.service.d/test.conf": _DROP_IN.format(log=tmp_path / "service.log")}
    with (
        Namespace("host") as host,
        Neighbour(host) as neighbour,
        Namespace("box") as box,
        Systemd(host, units, tmp_path / "systemd", root.path) as systemd,
    ):
        _dpkg(systemd, "--install", f"/root/{former_package.name}")
        assert _daemon(systemd) == ["daemon", _FORMER]
        _gangway(systemd, "network", "create", "web", "--subnet", "172.30.0.0/24")
        _gangway(systemd, "attach", box.name, "--network", "web")
        _gangway(systemd, "publish", box.name, "-p", f"{_PORT}:80")
        serve(box.popen, 80)
        roads = (neighbour, neighbour.host4), (neighbour, neighbour.host6), (host, "127.0.0.1")  # nat and relay
        with ExitStack() as stack:
            traffic = [stack.enter_context(Traffic(*road)) for road in roads]
            _dpkg(systemd, "--install", f"/root/{package.name}")
            assert _daemon(systemd) == ["daemon", __version__]
        assert [one for clients in traffic for one in clients.failed] == []
        print(f"\n{[clients.answered for clients in traffic]} clients were answered")
        _dpkg(systemd, "--purge", "gangway")
        assert pids_running("gangway.daemon", host) + pids_running("gangway.relay", host) == []
        assert "gangway" not in host.run("nft", "list", "ruleset").stdout
        left = ("/etc/gangway", "/usr/lib/gangway", "/run/gangway", "/var/lib/gangway", "/var/cache/gangway")
        assert [path for path in left if systemd.path(path).exists()] == []


def _dpkg(systemd: Systemd, *words: str) -> None:
    done = systemd.run(*_ENVIRONMENT, "dpkg", *words)
    assert done.returncode == 0, done.stdout + done.stderr


def _gangway(systemd: Systemd, *words: str) -> str:
    return systemd(*_ENVIRONMENT, "gangway", *words)


def _daemon(systemd: Systemd) -> list[str]:
    """Return the word and the version that `gangway version` shows of the daemon."""
    return _gangway(systemd, "version").splitlines()[1].split()[:2]
