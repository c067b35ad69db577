"""The daemon's end of the relay's control connection: start a relay, hand ports over, remove them.

The relay outlives the daemon: it listens on a unix socket, and a daemon that starts connects there first.  A relay that
has neither a port nor a daemon ends by itself.  Calls may come from several threads: one request is made at a time.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import NamedTuple, TypeVar

from gangway.errors import HostRefused
from gangway.relay import connection, protocol, replacement
from gangway.relay.connection import Connection, RelayExited, RelayFailed, RelayHung, is_readable
from gangway.relay.protocol import Count, GetHeld, GetPort, Hold, HostPorts, List, Remove, Serve, Share
from gangway.relay.replacement import Leader
from gangway.relay.settings import Settings
from gangway.relay.sockets import Counters, unlink_socket

_EXIT_S = 1.0
_HUNG = "no status within {:g} s"
_HUNG_S = 5.0  # how long none is started after one that hung: each port would wait for another one

_Item = TypeVar("_Item")


class Exit(NamedTuple):
    """The end of a relay that was needed."""

    at_s: float  # monotonic
    reason: str  # `signal 9`, `status 1`, `no answer within 10 s`; empty if it was not started by this daemon


class RelayClient:
    """The relay behind the control socket `path`.  HostRefused: a request failed, or the relay refused it."""

    def __init__(self, path: Path, settings: Settings, report: Callable[[str], object] = lambda _text: None) -> None:
        """`report` is called with what to log about a relay that is replaced by one of another version."""
        self._path, self._report = path, report
        self.settings = settings  # of the next relay
        self._lock = RLock()
        self._relay: Connection | None = None
        self._retired: list[Connection] = []  # replaced, and still with connections
        self._process: subprocess.Popen[bytes] | None = None
        self._hung_until_s = 0.0
        self._exited = False
        self.exits = 0
        """How often a relay has exited, or failed: one that was started since serves no port of the earlier one's."""
        self.last_exit: Exit | None = None
        self._held: dict[str, Sequence[int]] = {}
        self._excluded: tuple[str, ...] | None = None  # None: what the running relay has been told

    def connect(self) -> bool:
        """Connect to a running relay, which is replaced if it is of another version; False if there is none.

        HostRefused: it can neither be used nor replaced.
        """
        with self._lock:
            self.close()
            limit_s = self.settings.drain_timeout_s
            if text := replacement.settle(self._path, limit_s):
                self._report(text)
            found = self._greeted(self._path)
            if found is not None and replacement.is_due(found.version, found.release):
                found = self._replaced(found)
            self._relay = found
            self._retired = [*replacement.retired(self._path, limit_s)]
            return self._relay is not None

    def served(self) -> list[Serve]:
        """Return the ports that the relay serves; none if it does not run."""
        return self._pages(List, protocol.parse_served)

    def leased(self) -> list[Serve]:
        """Return those of them that belong to leases, or did before their launchers exited."""
        return [one for one in self._pages(List, protocol.parse_leased) if one is not None]

    def counted(self) -> dict[HostPorts, Counters]:
        """Return what the relay has counted of each port; nothing if it does not run."""
        return dict(self._pages(Count, protocol.parse_counted))

    def start(self) -> None:
        """Start the relay, if it does not run."""
        with self._lock:
            self.is_running()  # closes the connection to a relay that has exited
            if self._relay is None and not self.connect():
                self._start()

    def serve(self, port: Serve, fds: Sequence[int] = ()) -> None:
        """Hand a port over, with the descriptors that its mode needs; start the relay if it does not run."""
        with self._lock:
            self.start()
            try:
                self._ask(port, fds)
            except RelayExited:
                self._start()
                self._ask(port, fds)

    def remove(self, ports: HostPorts) -> None:
        """Remove ports; their connections end.  A relay that is not running serves none."""
        with self._lock:
            for one in self._retired:
                with suppress(HostRefused):  # it has exited
                    one.ask(Remove(ports))
            self._retired = [one for one in self._retired if one.is_open()]
            if self.is_running() and self._relay is not None:
                with suppress(RelayExited):  # just now
                    self._ask(Remove(ports))

    def former_socket(self, ports: HostPorts) -> socket.socket | None:
        """Return a duplicate of the socket that a relay that was replaced has for ports; None: none has one."""
        with self._lock:
            for one in self._retired:
                with suppress(HostRefused), one.lent(GetPort(ports)) as fds:
                    if fds:
                        return socket.socket(fileno=os.dup(fds[0]))
        return None

    def prune(self, wanted: Collection[HostPorts]) -> None:
        """End what relays that were replaced still carry for ports of networks that are not among the wanted ones."""
        with self._lock:
            for one in self._retired:
                replacement.prune(one, wanted)

    def share(self, name: str, family: int, fds: Sequence[int]) -> None:
        """Hand over the socket that serves the ports of a protocol and family (4 or 6) that have none of their own; for
        UDP also the map `binding`.  The caller's descriptors stay open."""
        with self._lock:
            self._ask(Share(name, family), fds)

    def shared_count(self) -> int:
        """Return how many of those sockets the relay has, those from an earlier daemon included."""
        with self._lock:
            return 0 if self._relay is None else int(self._ask(protocol.CountShared())[0])

    def hold(self, name: str, fds: Sequence[int]) -> None:
        """Have this relay and each later one keep descriptors open under a name, in place of those held before.

        The caller's descriptors must stay open: a later relay is given them again.
        """
        with self._lock:
            self._held[name] = fds
            if self._relay is not None:
                self._ask(Hold(name, len(fds)), fds)

    def exclude(self, addresses: Sequence[str]) -> None:
        """Have this relay and each later one serve nobody at these addresses by sockets at all addresses."""
        with self._lock:
            if (excluded := tuple(addresses)) != self._excluded:
                self._excluded = excluded
                if self.is_running() and self._relay is not None:
                    self._relay.exclude(excluded)

    def use_log(self, fd: int) -> None:
        """Have the relay write its log to an open file from now on; a relay that starts later opens its own."""
        with self._lock:
            if self.is_running() and self._relay is not None:
                self._ask(Hold(protocol.LOG, 1), [fd])

    def held(self, name: str) -> list[int]:
        """Return the descriptors held under a name, an earlier daemon's included; the caller closes them."""
        with self._lock:
            return [] if self._relay is None else self._ask(GetHeld(name))[1]

    def is_running(self) -> bool:
        """True unless the relay has exited; one that was not needed yet counts as running."""
        with self._lock:
            if self._process is not None:
                self._process.poll()  # reaps it
            if self._relay is None:
                return not self._exited
            if self._relay.is_open():
                return True
            self._lose()
            return False

    @property
    def pid(self) -> int | None:
        """The process ID of the running relay; None if it does not run."""
        relay = self._relay
        return None if relay is None else relay.pid

    @property
    def release(self) -> str:
        """The version of gangway that the running relay belongs to; empty: there is none, or it does not say."""
        relay = self._relay
        return "" if relay is None else relay.release

    def fileno(self) -> int | None:
        """Return a descriptor that hangs up when the relay exits; None if it does not run."""
        relay = self._relay
        return None if relay is None or relay.fileno() < 0 else relay.fileno()

    def close(self) -> None:
        """Close the connection.  A relay without ports ends."""
        with self._lock:
            self._disconnect()
            for one in self._retired:
                one.close()
            self._retired = []

    def stop(self) -> None:
        """Disconnect from a relay that has no ports, so that it ends; the next port starts another one."""
        with self._lock:
            self.close()
            self._exited = False
            unlink_socket(self._path)

    def _lose(self, reason: str = "") -> None:
        """Give up a relay that has exited, or was killed for a `reason`."""
        pid = self.pid
        self._disconnect()
        self.last_exit = Exit(time.monotonic(), reason or self._exit_status(pid))
        self._exited = True
        self.exits += 1

    def _disconnect(self) -> None:
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    def _exit_status(self, pid: int | None) -> str:
        """Return how the relay has ended, if this daemon started it; the connection is closed a moment before."""
        if self._process is None or self._process.pid != pid:
            return ""
        try:
            status = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return "it closed the connection"
        return f"signal {-status}" if status < 0 else f"status {status}"

    def _greeted(self, path: Path) -> Connection | None:
        """Connect to the relay at `path`; None if there is none.  HostRefused: it is too old."""
        try:
            found = Connection(path)
        except OSError:
            return None
        self._exited = False
        try:
            found.greet()
        except RelayExited:  # it was about to end, unused, when we connected; or it was killed
            return None
        except HostRefused as error:
            found.close()
            raise HostRefused(
                f"the running relay (pid {found.pid}) is too old to hand its ports over: {error}; "
                f"kill {found.pid} replaces it, and ends its connections"
            ) from None
        return found

    def _replaced(self, old: Connection) -> Connection | None:
        """Return the relay of this version that replaces another one, or that one if this fails; None: both exited.

        HostRefused: it failed, and the old one does not understand this daemon.
        """
        began_s, name = time.monotonic(), f"relay {old.release} (pid {old.pid})"
        try:
            new = self._launch(replacement.next_path(self._path))
        except HostRefused as error:
            leader, failure = Leader.OLD, str(error)
        else:
            leader, failure = replacement.replace(self._path, old, new, self.settings.drain_timeout_s)
            (old if leader is Leader.NEW else new).close()
        if leader is Leader.NEW:
            text = f"{name} replaced by {new.release} (pid {new.pid}) after {time.monotonic() - began_s:.2f} s"
            self._report(text + f": not all was handed over: {failure}" * bool(failure))
            return new
        if leader is Leader.OLD and old.version == protocol.VERSION:
            self._report(f"{name} is used, because it could not be replaced: {failure}")
            return old
        old.close()
        if leader is Leader.OLD:
            raise HostRefused(f"{name} is of another version, and could not be replaced: {failure}")
        self._report(f"{name} exited while it was replaced: {failure}")
        return None

    def _start(self) -> None:
        self._relay = self._launch(self._path)
        for name, fds in self._held.items():
            self.hold(name, fds)
        if self._excluded:
            self._relay.exclude(self._excluded)

    def _launch(self, path: Path) -> Connection:
        """Start a relay whose control socket is at `path`, and connect to it."""
        if time.monotonic() < self._hung_until_s:
            raise HostRefused(
                f"the relay failed to start: {_HUNG.format(connection.TIMEOUT_S)}; it is started again in some seconds"
            )
        try:
            self._process = process = self._spawn(path)
        except OSError as error:
            raise HostRefused(f"the relay failed to start: {error}") from None
        assert process.stdout is not None
        with process.stdout as pipe:
            status = _HUNG.format(connection.TIMEOUT_S)
            if is_readable(pipe, connection.TIMEOUT_S):
                status = os.read(pipe.fileno(), 4096).decode(errors="replace")
            else:
                self._hung_until_s = time.monotonic() + _HUNG_S
        relay = self._greeted(path) if status == "0\n" else None
        if relay is None or relay.version != protocol.VERSION:
            process.kill()
            process.wait()
            reason = status.removeprefix("0\n").strip() or "it exited without a reason"
            if relay is not None:
                relay.close()
                reason = f"gangway {relay.release} was installed: restart the daemon"
            raise HostRefused(f"the relay failed to start: {reason}")
        return relay

    def _pages(self, request: type[List | Count], parse: Callable[[str], _Item]) -> list[_Item]:
        with self._lock:
            return [] if self._relay is None else self._checked(lambda relay: relay.pages(request, parse))

    def _spawn(self, path: Path) -> "subprocess.Popen[bytes]":
        cache = [f"-Xpycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []  # the daemon's
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
            unlink_socket(path)
            control.bind(str(path))
            os.chmod(path, 0o600)
            return subprocess.Popen(
                [sys.executable, "-OO", "-I", *cache, "-m", "gangway.relay", json.dumps(self.settings._asdict())],
                stdin=control.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )

    def _ask(self, request: protocol.Request, fds: Sequence[int] = ()) -> tuple[str, list[int]]:
        """Send a request; return the answer's text and descriptors.  HostRefused: refused, or no answer."""
        return self._checked(lambda relay: relay.ask(request, fds))

    def _checked(self, call: Callable[[Connection], _Item]) -> _Item:
        """Call something with the relay's connection, and give the relay up if it turns out to be of no use."""
        if self._relay is None:
            raise HostRefused("the relay is not running")
        try:
            return call(self._relay)
        except RelayHung:
            self._lose(f"killed: no answer within {connection.TIMEOUT_S:g} s")
            raise
        except RelayFailed:
            self._lose()
            raise
