"""Debian's releases, the package that `make deb` has built for each, and minimal systems for it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.roots import Root, fresh_root

_DIST = Path(__file__).parents[2] / "build/dist"
SUITES = {"bookworm": 12, "trixie": 13}
"""The releases, and their numbers."""


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def package(suite: str) -> Path:
    """The package that `make deb` has built."""
    return max(_DIST.glob(f"gangway_*~deb{SUITES[suite]}u*.deb"), key=os.path.getmtime)


@pytest.fixture
def root(suite: str, package: Path) -> Iterator[Root]:
    """A minimal system with what the package depends on."""
    with fresh_root(suite) as made:
        (made.path / "root" / package.name).write_bytes(package.read_bytes())
        depends = subprocess.run(("dpkg-deb", "-f", package, "Depends"), text=True, capture_output=True, check=True)
        made.run("apt-get", "-qq", "update")
        made.run("apt-get", "-qq", "--yes", "--no-install-recommends", "satisfy", depends.stdout.strip())
        made.install("nftables")
        yield made
