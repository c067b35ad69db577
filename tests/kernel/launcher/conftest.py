"""Hosts for launchers, ports, and settings files."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from lab.netns import Container, Host
from tests.kernel.launcher import launchers

_ports = count(20000)
# A mount namespace with another /etc, as the settings file may be the machine's own.
_WITH_SETTINGS = 'mount -t overlay -o lowerdir="$0:/etc" overlay /etc && exec "$@"'


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Host, Container]]:
    with launchers.site() as made:
        yield made


@pytest.fixture
def host(shared: tuple[Host, Container]) -> Host:
    return shared[0]


@pytest.fixture
def box(shared: tuple[Host, Container]) -> Container:
    return shared[1]


@pytest.fixture
def fresh() -> Iterator[tuple[Host, Container]]:
    """A host where no daemon runs yet."""
    with launchers.site() as made:
        yield made


@pytest.fixture
def port() -> int:
    """A port that no other test uses."""
    return next(_ports)


@pytest.fixture
def ports() -> list[int]:
    """Eight such ports."""
    return [next(_ports) for _ in range(8)]


@pytest.fixture
def with_settings(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """A function that returns the words that start a command with a settings file of its own."""

    def write(text: str, name: str = "gangway.toml") -> tuple[str, ...]:
        folder = tmp_path / "etc/gangway"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return ("unshare", "--mount", "sh", "-c", _WITH_SETTINGS, str(folder.parent))

    return write
