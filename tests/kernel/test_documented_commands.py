"""Every command that the README and the documentation show is run, and prints what they show.

`python3 -m manual PAGE` writes the output of a page's commands into it.  What is not run, and why: manual/pages.py.
"""

from pathlib import Path

import pytest

from manual import roads
from manual.consoles import commands
from manual.pages import PAGES, ROADS, TOP, is_run, played

pytestmark = [pytest.mark.any_kernel, pytest.mark.timeout(120)]

_RUN = [path for path in PAGES if any(map(is_run, commands(path.read_text())))]


@pytest.mark.parametrize("path", _RUN, ids=lambda path: str(path.relative_to(TOP)))
def test_commands_print_what_the_page_shows(path: Path) -> None:
    for command, lines, code in played(path.read_text()):
        where = f"{path.relative_to(TOP)}:{command.line}: {command.text}"
        assert command.prints(lines), "\n".join([where, *lines])
        assert code == 0 or command.output, f"{where}: exit code {code}"


def test_the_picture_shows_the_roads_that_the_daemon_explains() -> None:
    assert ROADS.read_text() == roads.draw(roads.explained()), "run: python3 -m manual"
