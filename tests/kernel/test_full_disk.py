"""A database that cannot be written: requests fail in words, and what is published is served as before."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab.gangwayd import CommandFailed
from tests.kernel.street import HOST4, PORT, Street

pytestmark = pytest.mark.any_kernel


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def fill(file: Path) -> None:
    with suppress(OSError), file.open("wb", buffering=0) as full:
        while True:
            full.write(bytes(4096))


def test_what_cannot_be_removed_is_restored(disk: Path, firewall: str) -> None:
    with Street("--firewall", firewall, "--state", str(disk / "state.db")) as street:
        name = street.server.name
        street.gangway("publish", name, "-p", f"8000:{PORT}")
        fill(disk / "fill")
        for words in (("unpublish", name), ("unpublish", name), ("publish", name, "-p", "8001:80"), ("detach", name)):
            with pytest.raises(CommandFailed, match=r"the database .* cannot be written: database or disk is full"):
                street.gangway(*words)
            assert street.road(street.neighbour, "tcp", HOST4, 8000)[0] == "nat"
        assert "Traceback" not in street.gangway.log.read_text()
        (disk / "fill").unlink()
        street.gangway("unpublish", name)
        assert street.gangway.json("ls") == []
