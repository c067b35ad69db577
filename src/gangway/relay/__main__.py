"""The relay process, `python -m gangway.relay SETTINGS` (as JSON): how its parts are put together, and when it ends.

Standard input is the control socket, which is bound.  The process gives up root, writes to standard output `0\\n` (or
why it cannot start), and serves ports until it has had neither a port nor a daemon for `LINGER_S` seconds, or until it
has been replaced and its last connection has ended.  Nothing that it opens later (clients, backends, pipes) needs a
privilege: the daemon or a launcher binds the ports' sockets, and the sockets that answer UDP clients of shared ports
may be bound without one (core/outlet.c).
"""

import gc
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial

from gangway.log import Log
from gangway.log_targets import open_log
from gangway.relay.control import Control
from gangway.relay.core.loop import Loop, Timer
from gangway.relay.core.serving import Core, confine, open_icmp
from gangway.relay.ports import ServedPorts
from gangway.relay.privilege import drop_privileges, raise_descriptor_limit
from gangway.relay.settings import Settings

_STDOUT = 1
# dockerd starts launchers one after the other, and `docker restart` ends the last before it starts the next.
LINGER_S = 3.0
_LOOK_S = 1.0  # how often a relay that was replaced looks whether it has connections


class RelayProcess:
    """One event loop, the control socket, and what serves the ports."""

    def __init__(self, control: socket.socket, settings: Settings, log: Log, icmp: tuple[int, int]) -> None:
        self.loop = Loop()
        self.loop.on_error = log.unexpected
        self.core = Core(self.loop, settings, log, icmp)
        self._log = log
        self._control = Control(self.loop, control, log, self._schedule_end)
        ports = ServedPorts(self.loop, self.core, log, self._control.is_connected, self._schedule_end, self._retire)
        self._control.ports = ports
        self._end: Timer | None = None
        self._schedule_end()

    def _schedule_end(self) -> None:
        if self._end is not None:
            self._end.cancel()
        self._end = self.loop.call_in(LINGER_S, self._end_if_unused)

    def _end_if_unused(self) -> None:
        if not self._control and not self._control.ports:
            self.loop.stop()

    def _retire(self, limit_s: int) -> None:
        """End with the last connection, or after a limit: another relay serves the ports."""
        self._log.info(f"relay replaced: it ends with its connections, after {limit_s} s at the latest")
        self.loop.call_in(_LOOK_S, partial(self._end_if_left, self.loop.clock() + limit_s))

    def _end_if_left(self, latest_s: float) -> None:
        left = self.core.connections
        if left and self.loop.clock() < latest_s:
            self.loop.call_in(_LOOK_S, partial(self._end_if_left, latest_s))
            return
        end = f"its last {left} connections end (drain_timeout_s)" if left else "its last connection has ended"
        self._log.info(f"replaced relay ended: {end}")
        self.loop.stop()


def main() -> int:
    """Run the relay, and return its exit status."""
    settings = Settings(**json.loads(sys.argv[1]))
    with socket.socket(fileno=os.dup(0)) as control:
        try:
            control.listen()  # here, not in the daemon: SO_PEERCRED names the process that called it
            log = open_log(settings.log, settings.log_level, settings.log_format)
        except OSError as error:
            _report(str(error))
            return 1
        try:
            _run(control, settings, log)
        except Exception as error:
            log.unexpected(error, "the relay exits, and its connections end")
            _report(str(error))  # the daemon reads it only if the relay was not ready yet
            return 1
    return 0


def _run(control: socket.socket, settings: Settings, log: Log) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the daemon reopens the log
    raise_descriptor_limit()
    icmp = open_icmp()
    drop_privileges()
    relay = RelayProcess(control, settings, log, icmp)  # starts threads, which have the privileges of this moment
    signal.signal(signal.SIGTERM, partial(_terminated, relay, log))
    gc.collect()
    gc.freeze()
    try:
        confine()
    except OSError as error:
        log.warning("the relay's calls to the kernel are not restricted: %s", error.strerror)
    _report("0\n")
    relay.loop.run()


def _terminated(relay: RelayProcess, log: Log, number: int, _frame: object) -> None:
    """Write the last words, and end by the signal, which is what the daemon then reports."""
    log.warning(f"relay ended by signal {number}: its {relay.core.connections} connections end")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _report(text: str) -> None:
    """Report to the daemon, once, and close the descriptors that it handed over."""
    with suppress(OSError):  # the daemon has exited; another one will connect
        os.write(_STDOUT, text.encode())
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, _STDOUT):
        os.dup2(null, fd)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
