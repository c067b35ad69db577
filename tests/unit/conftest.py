"""Settings for hypothesis, the unit tests that are also run on another kernel, and a network namespace."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from lab.netns import Namespace

if TYPE_CHECKING:
    from tests.unit.fake_daemon import Daemon

_IS_EMULATED = "GANGWAY_VM" in os.environ  # tests/vm, where everything is 10 to 30 times slower
_FOLDER = Path(__file__).parent

# The unit tests that send packets, wait for events or list sockets, and so depend on the kernel. All others test what
# gangway computes by itself (plans, rules, entries, messages, settings): another kernel cannot change their outcome.
_KERNEL_DECIDES = {
    "test_loop",
    "test_shared_datagrams",
    "test_shared_streams",
    "test_sockets",
}
_FOUND = {path.stem for path in _FOLDER.glob("test_*.py")}
assert _KERNEL_DECIDES <= _FOUND, f"{__file__}: no such test files: {sorted(_KERNEL_DECIDES - _FOUND)}"

# Ignored by pytest, which does not even import them, unless they are named on the command line.
collect_ignore = [f"{name}.py" for name in sorted(_FOUND - _KERNEL_DECIDES)] if _IS_EMULATED else []

settings.register_profile(
    "patient",
    deadline=None,  # a slow test is not a failure
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=8 if _IS_EMULATED else 100,
)
settings.load_profile("patient")


@pytest.fixture
def own_namespace() -> Iterator[Namespace]:
    """Run the test in an empty network namespace: every port is free there.  Only root may create one."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    with Namespace("unit") as namespace, namespace.entered():
        yield namespace


@pytest.fixture
def box() -> Iterator[Namespace]:
    """A network namespace for a container."""
    with Namespace("box") as found:
        yield found


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator["Daemon"]:
    """The parts of a daemon over fakes, with an empty database."""
    from tests.unit.fake_daemon import Daemon  # most tests need none of what it imports

    found = Daemon(tmp_path)
    yield found
    found.end()
