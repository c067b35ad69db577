"""More than one process for TCP and SCTP under load.

How it works.  The relay process accepts all clients and, as long as it is alone, relays them all.  When it uses more
than `BUSY_SHARE` of a core, it forks the workers and passes flows to them, existing and new ones, so that all processes
have about as many.  A flow is passed as its sockets: one (a client, whose backend the worker has yet to connect to) or
two (a connected pair that is idle).  A flow never comes back.  Workers without flows end after a while.

Bulky flows are passed on only when the process has used a whole core for a while (`FULL_SHARE`, `FULL_SLICES`): before,
it is not the bottleneck, and a second process takes a tenth of the throughput away where cores are few.

    relay → worker   flow KEY PROTO FAMILY ADDRESS PORT   with one socket or two (SCM_RIGHTS)
                     unpublish KEY                        reset all flows of the port
    worker → relay   up                                   it has closed all descriptors of the relay
                     unpublished KEY

The number of flows that a worker has ended is in memory that the processes share: the relay reads it for each client.

Kernel facts:

* setitimer(2), ITIMER_PROF: SIGPROF comes after each `SLICE_S` seconds of processor time, user and system.  So a busy
  process reads the clock 20 times a second, and an idle one never wakes up.
* A socketpair(2) of SOCK_SEQPACKET preserves messages and their order; a message that does not fit is EAGAIN.
* A worker is a fork, not a new interpreter: the relay may have given up the right to read its own files.
"""

import mmap
import os
import resource
import signal
import socket
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from socket import SocketType

from gangway.limits import OPEN_FILES, exhausted
from gangway.log import Log
from gangway.relay.core.loop import READABLE, Loop, Timer
from gangway.relay.core.stream import Delegate, Flow, StreamPort, Streams
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend

SLICE_S = 0.05
BUSY_SHARE = 0.5
FULL_SHARE = 0.9
FULL_SLICES = 10
SPARE_DESCRIPTORS = 48  # descriptors that a worker needs besides two for each flow: its own, and pipes
# The workers are checked for flows at this interval; they end when they have none at two checks in a row.  As long
# after they could not be started it is tried again.
RETIRE_S = 5.0
TURN = 32  # messages that a worker handles before its flows get a turn
_MESSAGE_BYTES = 256
_RIGHTS_BYTES = socket.CMSG_SPACE(2 * array("i").itemsize)


class Worker:
    """The relay's end of a worker process."""

    def __init__(self, channel: socket.socket, ended_flows: memoryview) -> None:
        self.channel = channel
        self.keys: set[int] = set()
        self._sent_flows = 0
        self._ended_flows = ended_flows

    def flow_count(self) -> int:
        """Return the number of its flows, those included that are still on the way to it."""
        return self._sent_flows - int(self._ended_flows[0])

    def send_flow(self, port: StreamPort, backend_port: int, *socks: SocketType) -> bool:
        """Pass a flow to `backend_port` on; False if the channel is full or the worker has ended."""
        backend = port.backend
        text = f"flow {port.key} {backend.protocol:d} {backend.family:d} {backend.address} {backend_port}"
        try:
            socket.send_fds(self.channel, [text.encode()], [sock.fileno() for sock in socks])
        except OSError:
            return False
        self.keys.add(port.key)
        self._sent_flows += 1
        return True


