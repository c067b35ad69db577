"""`gangway config`: the settings, with a daemon and without."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from gangway.cli.client import NoDaemon, Refused, ask_running
from gangway.cli.views import say
from gangway.daemon.config import load
from gangway.daemon.declared_files import check_files, folder_for
from gangway.daemon.in_force import in_force
from gangway.daemon.start import Start
from gangway.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def check(file: str | None) -> None:
    """Check the settings in a file, or else in the usual one, and in the environment, and the files of conf.d.

    Refused: they are invalid.
    """
    try:
        loaded = load(None if file is None else Path(file), {}, os.environ)
    except InvalidRequest as error:
        raise Refused("InvalidRequest", str(error)) from None
    problems = check_files(folder_for(file))
    for text in (*loaded.warnings, *problems[:-1]):
        say(text)
    if problems:
        raise Refused("InvalidRequest", problems[-1])
    print("OK")


def settings(path: str) -> list[Any]:
    """Return the settings of the daemon that listens at `path`, as GET /config has them.

    Without one, they are what a daemon on demand would start with.  Refused: these are invalid.
    """
    try:
        found: list[Any] = ask_running(path, "GET", "/config")
    except NoDaemon:
        say("no daemon runs; one that is started on demand would use these settings:")
        start = Start()
        start.apply_last()
        try:
            loaded = start.load(os.environ)
        except InvalidRequest as error:
            raise Refused("InvalidRequest", str(error)) from None
        for warning in loaded.warnings:
            say(warning)
        found = [msgspec.to_builtins(one) for one in in_force(loaded, loaded, is_relay_former=False)]
    return found
