"""The daemon's end of its relay: starting one, handing ports over, taking them back.

What this file knows: the messages of `gangway.relay.kept`, and how a relay is started.  What it must not know:
mappings, how the relay works.

How it works.  The relay is a process apart, which outlives the daemon: it listens on a unix socket of its own, and a
daemon that starts looks there first.  One that has neither a port nor a daemon ends by itself.
"""

import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gangway.errors import HostRefused
from gangway.reconcile.diff import HostPorts, Target
from gangway.relay.kept import MOST_HELD, OWN, SHARED
from gangway.relay.settings import Settings

_MESSAGE_BYTES = 65536
_PATIENCE_S = 10.0


class Relay:
    """The relay behind the unix socket `path`.  HostRefused: it does not do as it is told."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self._settings = settings
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_lost = False
        self._held: dict[str, Sequence[int]] = {}
        self._shared: int | None = None
        """None: it was not asked yet."""

    def find(self) -> bool:
        """Connects to a relay that runs already; False if there is none."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel.settimeout(_PATIENCE_S)
        try:
            channel.connect(str(self._path))
        except OSError:
            channel.close()
            return False
        self._channel = channel
        self._is_lost = False
        self._shared = None
        return True

    def kept(self) -> Iterator[tuple[HostPorts, Target]]:
        """The ports that it keeps."""
        offset = 0
        while self._channel is not None:
            _ok, *lines = self._ask(f"kept {offset}").splitlines()
            yield from map(self._kept, lines)
            if not lines:
                return
            offset += len(lines)

    def keep(self, ports: HostPorts, target: Target, sock: socket.socket | None) -> None:
        """Hands ports over, with the socket of their own if they have one."""
        if (self._channel is None or not self.is_running()) and not self.find():
            self._start()
        text = f"keep {_words(ports)} {target.address} {target.first} {SHARED if target.is_steered else OWN}"
        self._expect_ok(text, [] if sock is None else [sock.fileno()])

    def drop(self, ports: HostPorts) -> None:
        """Takes ports back; their connections end.  With a relay that is gone, they have."""
        if self.is_running() and self._channel is not None:
            answer = self._ask(f"drop {_words(ports)}")
            if answer != "ok" and not answer.endswith("is not kept"):
                raise HostRefused(f"the relay does not let go of {_words(ports)}: {answer}")

    def share(self, protocol: str, family: int, fds: Sequence[int]) -> None:
        """The socket that serves all ports of a protocol and family that have none of their own; with UDP also the map
        in which to say what is bound.  They stay the caller's, too."""
        self._expect_ok(f"share {protocol} {family} {len(fds)}", fds)
        self._shared = None

    def shared_count(self) -> int:
        """How many of those sockets this relay was given, perhaps by another daemon."""
        if self._channel is None:
            return 0
        if self._shared is None:
            with self._same_version():
                self._shared = int(self._ask("shared").removeprefix("ok "))
        return self._shared

    def hold(self, name: str, fds: Sequence[int]) -> None:
        """Descriptors that are to stay open for as long as a relay does, in place of those before of that name: in this
        relay, and in each that comes after it.  They stay the caller's, too."""
        self._held[name] = fds
        if self._channel is not None:
            self._expect_ok(f"hold {name} {len(fds)}", fds)

    def held(self, name: str) -> list[int]:
        """Those that it holds, perhaps from another daemon; the caller's to close.  None if the relay is gone."""
        with suppress(HostRefused), self._talking() as channel:
            channel.send(f"held {name}".encode())
            _answer, fds, _flags, _address = socket.recv_fds(channel, _MESSAGE_BYTES, MOST_HELD)
            return fds
        return []

    def is_running(self) -> bool:
        """Whether it is there; a relay that nobody has needed yet does not count as dead."""
        if self._process is not None:
            self._process.poll()
        if self._channel is None:
            return not self._is_lost
        waiting = select.poll()
        waiting.register(self._channel, select.POLLIN)
        if not waiting.poll(0):  # it says nothing unasked: all that can come is its end
            return True
        self._lose()
        return False

    def fileno(self) -> int | None:
        """A descriptor that is readable when the relay has ended; None while there is no relay."""
        return None if self._channel is None else self._channel.fileno()

    def close(self) -> None:
        """Lets go of it; one without ports ends."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def end(self) -> None:
        """There is no port left: it ends by itself, and nobody shall look for it."""
        self.close()
        self._is_lost = False
        self._path.unlink(missing_ok=True)

    def _lose(self) -> None:
        self.close()
        self._is_lost = True

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
        assert process.stdout is not None
        with process.stdout as status:
            said = status.read().decode(errors="replace")
        if said != "0\n" or not self.find():
            raise HostRefused(f"the relay does not start: {said.strip() or 'it says nothing'}")
        for name, fds in self._held.items():
            self.hold(name, fds)

    def _expect_ok(self, text: str, fds: Sequence[int]) -> None:
        answer = self._ask(text, fds)
        if answer != "ok":
            raise HostRefused(f"the relay refused {text!r}: {answer.removeprefix('error ')}")

    def _ask(self, text: str, fds: Sequence[int] = ()) -> str:
        with self._talking() as channel:
            socket.send_fds(channel, [text.encode()], fds)
            answer = channel.recv(_MESSAGE_BYTES)
        if not answer:
            self._lose()
            raise HostRefused("the relay has ended")
        return answer.decode()

    def _kept(self, line: str) -> tuple[HostPorts, Target]:
        with self._same_version():
            protocol, address, first, last, to, to_first, how = line.split()
            return HostPorts(protocol, address, int(first), int(last)), Target(to, int(to_first), how == SHARED)

    @contextmanager
    def _same_version(self) -> Iterator[None]:
        """HostRefused: an answer does not make sense, so it is another version's."""
        try:
            yield
        except ValueError:
            pid = struct.unpack("iII", self._peer())[0]
            raise HostRefused(
                f"the relay that runs (pid {pid}) is of another version of gangway: end it, and start anew"
            ) from None

    def _peer(self) -> bytes:
        """Its pid, uid and gid: struct ucred, unix(7)."""
        return self._channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12) if self._channel else bytes(12)

    @contextmanager
    def _talking(self) -> Iterator[socket.socket]:
        if self._channel is None:
            raise HostRefused("the relay is gone")
        try:
            yield self._channel
        except OSError as error:
            self._lose()
            raise HostRefused(f"the relay does not answer: {error}") from None


def _words(ports: HostPorts) -> str:
    return " ".join(map(str, ports))
