"""A gangway daemon for a network namespace, and commands for it.

    with Namespace("host") as host, Gangway(host) as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")

The daemon's files are in the namespace's runtime folder, where commands in the namespace find it. Leaving the block
deletes the folder and the daemon's networks; if the daemon was killed before, its networks are deleted with the
namespace.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Self
from unittest.mock import patch

from gangway import runtime
from gangway.cli.client import NoDaemon, Refused, ask_running
from gangway.cli.main import main
from lab.closing import Closing
from lab.netns import Namespace, end
from lab.processes import pids_running
from lab.waiting import wait_until

GANGWAY = Path(__file__).parents[1] / ".venv/bin/gangway"


def runtime_folder(namespace: Namespace) -> Path:
    """Return the runtime folder of a namespace's daemon."""
    with namespace.entered():
        return Path(runtime.folder())


class CommandFailed(RuntimeError):
    """A gangway command failed; the message is its standard error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Gangway(Closing):
    """A running daemon; call the object to run a gangway command."""

    def __init__(
        self,
        host: Namespace,
        *flags: str,
        environment: dict[str, str] | None = None,
        within: tuple[str, ...] = (),
    ) -> None:
        """`within` is a command line that the daemon's is appended to, for example `unshare --mount`."""
        self.host = host
        self._flags = flags
        self._within = within
        own = {name: value for name, value in os.environ.items() if not name.startswith("GANGWAY_")}
        self._environment = own | (environment or {})
        self.daemon: subprocess.Popen[Any] | None = None
        self.program = GANGWAY
        """What the next daemon is started with; commands are always this version's."""

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.host.name}-gangway-"))
        self.folder = runtime_folder(self.host)
        self.socket = self.folder / runtime.API_SOCKET
        self.log = self.directory / "log"
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def start(self, *flags: str) -> None:
        """Start the daemon, and wait until it serves. CommandFailed: it exited."""
        words = ("daemon", *(flags or self._flags))
        with self.log.open("a") as log:
            self.daemon = self.host.popen(*self._within, str(self.program), *words, stderr=log, env=self._environment)
        wait_until(lambda: self._serves() or self.daemon.poll() is not None, "the daemon to serve")  # type: ignore[union-attr]
        if self.daemon.poll() is not None:
            raise CommandFailed(self.log.read_text().strip(), self.daemon.returncode)

    def stop(self) -> None:
        """Stop the daemon; the ports that it has published stay published."""
        if self.daemon is not None:
            end(self.daemon)

    def kill(self) -> None:
        """End the daemon with SIGKILL."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def close(self) -> None:
        """Delete the networks, and stop the daemon and the relay."""
        with suppress(CommandFailed):
            if self.daemon is not None and self.daemon.poll() is None:
                for network in self.json("network", "ls"):
                    for endpoint in network["endpoints"]:
                        self("detach", "--if-exists", endpoint["container"])
                    if network["name"] != "gangway0":  # created on demand, and deleted with its last container
                        self("network", "rm", network["name"])
        self.stop()
        for pid in self._remaining():
            with suppress(ProcessLookupError):
                os.kill(pid, 15)
        wait_until(lambda: not self._remaining(), "the relay to exit")
        for folder in (self.directory, self.folder):
            shutil.rmtree(folder, ignore_errors=True)

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a gangway command, and return its result even if it fails."""
        is_running = self.daemon is not None and self.daemon.poll() is None
        if is_running and not options and current_thread() is main_thread() and words[0] != "run":
            return self._run_here(words)
        return self.host.run(str(GANGWAY), *words, **{"check": False, "env": self._environment, **options})

    def _run_here(self, words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """Run a command in this process: starting Python takes ten times as long as most commands."""
        output, errors, code = io.StringIO(), io.StringIO(), None
        with (
            self.host.entered(),
            patch.dict(os.environ, self._environment, clear=True),
            patch("sys.argv", ["gangway", *words]),
            patch("os._exit", sys.exit),
            redirect_stdout(output),
            redirect_stderr(errors),
        ):
            try:
                main()
            except SystemExit as end:
                code = end.code
        return subprocess.CompletedProcess(words, int(code or 0), output.getvalue(), errors.getvalue())

    def __call__(self, *words: str) -> str:
        """Run a gangway command, and return its output. CommandFailed: it failed."""
        done = self.run(*words)
        if done.returncode:
            raise CommandFailed(done.stderr.strip(), done.returncode)
        return done.stdout

    def json(self, *words: str) -> Any:
        """Run a gangway command with `--json`, and return the parsed output."""
        return json.loads(self(*words, "--json"))

    def relays(self) -> list[int]:
        """Return the pids of the relay's processes in the host's namespace."""
        return pids_running("gangway.relay", self.host)

    def _remaining(self) -> list[int]:
        """Return the relay's processes, and a daemon that a command has started after ours had exited."""
        return self.relays() + pids_running("gangway.daemon", self.host)

    def _serves(self) -> bool:
        """True if the daemon answers requests. A gangway command is of no use here: it would start a daemon."""
        try:
            ask_running(str(self.socket), "GET", "/networks")
        except NoDaemon:
            return False
        except Refused as error:
            return error.kind == "Conflict"  # it serves, but its database is lost
        return True
