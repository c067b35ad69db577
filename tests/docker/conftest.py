"""A dockerd that is shared by the tests that do not kill it."""

import os
from collections.abc import Iterator

import pytest

from lab.dockerd import DOCKERD
from tests.docker.dockerhost import Site, site


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    if os.geteuid():
        pytest.skip("running dockerd requires root")
    if not DOCKERD.exists():
        pytest.skip(f"{DOCKERD} is not installed")


@pytest.fixture(scope="session")
def shared_site(_able: None) -> Iterator[Site]:
    """The shared dockerd."""
    with site() as shared:
        yield shared
