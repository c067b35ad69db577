"""The pages whose commands are run: all in docs/, and the README."""

import re
from collections.abc import Sequence
from pathlib import Path

from manual.consoles import Command, commands
from manual.place import Place

TOP = Path(__file__).resolve().parents[1]
PAGES = (TOP / "README.md", *sorted((TOP / "docs").rglob("*.md")))
ROADS = TOP / "docs/roads.svg"
NOT_RUN = {
    r"(sudo )?apt(-get)? .*": "installs packages on the machine",
    r"make .*": "builds and tests all of gangway: CI runs it",
}
"""What commands of the pages cannot run in a test, as regular expressions, and why."""


def is_run(command: Command) -> bool:
    """True if a command of a page can be run."""
    return not any(re.fullmatch(pattern, command.text) for pattern in NOT_RUN)


def played(page: str) -> list[tuple[Command, Sequence[str], int]]:
    """Run the commands of a page one after the other; return each with the lines that it printed and its exit code."""
    runnable = [command for command in commands(page) if is_run(command)]
    if not runnable:
        return []
    with Place() as place:
        return [(command, *place.run(command)) for command in runnable]
