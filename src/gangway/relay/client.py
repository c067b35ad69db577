"""The daemon's end of the relay's control connection: start a relay, hand ports over, remove them.

The relay is a process of its own that outlives the daemon: it listens on a unix socket, and a daemon that starts
connects there first.  One that has neither a port nor a daemon ends by itself.

Calls may come from several threads: requests on the connection are made one after the other.
"""

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import RLock

from gangway.errors import HostRefused
from gangway.relay import protocol
from gangway.relay.protocol import (
    CountShared,
    GetHeld,
    Hello,
    Hold,
    HostPorts,
    List,
    ProtocolError,
    Remove,
    Request,
    Serve,
    Share,
)
from gangway.relay.settings import Settings
from gangway.relay.sockets import peer_credentials

_TIMEOUT_S = 10.0


class RelayClient:
    """The relay behind the control socket `path`.  HostRefused: it did not do what it was asked."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self._settings = settings
        self._lock = RLock()
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = False
        self.exits = 0
        """How often a relay has exited, or failed: one that was started since serves no port of the earlier one's."""
        self._held: dict[str, Sequence[int]] = {}
        self._shared: int | None = None
        """How many shared sockets the relay has; None: not known."""

    def connect(self) -> bool:
        """Connect to a running relay; False if there is none."""
        with self._lock:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            channel.settimeout(_TIMEOUT_S)
            try:
                channel.connect(str(self._path))
            except OSError:
                channel.close()
                return False
            pid = peer_credentials(channel).pid
            self._channel, self._exited, self._shared = channel, False, None
            try:
                self._ask(Hello(protocol.VERSION))
            except HostRefused as error:
                self.close()
                raise HostRefused(
                    f"the running relay (pid {pid}) cannot be used: {error}; stop it: kill {pid}"
                ) from None
            return True

    def served(self) -> list[Serve]:
        """Return the ports that the relay serves; none if it does not run."""
        with self._lock:
            found: list[Serve] = []
            while self._channel is not None:
                lines = self._ask(List(len(found))).splitlines()
                if not lines:
                    break
                try:
                    found += map(protocol.parse_served, lines)
                except ProtocolError as error:
                    raise HostRefused(f"the relay failed: {error}") from None
            return found

    def serve(self, port: Serve, fds: Sequence[int] = ()) -> None:
        """Hand a port over, with the descriptors that its mode needs; start the relay if it does not run."""
        with self._lock:
            if (self._channel is None or not self.is_running()) and not self.connect():
                self._start()
            self._ask(port, fds)

    def remove(self, ports: HostPorts) -> None:
        """Remove ports; their connections end.  A relay that is not running serves none."""
        with self._lock:
            if self.is_running() and self._channel is not None:
                self._ask(Remove(ports))

    def share(self, name: str, family: int, fds: Sequence[int]) -> None:
        """Hand over the socket that serves every port of a protocol and family (4 or 6) without one of its own; with
        UDP also the map `binding`.  The descriptors stay the caller's, too."""
        with self._lock:
            self._ask(Share(name, family), fds)
            self._shared = None

    def shared_count(self) -> int:
        """Return how many of those sockets the relay has, perhaps from an earlier daemon."""
        with self._lock:
            if self._channel is None:
                return 0
            if self._shared is None:
                self._shared = int(self._ask(CountShared()))
            return self._shared

    def hold(self, name: str, fds: Sequence[int]) -> None:
        """Have descriptors kept open under a name by this relay and each later one, in place of those held before.

        They stay the caller's, too.
        """
        with self._lock:
            self._held[name] = fds
            if self._channel is not None:
                self._ask(Hold(name, len(fds)), fds)

    def held(self, name: str) -> list[int]:
        """Return the descriptors held under a name, perhaps by an earlier daemon; the caller closes them."""
        with self._lock:
            if self._channel is None:
                return []
            return self._exchange(GetHeld(name), ())[1]

    def is_running(self) -> bool:
        """True unless the relay has exited; a relay that was not needed yet counts as running."""
        with self._lock:
            if self._process is not None:
                self._process.poll()  # reaps it
            if self._channel is None:
                return not self._exited
            readable = select.poll()
            readable.register(self._channel, select.POLLIN)
            if not readable.poll(0):  # it sends nothing unasked: all that can come is its end
                return True
            self._lose()
            return False

    def fileno(self) -> int | None:
        """Return a descriptor that hangs up when the relay exits; None if it does not run."""
        channel = self._channel
        return None if channel is None else channel.fileno()

    def close(self) -> None:
        """Close the connection.  A relay without ports ends."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def stop(self) -> None:
        """Let a relay that has no ports end, and make sure that nothing finds it meanwhile."""
        with self._lock:
            self.close()
            self._exited = False
            self._path.unlink(missing_ok=True)

    def _lose(self) -> None:
        self.close()
        self._exited = True
        self.exits += 1

    def _start(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            listener.listen()
            os.chmod(self._path, 0o600)
            command = [sys.executable, "-OO", "-I", "-m", "gangway.relay", json.dumps(self._settings._asdict())]
            self._process = process = subprocess.Popen(
                command,
                stdin=listener.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        status = _read_status(process)
        if status != "0\n" or not self.connect():
            raise HostRefused(f"the relay failed to start: {status.strip() or 'it exited without a reason'}")
        for name, fds in self._held.items():
            self.hold(name, fds)

    def _ask(self, request: Request, fds: Sequence[int] = ()) -> str:
        answer, received = self._exchange(request, fds)
        for fd in received:
            os.close(fd)
        return answer

    def _exchange(self, request: Request, fds: Sequence[int]) -> tuple[str, list[int]]:
        """Send a request; return the answer's text and descriptors.  HostRefused: refused, or no answer."""
        if self._channel is None:
            raise HostRefused("the relay is not running")
        try:
            socket.send_fds(self._channel, [protocol.encode(request)], fds)
            data, received, _flags, _address = socket.recv_fds(
                self._channel, protocol.MAX_ANSWER_BYTES, protocol.MAX_DESCRIPTORS
            )
            if not data:
                raise ConnectionResetError("it exited")
            done, text = protocol.parse_answer(data)
        except (OSError, ProtocolError) as error:
            self._lose()
            reason = f"no answer within {_TIMEOUT_S:.0f} s" if isinstance(error, TimeoutError) else error
            raise HostRefused(f"the relay failed: {reason}") from None
        if not done:
            with suppress(OSError):
                list(map(os.close, received))
            raise HostRefused(f"the relay refused {protocol.encode(request).decode()!r}: {text}")
        return text, received


def _read_status(process: "subprocess.Popen[bytes]") -> str:
    """Return what a starting relay reports: `0\\n`, or why it cannot start.  It is killed when it takes too long."""
    assert process.stdout is not None
    with process.stdout as pipe:
        readable = select.poll()
        readable.register(pipe, select.POLLIN)
        parts: list[bytes] = []
        while readable.poll(_TIMEOUT_S * 1000):
            part = os.read(pipe.fileno(), 4096)
            if not part:
                return b"".join(parts).decode(errors="replace")
            parts.append(part)
    process.kill()
    return f"no status within {_TIMEOUT_S:.0f} s"
