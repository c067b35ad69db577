"""What requests and leases share is changed by two threads at the same time."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import pytest

from gangway.errors import Conflict, HostRefused
from gangway.host.saved_settings import SavedSettings, Setting
from gangway.model import PortMapping
from gangway.relay import protocol
from gangway.relay.protocol import Destination
from gangway.state.port_index import PortIndex
from lab.netns import Namespace
from tests.unit.fake_daemon import Daemon, listening
from tests.unit.fake_host import FakeHost, FakeStorage
from tests.unit.samples import lease, mapping

ROUNDS = 200


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Let the interpreter switch threads as often as it can: by default it does after 5 ms."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.fixture
def other_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as found:
        yield found


def test_one_of_two_threads_gets_a_port(other_thread: ThreadPoolExecutor) -> None:
    index, barrier = PortIndex(), threading.Barrier(2)

    def add(one: PortMapping) -> int:
        """Add a mapping again and again; return how often that worked."""
        count = 0
        for _ in range(ROUNDS):
            barrier.wait()
            try:
                index.add(one)
            except Conflict:
                barrier.wait()
            else:
                barrier.wait()
                index.remove(one)
                count += 1
            barrier.wait()
        return count

    counted = other_thread.submit(add, mapping("127.0.0.1", "7999-8001"))
    assert add(lease("0.0.0.0", "8000")) + counted.result() == ROUNDS


def test_failed_change_of_a_setting_keeps_the_record_of_another(
    monkeypatch: pytest.MonkeyPatch, other_thread: ThreadPoolExecutor
) -> None:
    host, storage = FakeHost(monkeypatch, {"one": "1", "two": "1"}), FakeStorage()
    saved = SavedSettings(storage, pytest.fail)
    writing, proceed = threading.Event(), threading.Event()

    def refuse(_value: str) -> None:
        writing.set()
        assert proceed.wait(5)
        raise HostRefused("one cannot be set")

    saved.register(Setting("one", partial(host.read, "one"), refuse))
    failing = other_thread.submit(saved.set, "one", "2")
    assert writing.wait(5)
    with ThreadPoolExecutor(1) as third_thread:
        change = third_thread.submit(saved.set, "two", "2")
        wait([change], timeout=0.1)
        proceed.set()
        with pytest.raises(HostRefused):
            failing.result(5)
        change.result(5)
    assert [saved.is_changed(name) for name in ("one", "two")] == [False, True]
    saved.restore("two")
    assert host.settings == {"one": "1", "two": "1"}


def test_comparisons_never_find_a_lease(
    own_namespace: Namespace, tmp_path: Path, other_thread: ThreadPoolExecutor
) -> None:
    daemon, stop = Daemon(tmp_path), threading.Event()

    def compare() -> int:
        """Compare again and again; return how often something of a lease was found."""
        count = 0
        with own_namespace.entered():  # a thread starts in the process's own
            while not stop.is_set():
                found = daemon.dataplane.found()
                count += len(found.ports) + len(found.redirects)
                daemon.dataplane.stop_if_unused()
        return count

    found = other_thread.submit(compare)
    for _ in range(ROUNDS):
        granted = daemon.leases.grant(protocol.Lease("tcp", Destination("172.17.0.2", 80)), listening("::", 8000), 0)
        daemon.leases.end(granted)
    stop.set()
    assert found.result(5) == 0
    daemon.end()
