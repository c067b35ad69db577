"""A gangway daemon of its own for a network namespace, and the command line to it.

    with Namespace("host") as host, Gangway(host) as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")

The daemon's socket and state are in a directory that goes with it.  So do its networks, unless it is killed before;
then they go with the namespace.
"""

import json
import os
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.netns import Namespace, end
from lab.processes import pids_running
from lab.waiting import wait_until

GANGWAY = Path(__file__).parents[1] / ".venv/bin/gangway"


class CommandFailed(RuntimeError):
    """A gangway command failed; the message is what it said."""

    def __init__(self, said: str, code: int) -> None:
        super().__init__(said)
        self.code = code


class Gangway:
    """A running daemon; call it to run a command."""

    def __init__(
        self,
        host: Namespace,
        *flags: str,
        environment: dict[str, str] | None = None,
        within: tuple[str, ...] = (),
    ) -> None:
        """`within`: a command that runs the daemon's, somewhere else perhaps."""
        self.host = host
        self._flags = flags
        self._within = within
        self._environment = {**os.environ, **(environment or {})}
        self.daemon: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.host.name}-gangway-"))
        self.socket = self.directory / "gangway.sock"
        self.log = self.directory / "log"
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, *flags: str) -> None:
        """Starts the daemon, and waits until it serves; CommandFailed if it does not."""
        words = ("daemon", "--socket", str(self.socket), *(flags or self._flags))
        with self.log.open("a") as log:
            self.daemon = self.host.popen(*self._within, str(GANGWAY), *words, stderr=log, env=self._environment)
        wait_until(lambda: self._serves() or self.daemon.poll() is not None, "the daemon")  # type: ignore[union-attr]
        if self.daemon.poll() is not None:
            raise CommandFailed(self.log.read_text().strip(), self.daemon.returncode)

    def stop(self) -> None:
        """Ends the daemon; what it has published stays."""
        if self.daemon is not None:
            end(self.daemon)

    def kill(self) -> None:
        """Ends it without a word."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def close(self) -> None:
        """Ends everything: networks, daemon, relay."""
        with suppress(CommandFailed):
            if self.daemon is not None and self.daemon.poll() is None:
                for endpoint in self.json("network", "ls"):
                    for attached in endpoint["endpoints"]:
                        self("detach", attached["container"])
                    if endpoint["name"] != "gangway0":
                        self("network", "rm", endpoint["name"])
        self.stop()
        for pid in self._left():
            with suppress(ProcessLookupError):
                os.kill(pid, 15)
        wait_until(lambda: not self._left(), "the relay's end")
        for path in self.directory.iterdir():
            path.unlink()
        self.directory.rmdir()

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, whatever comes of it."""
        environment = {**self._environment, "GANGWAY_SOCKET": str(self.socket)}
        return self.host.run(str(GANGWAY), *words, **{"check": False, "env": environment, **options})

    def __call__(self, *words: str) -> str:
        """Runs a command, and gives what it printed.  CommandFailed: it failed."""
        done = self.run(*words)
        if done.returncode:
            raise CommandFailed(done.stderr.strip(), done.returncode)
        return done.stdout

    def json(self, *words: str) -> Any:
        """What a listing says."""
        return json.loads(self(*words, "--json"))

    def relays(self) -> list[int]:
        """The pids of the relay's processes in the host's namespace."""
        return pids_running("gangway.relay", self.host)

    def _left(self) -> list[int]:
        """The relay's processes, and a daemon that a command has started after ours had ended."""
        return self.relays() + pids_running("gangway.daemon", self.host)

    def _serves(self) -> bool:
        """Whether somebody listens.  Not by a command: that would start a daemon where there is none."""
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0
