"""The command line of `gangway`: which command is meant, and how its failure is reported.

Most of a command's time is spent on imports, and `gangway publish` runs a hundred times when a host is set up.  So
argparse gets the options of one command only.
"""

from __future__ import annotations

import argparse
import os
import sys

from gangway import __version__
from gangway.cli.client import Refused, socket_path
from gangway.cli.commands import COMMANDS, FAILED, GROUPS
from gangway.cli.options import SOCKET
from gangway.cli.views import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from gangway.cli.commands import Function

_INVALID = 2


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of a fixed width: the default is the terminal's, by shutil, which is slow to import."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=80)


class _Parser(argparse.ArgumentParser):
    """A parser whose every error is one line."""

    def __init__(self, name: str, usage: str | None = None) -> None:
        super().__init__(
            f"gangway {name}".strip(), usage=usage, allow_abbrev=False, add_help=False, formatter_class=_Formatter
        )
        self._name = name
        self.add_argument("-h", "--help", action="help", help="Show this help.")

    def format_help(self) -> str:
        from gangway.cli import manual

        self.description, self.epilog = manual.description(self._name), manual.epilog(self._name)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (see {self.prog} --help)", _INVALID))


def main() -> NoReturn:
    """Carry out the command that was typed, and exit: with 0, 1 if it failed, or 2 if it is invalid."""
    try:
        function, given = parse(sys.argv[1:])
        function(**given)
        if sys.stdout is not None:  # it is None if the command was started with it closed
            sys.stdout.flush()
        os._exit(0)  # Python would free each object first, which takes as long as the daemon's answer
    except Refused as error:
        sys.exit(_fail(str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", FAILED))
    except OSError as error:  # of our own output: other errors are turned into Refused where they arise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to write again at its end
        if not isinstance(error, BrokenPipeError):  # else its reader has exited, and wants no more
            _fail(f"cannot write the output: {error.strerror}", FAILED)
        sys.exit(FAILED)


def parse(words: Sequence[str]) -> tuple[Function, dict[str, Any]]:
    """Return the function of the command in `words`, and its arguments.

    SystemExit: the words are invalid, and that was reported; or they ask for help, and that was printed.
    """
    if words[:1] == ["__complete"]:
        return _complete, {"words": words[1:]}
    leading, words = split_leading_socket(words)
    is_group = words and words[0] in GROUPS and (words[0] not in COMMANDS or " ".join(words[:2]) in COMMANDS)
    count = 2 if is_group else 1
    name = " ".join(words[:count])
    if name not in COMMANDS:
        _overview(words[0] if count == 2 else "", leading, words[count - 1 :])
    given = vars(command_parser(name).parse_args([*leading, *words[count:]]))
    if "path" in given:
        given["path"] = given["path"] or socket_path()
    return COMMANDS[name][0], given


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command's options."""
    parser = _Parser(name)
    for names, settings in COMMANDS[name][1]:
        parser.add_argument(*names, **settings)
    return parser


def split_leading_socket(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Split words into the options `--socket` before the command, and the rest."""
    count = 0
    while count < len(words) and words[count].partition("=")[0] == "--socket":
        count += 1 if "=" in words[count] else 2
    return words[:count], words[count:]


def _complete(words: Sequence[str]) -> None:
    from gangway.cli.completion import complete  # it imports this module, and few need it

    complete(words)


def _overview(group: str, leading: Sequence[str], words: Sequence[str]) -> NoReturn:
    """Print help, the version, or an error for words that name no command."""
    parser = _Parser(group, f"gangway {group} COMMAND ..." if group else "gangway [--socket PATH] COMMAND ...")
    if not group:
        parser.add_argument("--version", action="version", version=f"gangway {__version__}", help="Show it.")
        names, settings = SOCKET
        parser.add_argument(*names, **settings)
    if not words or words[0].startswith("-"):
        parser.parse_args([*(() if group else leading), *words])
    if words:
        parser.error(f"unknown command {' '.join((group, words[0])).strip()!r}")
    parser.print_help(sys.stderr)
    sys.exit(_INVALID)


def _fail(text: str, code: int) -> int:
    say(" ".join(text.split("\n")))
    return code
