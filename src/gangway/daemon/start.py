"""How a daemon is started, and how the last one was: start.json in the runtime folder."""

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from gangway import runtime
from gangway.daemon import config
from gangway.daemon.config import Loaded


class Start(msgspec.Struct, omit_defaults=True):
    """What a daemon is given; its own environment overrides `environment`."""

    socket: str | None = None
    options: dict[str, str | bool | list[str] | dict[str, bool]] = {}
    config: str | None = None
    environment: dict[str, str] = {}
    until_idle: bool = False
    ready_fd: int | None = None

    def load(self, environment: Mapping[str, str]) -> Loaded:
        """Return the settings, given the process's environment.  InvalidRequest: they are invalid."""
        path = Path(self.config) if self.config else None
        return config.load(path, self.options, self.environment | config.variables(environment))

    def apply_last(self) -> None:
        """Use socket, options, settings file and environment of the daemon that an operator started last, where none
        are given."""
        with suppress(OSError, ValueError), open(_path(), "rb") as file:
            if os.fstat(file.fileno()).st_uid == os.geteuid():
                last = msgspec.json.decode(file.read(), type=Start)
                self.socket = self.socket or last.socket
                self.options = self.options or last.options
                self.config = self.config or last.config
                self.environment = last.environment

    def command_line(self) -> str:
        """Return the command that starts a daemon like this one."""
        words = ["gangway", "daemon"]
        for name, value in self.options.items():
            if isinstance(value, list):
                words += [word for one in value for word in (f"--{name}", one)]
            elif isinstance(value, str):
                words += [f"--{name}", value]
            else:  # a flag: there is one for a setting that is false, and one for a table
                words.append(f"--no-{name}" if value is False else f"--{name}")
        for name, path in (("config", self.config), ("socket", self.socket)):
            words += [f"--{name}", path] if path else []
        return shlex.join(words)

    def record(self, environment: Mapping[str, str]) -> None:
        """Record how an operator has started the daemon, for those that are started on demand."""
        recorded = Start(self.socket, self.options, self.config, config.variables(environment))
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with suppress(OSError), open(os.open(_path(), flags, 0o600), "wb") as file:
            file.write(msgspec.json.encode(recorded))


def _path() -> str:
    return os.path.join(runtime.folder(), runtime.START)
