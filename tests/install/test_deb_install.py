"""The Debian packages on minimal systems: lintian, the demo, the launcher; purged, they leave the system as it was."""

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.roots import Root, fresh_root

_DIST = Path(__file__).parents[2] / "build/dist"
_SOURCES = "/root/gangway"
_SERVE = "python3 -m http.server --bind 127.0.0.9 80"
_LAUNCHER = "-proto tcp -host-ip 127.0.0.1 -host-port 8001 -container-ip 127.0.0.9 -container-port 80"
# What apt and dpkg write for any package, and copies of the former lists of users.
_OTHERS = ("proc", "sys", "dev", "run", "tmp", "root", "var/lib/dpkg", "var/lib/apt", "var/cache", "var/log")
_BACKUPS = ("etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-")


@pytest.fixture(params=["bookworm", "trixie"])
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def package(suite: str) -> Path:
    """The package that `make deb` has built."""
    number = {"bookworm": 12, "trixie": 13}[suite]
    return max(_DIST.glob(f"gangway_*~deb{number}u*.deb"), key=os.path.getmtime)


@pytest.fixture
def root(suite: str, package: Path) -> Iterator[Root]:
    """A minimal system with what the package and the demo need."""
    with fresh_root(suite) as made:
        (made.path / "root" / package.name).write_bytes(package.read_bytes())
        depends = subprocess.run(("dpkg-deb", "-f", package, "Depends"), text=True, capture_output=True, check=True)
        made.run("apt-get", "-qq", "update")
        made.run("apt-get", "-qq", "--yes", "--no-install-recommends", "satisfy", depends.stdout.strip())
        made.install("nftables", "procps")
        made.add_sources(_SOURCES)
        yield made


def test_lintian_finds_no_errors(package: Path) -> None:
    done = subprocess.run(("lintian", "--fail-on", "error", package), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "E: " not in done.stdout


def test_a_purge_leaves_the_system_as_it_was(root: Root, package: Path) -> None:
    before, start_s, before_mb = _contents(root), time.monotonic(), root.size_mb()
    root.run("apt-get", "-qq", "--yes", "install", f"/root/{package.name}")
    print(f"\n{package.name}: {time.monotonic() - start_s:.0f} s and {root.size_mb() - before_mb} MB")
    (root.path / _SOURCES[1:] / ".venv").symlink_to("/usr/lib/gangway")  # where the demo looks for commands
    shown = root.run("sh", "-c", f"cd {_SOURCES} && .venv/bin/python3 -m demo").stdout
    assert "Everything was cleaned up" in shown
    assert "redirect" in shown
    launcher = f"{_SERVE} & exec gangway-docker-proxy {_LAUNCHER} 3>/dev/null"
    assert root.answer(f"({launcher})", "http://127.0.0.1:8001") == "200"
    root.run("apt-get", "-qq", "--yes", "purge", "gangway")
    after = _contents(root)
    assert sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)) == []


def _contents(root: Root) -> dict[str, str]:
    """Return a digest of each file, or where a link leads, by path in the root."""
    found = {}
    for folder, folders, files in os.walk(root.path):
        place = Path(folder).relative_to(root.path)
        folders[:] = [name for name in folders if str(place / name) not in _OTHERS]
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink():
                found[str(place / name)] = str(path.readlink())
            else:
                found[str(place / name)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return {name: text for name, text in found.items() if name not in _BACKUPS}
