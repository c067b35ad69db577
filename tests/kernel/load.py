"""Clients that send requests all the time, while something else happens."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lab import echo_server
from lab.netns import Namespace
from lab.waiting import wait_until

# Between two requests of a client: the processes that are restarted need the processor, too.
_PAUSE_S = 0.02
# A client has to survive a restart of daemon and relay, and no longer.
_PATIENCE_S = 5


class Client(threading.Thread):
    """A client in `space` that sends one request after the other, each by a new connection."""

    def __init__(self, space: Namespace, protocol: str, address: str, port: int) -> None:
        super().__init__()
        self._space = space
        self._target = protocol, address, port
        self._is_over = threading.Event()
        self._answers = 0
        self.failures: list[str] = []
        """The requests that were not answered."""

    def run(self) -> None:
        """Send requests until `stop` is called."""
        with self._space.entered():
            while not self._is_over.wait(_PAUSE_S):
                try:
                    echo_server.request_here(*self._target, patience_s=_PATIENCE_S)
                    self._answers += 1
                except echo_server.NoAnswer as error:
                    self.failures.append(f"{self._space.name} at {self._target}: {error}")

    def wait_for_answers(self) -> None:
        """Wait until some more requests were answered, or one was not."""
        before = self._answers
        wait_until(lambda: self._answers > before + 5 or self.failures, "more answers")

    def stop(self) -> None:
        """Wait for the current request, and send no more."""
        self._is_over.set()
        self.join()


class Load(list[Client]):
    """Several clients."""

    def wait_for_answers(self) -> None:
        """Wait until every client was answered a few more times."""
        for client in self:
            client.wait_for_answers()


@contextmanager
def under_load(clients: Iterable[Client]) -> Iterator[Load]:
    """Run clients during the block.  AssertionError: a request was not answered."""
    load = Load(clients)
    for client in load:
        client.start()
    try:
        yield load
        load.wait_for_answers()
    finally:
        for client in load:
            client.stop()
    failures = [failure for client in load for failure in client.failures]
    assert not failures, failures
