"""One dockerd for the tests that leave it as it is."""

import os
from collections.abc import Iterator

import pytest

from lab.dockerd import DOCKERD
from tests.docker.dockerhost import Site, site


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    if os.geteuid():
        pytest.skip("only root can run dockerd")
    if not DOCKERD.exists():
        pytest.skip(f"{DOCKERD} is not installed")


@pytest.fixture(scope="session")
def shared_site(_able: None) -> Iterator[Site]:
    """The dockerd that tests share."""
    with site() as shared:
        yield shared