class WorkerPool:
    """The workers of a relay process."""

    def __init__(self, loop: Loop, streams: Streams, settings: Settings, log: Log) -> None:
        self.start_requested = False
        """The loop was stopped so that `start` can be called: a fork must not happen within a round."""
        self._loop = loop
        self._streams = streams
        self._count = settings.workers - 1
        self._max_flows = (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS) // 2
        self._log = log
        self._workers: list[Worker] = []
        self._unpublishing: dict[int, tuple[set[Worker], Callable[[], None]]] = {}
        """For each key of a port that is being unpublished: the workers yet to confirm it, and the callback."""
        self._was_idle = False
        self._slice_began_s = time.monotonic()
        self._full_slices = 0
        self._retire_timer: Timer | None = None
        self._start_again_s = 0.0  # when workers may be started, after this has failed
        if self._count:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies: a worker's end is reported by its channel
            signal.signal(signal.SIGPROF, self._on_time_slice)
            signal.setitimer(signal.ITIMER_PROF, SLICE_S, SLICE_S)

    def start(self) -> tuple[socket.socket, memoryview] | None:
        """Fork the workers; return None, and in each worker its channel and its counter of ended flows."""
        self.start_requested = False
        counters = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        for number in range(self._count):
            counter = counters[number : number + 1]
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                pid = os.fork()
            except OSError as error:
                self._report_not_started(error)
                break
            if pid == 0:
                for number in (signal.SIGPROF, signal.SIGTERM):  # the worker is about to free the handlers' objects
                    signal.signal(number, signal.SIG_DFL)
                return theirs, counter
            theirs.close()
            # Until it says "up", it holds all descriptors of the relay, and an unpublished port would stay in use.
            ours.recv(_MESSAGE_BYTES)
            ours.setblocking(False)
            worker = Worker(ours, counter)
            try:
                self._loop.add(ours.fileno(), partial(self._receive, worker), READABLE)
            except OSError as error:
                ours.close()  # the worker ends
                self._report_not_started(error)
                break
            self._workers.append(worker)
        if not self._workers:
            return None
        self._log.info("high load: started %d worker process(es)", len(self._workers))
        self._streams.find_delegate = self._find_delegate
        self._was_idle = False
        if self._retire_timer is not None:
            self._retire_timer.cancel()
        self._retire_timer = self._loop.call_in(RETIRE_S, self._retire_if_idle)
        self._balance(full=False)
        return None

    def _report_not_started(self, error: OSError) -> None:
        self._start_again_s = self._loop.clock() + RETIRE_S
        reason = exhausted(error) or error.strerror or str(error)
        self._log.lasting(f"cannot start a worker process, the relay serves all clients alone: {reason}")

    def unpublish(self, port: StreamPort, done: Callable[[], None]) -> None:
        """Unpublish a port in all workers; call `done` when none of them has a connection of it."""
        pending = {worker for worker in self._workers if port.key in worker.keys}
        for worker in pending:
            worker.keys.discard(port.key)
            self._send_unpublish(worker, port.key)
        if pending:
            self._unpublishing[port.key] = (pending, done)
        else:
            done()

    def use_log(self, fd: int) -> None:
        """Have the workers write the log to a file open as `fd`.  One whose channel is full keeps the former."""
        for worker in self._workers:
            with suppress(OSError):
                socket.send_fds(worker.channel, [b"log 0"], [fd])

    def _send_unpublish(self, worker: Worker, key: int, _events: int = 0) -> None:
        """Send without waiting: the worker may be waiting for the relay to read its messages."""
        try:
            worker.channel.send(b"unpublish %d" % key)
        except BlockingIOError:
            self._loop.call_soon(partial(self._send_unpublish, worker, key), 0)
        except OSError:
            pass  # a worker that has ended is noticed through its channel

    def _on_time_slice(self, _signal: int, _frame: object) -> None:
        now_s = time.monotonic()
        took_s = now_s - self._slice_began_s
        self._full_slices = self._full_slices + 1 if took_s < SLICE_S / FULL_SHARE else 0
        if took_s < SLICE_S / BUSY_SHARE:
            self._loop.call_soon(partial(self._on_busy, self._full_slices >= FULL_SLICES), 0)
        self._slice_began_s = now_s

    def _on_busy(self, full: bool, _events: int) -> None:
        """Share the load; `full`: the process has used a whole core for a while."""
        if self._workers:
            self._balance(full)
        elif self._loop.clock() >= self._start_again_s and len(self._shareable_flows(full)) > 1:
            self.start_requested = True
            self._loop.stop()

    def _shareable_flows(self, full: bool) -> list[Flow]:
        return [flow for flow in self._streams.flows if full or not flow.is_bulky()]

    def _balance(self, full: bool) -> None:
        """Pass idle flows on until no worker has fewer flows than the relay process."""
        for flow in filter(Flow.is_idle, self._shareable_flows(full)):
            socks = flow.client.sock, flow.backend.sock
            worker = self._least_loaded()
            if worker is None or not worker.send_flow(flow.port, flow.backend_port, *socks):
                return
            flow.detach()
            for sock in socks:
                sock.close()

    def _find_delegate(self) -> Delegate | None:
        worker = self._least_loaded()
        return None if worker is None else partial(self._send_client, worker)

    def _send_client(self, worker: Worker, port: StreamPort, backend_port: int, client: SocketType) -> None:
        if worker.send_flow(port, backend_port, client):
            client.close()
        else:
            port.serve(client, backend_port)

    def _least_loaded(self) -> Worker | None:
        """Return the worker with the fewest flows, if the relay has more and the worker has descriptors for another."""
        worker = min(self._workers, key=Worker.flow_count)
        return worker if worker.flow_count() < min(len(self._streams.flows), self._max_flows) else None

    def _receive(self, worker: Worker, _events: int) -> None:
        try:
            message = worker.channel.recv(_MESSAGE_BYTES)
        except OSError:
            message = b""
        if message:
            self._confirm_unpublished(worker, int(message.split()[1]))
        else:
            self._on_worker_exit(worker)

    def _confirm_unpublished(self, worker: Worker, key: int) -> None:
        pending, done = self._unpublishing[key]
        pending.discard(worker)
        if not pending:
            del self._unpublishing[key]
            done()

    def _on_worker_exit(self, worker: Worker) -> None:
        self._log.warning("a worker process ended unexpectedly: its connections are lost")
        self._remove(worker)
        for key in [key for key, (pending, _) in self._unpublishing.items() if worker in pending]:
            self._confirm_unpublished(worker, key)

    def _remove(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._loop.forget(worker.channel.fileno())
        self._loop.close_later(worker.channel)
        if not self._workers:
            self._streams.find_delegate = None

    def _retire_if_idle(self) -> None:
        """End the workers if they were idle at two checks in a row."""
        idle = not any(worker.flow_count() for worker in self._workers) and not self._unpublishing
        if idle and self._was_idle:
            for worker in tuple(self._workers):
                self._remove(worker)
        self._was_idle = idle
        if self._workers:
            self._retire_timer = self._loop.call_in(RETIRE_S, self._retire_if_idle)


class _WorkerProcess:
    def __init__(self, channel: socket.socket, settings: Settings, log: Log) -> None:
        self.loop = Loop()
        self.loop.on_error = log.unexpected
        self.streams = Streams(self.loop, settings, log)
        self.received_flows = 0
        self.ended = False
        self._channel = channel
        self._log = log
        self._ports: dict[int, StreamPort] = {}
        self.loop.add(channel.fileno(), self._receive, READABLE)

    def _receive(self, _events: int) -> None:
        for _ in range(TURN):
            try:
                message, rights, flags, _ = self._channel.recvmsg(_MESSAGE_BYTES, _RIGHTS_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                message, rights, flags = b"", [], 0
            if not message:
                self.ended = True
                return
            verb, key, *backend = message.decode().split()
            if verb == "flow":
                fds = array("i", b"".join(data for _, _, data in rights))
                self._receive_flow(int(key), *backend, fds=fds, whole=not flags & socket.MSG_CTRUNC)
            elif verb == "log":
                self._use_log(array("i", b"".join(data for _, _, data in rights)))
            else:
                self._unpublish(int(key))

    def _use_log(self, fds: "array[int]") -> None:
        for fd in fds:
            self._log.use(fd)
            os.close(fd)

    def _receive_flow(
        self, key: int, protocol: str, family: str, address: str, number: str, *, fds: "array[int]", whole: bool
    ) -> None:
        """Start to relay; `whole` is false if the process had no descriptors for all sockets of the message."""
        self.received_flows += 1
        port = self._ports.get(key)
        if port is None:
            backend = Backend(int(protocol), int(family), address, int(number))
            port = self._ports[key] = StreamPort(self.streams, backend, key=key)
        socks = [SocketType(port.backend.family, socket.SOCK_STREAM, port.backend.protocol, fd) for fd in fds]
        if not whole:
            self._log.lasting(
                f"connections passed to a worker are dropped: out of file descriptors: raise {OPEN_FILES}"
            )
            for sock in socks:
                sock.close()
        elif len(socks) == 2:
            port.adopt(*socks)
        else:
            port.serve(socks[0], int(number))

    def _unpublish(self, key: int) -> None:
        port = self._ports.pop(key, None)
        if port is not None:
            port.close()
        self._channel.send(b"unpublished %d" % key)


def run_worker(channel: socket.socket, counter: memoryview, settings: Settings, log: Log) -> None:
    """Run a worker process until its relay closes the channel, or ends."""
    worker = _WorkerProcess(channel, settings, log)
    channel.send(b"up")
    while not worker.ended:
        worker.loop.turn()
        counter[0] = worker.received_flows - len(worker.streams.flows)
