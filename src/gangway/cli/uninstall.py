"""`gangway down` and `gangway uninstall-check`: the end of gangway in a network namespace."""

from __future__ import annotations

import sys

from gangway.cli.client import Refused, ask
from gangway.cli.lifecycle import end_daemon, status
from gangway.cli.views import say
from gangway.daemon.remains import Remain, remains
from gangway.errors import GangwayError

_YES = ("y", "yes")


def down(path: str, is_confirmed: bool) -> None:
    """Remove everything of gangway's, and end the daemon that listens at `path`; ask first, unless it `is_confirmed`.

    Refused: something is left, or nobody can be asked.
    """
    is_asked = not is_confirmed
    if is_asked and not (sys.stdin and sys.stdin.isatty()):
        raise Refused(
            "InvalidRequest", "this removes everything of gangway's: add --yes, as there is no terminal to ask"
        )
    planned = ask(path, "GET", "/down")
    if is_asked:
        print("This will be removed:", *_indented(planned["removed"]), *_notes(planned["advice"]), sep="\n")
        print("Remove it? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in _YES:
            return say("nothing was removed")
    found = status(path)
    done = end_daemon(path, found, "/down") if found else None
    if done is None:
        raise Refused("Conflict", f"the daemon at {path} has just ended: try again")
    print("Removed:", *_indented(done["removed"]), *_notes(done["advice"]), sep="\n")


def left() -> list[Remain]:
    """Return what there is of gangway's in this network namespace.  Refused: that cannot be found out."""
    try:
        return remains()
    except GangwayError as error:
        raise Refused(type(error).__name__, str(error)) from None


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _notes(advice: list[str]) -> list[str]:
    return ["Note:", *_indented(advice)] if advice else []
