"""The dockerds that are shared by the tests that do not kill them."""

import os
from collections.abc import Iterator

import pytest

from lab.dockerd import DOCKERD
from tests.docker.dockerhost import ENGINE_PARAMETERS, ENGINES, Site, site


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


@pytest.fixture(scope="session", params=ENGINE_PARAMETERS)
def engine_site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """The shared dockerd, and one of each other release."""
    if request.param == ENGINES[0]:
        yield request.getfixturevalue("shared_site")
    else:
        with site(engine=request.param) as shared:
            yield shared
