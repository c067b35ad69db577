"""What programs make of the documentation, and that pages name what exists."""

import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from gangway.cli.commands import COMMANDS, GROUPS
from gangway.daemon.config import Config
from gangway.daemon.operations import OPERATIONS
from gangway.relay.settings import TABLE
from manual import chart, reference, roads
from manual.chart import CHART, RESULTS
from manual.consoles import commands, left_open, with_output
from manual.pages import NOT_RUN, PAGES, TOP, is_run
from manual.roads import Client

_PAGE = """\
Text
```console
$ gangway publish box \\
>     -p 8000:80
0.0.0.0:8000 -> 172.30.0.2:80/tcp
client$ curl http://10.77.0.1:8000/
```
1. In a list
   ```console
   $ ls
   pid …
   …
   the end
   ```
"""


def test_a_page_shows_commands_and_their_output() -> None:
    publish, curl, ls = commands(_PAGE)
    assert publish.text == "gangway publish box \\\n    -p 8000:80"
    assert publish.output == ("0.0.0.0:8000 -> 172.30.0.2:80/tcp",)
    assert (publish.is_clients, curl.is_clients) == (False, True)
    assert (curl.output, ls.text, ls.line) == ((), "ls", 10)


def test_output_may_be_left_open() -> None:
    *_, curl, ls = commands(_PAGE)
    assert ls.prints(["pid 310", "the end"])
    assert ls.prints(["pid 310", "more", "more", "the end"])
    assert not ls.prints(["the end"])
    assert curl.prints([])
    assert not curl.prints(["an error"])


def test_output_is_written_into_the_page() -> None:
    publish, curl, ls = commands(_PAGE)
    page = with_output(_PAGE, [(publish, ["one", "two"]), (curl, ["three"]), (ls, [])])
    assert [one.output for one in commands(page)] == [("one", "two"), ("three",), ()]
    assert "   $ ls\n   ```" in page
    assert with_output(page, [(one, one.output) for one in commands(page)]) == page


def test_what_differs_from_run_to_run_is_left_open() -> None:
    lines = ["daemon (pid 310)", "/run/gangway/netns-4711/gangway.sock", "c9" * 32, "0.0.0.0:8000"]
    assert left_open(lines) == ["daemon (pid …)", "/run/gangway/netns-…/gangway.sock", "…", "0.0.0.0:8000"]


def test_output_without_a_command_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2: 'ls' is not a command"):
        commands("```console\nls\n```\n")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(TOP)))
def test_pages_name_what_exists(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (path.parent / target).exists(), target
    for words in re.findall(r"`gangway ([a-z][^`]*)`", text):
        _check_command(words)
    for command in commands(text):
        for words in re.findall(r"^gangway ([a-z].*)$", command.text, re.MULTILINE):
            _check_command(words)


def _check_command(words: str) -> None:
    """Check that there are this command and its options."""
    given = words.split(" -- ")[0].split()
    names = [" ".join(given[:count]).split("|")[0] for count in (2, 1)]
    name = next((one for one in names if one in COMMANDS or one in GROUPS), None)
    assert name is not None, f"gangway {words}"
    if name in COMMANDS:
        known = {option for options, _ in COMMANDS[name][1] for option in options}
        assert {one for one in given if one.startswith("-")} <= known | {"--help"}, f"gangway {words}"


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    texts = [command.text for path in PAGES for command in commands(path.read_text()) if not is_run(command)]
    assert [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, text) for text in texts)] == []


def test_the_chart_is_of_the_present_results() -> None:
    assert CHART.read_text() == chart.draw(RESULTS.read_text()), "run: python3 -m manual.chart"


def test_the_chart_has_every_rate_that_is_compared_with_docker_proxy() -> None:
    found = chart.groups(RESULTS.read_text())
    bars = {bar.what: bar.ratio for group in found for bar in group.bars}
    assert len(found) >= 4
    assert "request/response, 64 connections" in bars
    assert not any("latency" in what or "memory" in what for what in bars)
    with pytest.raises(ValueError, match="no table"):
        chart.draw("# Results\n")


def test_the_roads_are_drawn() -> None:
    clients = [
        Client("a process on the host", "127.0.0.1:8000", "redirect", "gateway"),
        Client("another machine", "10.77.0.1:8000", "nat", "client"),
    ]
    drawn = roads.draw(clients)
    ElementTree.fromstring(drawn)
    assert "127.0.0.1:8000, seen as the gateway" in drawn
    assert "10.77.0.1:8000, seen as itself" in drawn
    assert ">relay<" not in drawn


def test_the_reference_is_complete() -> None:
    shown = reference.commands()
    assert all(f"## gangway {name}\n" in shown for name in COMMANDS)
    assert "usage: gangway publish" in shown
    settings = reference.settings()
    keys = {field.encode_name for field in msgspec.structs.fields(Config)} - {"relay", "docker"}
    assert all(f"`{key} = " in settings for key in (*keys, *TABLE))
    shown = reference.operations()
    assert all(f"## {' '.join(operation.route)}\n" in shown for operation in OPERATIONS)
