"""When the relay starts workers: which flows can be shared, and how busy it has to be."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from gangway.log import Log
from gangway.relay.core.loop import Loop
from gangway.relay.core.stream import Streams
from gangway.relay.core.worker import WorkerPool
from gangway.relay.settings import Settings


class Stub(NamedTuple):
    """A flow, as far as the decision needs it."""

    name: int
    bulky: bool

    def is_bulky(self) -> bool:
        return self.bulky


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.mark.parametrize(
    ("bulky", "chatty", "full", "wanted"),
    [
        (8, 0, False, False),
        (8, 0, True, True),
        (8, 1, False, False),
        (8, 2, False, True),
        (1, 0, True, False),
        (0, 1, True, False),
        (0, 2, False, True),
    ],
)
def test_bulky_flows_are_shared_only_when_the_core_is_full(
    loop: Loop, bulky: int, chatty: int, full: bool, wanted: bool
) -> None:
    settings, log = Settings(workers=1), Log(lambda _level, _line: None)  # one: no signal handlers are set
    streams = Streams(loop, settings, log)
    flows = [Stub(number, number < bulky) for number in range(bulky + chatty)]
    streams.flows.update(flows)  # type: ignore[arg-type]  # stubs
    workers = WorkerPool(loop, streams, settings, log)
    workers._on_busy(full, 0)
    assert workers.start_requested is wanted
