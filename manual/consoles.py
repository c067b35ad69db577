"""The console blocks of a page: which commands it shows, and what it says that they print.

    ```console
    $ gangway publish box -p 8000:80
    0.0.0.0:8000 -> 172.30.0.2:80/tcp
    client$ curl http://10.77.0.1:8000/
    ```

`$` is a shell on the host, `client$` one on another machine.  A line that begins with `> ` continues the command.  In
the output `…` stands for any text within a line, and a line of nothing else for any number of lines.

This module is pure: nothing is run here.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

ANYTHING = "…"
_BLOCK = re.compile(r"^( *)```console\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_PROMPT = re.compile(r"(client)?\$ (.+)")
_CONTINUED = "> "
# What differs from run to run: process IDs, namespaces' cookies, containers' IDs.
_VARYING = re.compile(r"(?<=\bpid )\d+|(?<=\bnetns-)\d+|\b[0-9a-f]{64}\b")


class Command(NamedTuple):
    """A command of a page."""

    line: int
    """The line of the page that it begins at, counted from 1."""
    is_clients: bool
    """It runs on the other machine."""
    text: str
    output: tuple[str, ...]
    """The lines that the page shows of its output."""
    output_at: int
    """The line that its output begins at."""
    indent: str

    def prints(self, lines: Sequence[str]) -> bool:
        """True if output of these lines is what the page shows."""
        pattern = "".join(map(_pattern, self.output))
        return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None


def commands(page: str) -> list[Command]:
    """Return the commands in a page's console blocks, in their order.  ValueError: a block has output before them."""
    return [command for block in _BLOCK.finditer(page) for command in _in_block(page, block)]


def with_output(page: str, outputs: Sequence[tuple[Command, Sequence[str]]]) -> str:
    """Return the page with the output of these commands in place of what it shows."""
    lines = page.split("\n")
    for command, output in sorted(outputs, reverse=True):
        start = command.output_at - 1
        lines[start : start + len(command.output)] = [f"{command.indent}{line}" for line in output]
    return "\n".join(lines)


def left_open(output: Sequence[str]) -> list[str]:
    """Return output without what differs from run to run."""
    return [_VARYING.sub(ANYTHING, line) for line in output]


def _in_block(page: str, block: re.Match[str]) -> Iterator[Command]:
    indent, first = block[1], page.count("\n", 0, block.start(2)) + 1
    lines = [line.removeprefix(indent) for line in block[2].splitlines()]
    at = 0
    while at < len(lines):
        prompt = _PROMPT.fullmatch(lines[at])
        if prompt is None:
            raise ValueError(f"line {first + at}: {lines[at]!r} is not a command")
        end = _end(lines, at + 1, lambda line: line.startswith(_CONTINUED))
        text = "\n".join([prompt[2], *(line.removeprefix(_CONTINUED) for line in lines[at + 1 : end])])
        after = _end(lines, end, lambda line: not _PROMPT.fullmatch(line))
        yield Command(first + at, bool(prompt[1]), text, tuple(lines[end:after]), first + end, indent)
        at = after


def _end(lines: Sequence[str], start: int, belongs: Callable[[str], bool]) -> int:
    """Return the first place from `start` on whose line does not belong there."""
    return next((at for at in range(start, len(lines)) if not belongs(lines[at])), len(lines))


def _pattern(line: str) -> str:
    if line == ANYTHING:
        return r"(?:.*\n)*"
    return ".*".join(map(re.escape, line.split(ANYTHING))) + r"\n"
