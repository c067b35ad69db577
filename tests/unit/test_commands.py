"""The plain form of `publish` is read as the whole command line reads it, or left to that."""

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.cli.client import DEFAULT_SOCKET, socket_path
from gangway.cli.commands import publish
from gangway.cli.quick import Plain, line, parse

PLAIN = ("publish", "-p", "--publish", "--socket", "web", "box", "8000:80", "[::1]:8000:80/udp", "/run/g.sock", "")
OTHER = ("-p80", "--publish=80", "--pub", "--socket=/run/g.sock", "-", "--", "-h", "--help", "--json", "-x")
WORDS = st.sampled_from(PLAIN + OTHER)
# What mostly makes sense: options with what belongs to them.
PHRASES = st.sampled_from(
    [("-p", "80"), ("--publish", "80/udp"), ("-p", "-1"), ("-p", ""), ("--socket", "/run/g.sock"), ("web",), ("--",)]
)
LINES = st.lists(PHRASES, max_size=6).map(lambda phrases: [word for phrase in phrases for word in phrase])


@pytest.fixture(autouse=True, params=["", "/run/other.sock"])
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Without and with GANGWAY_SOCKET."""
    monkeypatch.setenv("GANGWAY_SOCKET", request.param)
    return str(request.param)


def by_click(words: list[str]) -> Plain | None:
    """What the whole command line makes of the words after `gangway`; None, if it does anything but publish."""
    if not words or words[0] != "publish":
        return None
    try:
        found = publish.make_context("publish", words[1:]).params
    except (click.exceptions.Exit, click.ClickException):
        return None
    return (found["path"], found["container"], list(found["ports"])) if found["ports"] else None


def assert_agree(words: list[str]) -> None:
    plain = parse(words)
    assert plain is None or plain == by_click(words)


@given(st.lists(WORDS | st.text(max_size=3), max_size=9))
def test_any_words_are_read_alike_or_left(words: list[str]) -> None:
    assert_agree(["publish", *words])
    assert_agree(words)


@given(LINES)
def test_likely_words_are_read_alike_or_left(words: list[str]) -> None:
    assert_agree(["publish", *words])
    assert_agree(words)


@given(LINES.filter(lambda words: "--" not in words))
def test_the_plain_form_is_not_left(words: list[str]) -> None:
    assert parse(["publish", *words]) == by_click(["publish", *words])


@pytest.mark.parametrize(
    ("words", "path", "container", "ports"),
    [
        ("publish web -p 8000:80", None, "web", ["8000:80"]),
        ("publish -p 8000:80 web", None, "web", ["8000:80"]),
        ("publish web -p 8000:80 -p 53:53/udp", None, "web", ["8000:80", "53:53/udp"]),
        ("publish web --publish 80", None, "web", ["80"]),
        ("publish --socket /run/g.sock web -p 80", "/run/g.sock", "web", ["80"]),
        ("publish web -p 80 --socket a --socket b", "b", "web", ["80"]),
        ("publish web -p -1", None, "web", ["-1"]),
        ("publish publish -p 80", None, "publish", ["80"]),
    ],
)
def test_the_plain_form(words: str, path: str | None, container: str, ports: list[str]) -> None:
    assert parse(words.split()) == (path or socket_path(), container, ports)
    assert_agree(words.split())


@pytest.mark.parametrize(
    "words",
    [
        "",
        "publish",
        "publish web",
        "publish -p 80",
        "publish web box -p 80",
        "publish web -p",
        "publish web -p 80 --socket",
        "publish web -p80",
        "publish web --publish=80",
        "publish web -p 80 --json",
        "publish web -p 80 -h",
        "publish -- web -p 80",
        "unpublish web -p 80",
        "--version publish web -p 80",
    ],
)
def test_anything_else_is_left(words: str) -> None:
    assert parse(words.split()) is None


def test_an_empty_socket_is_left() -> None:
    assert parse(["publish", "web", "-p", "80", "--socket", ""]) is None


def test_the_socket_is_the_environments_or_the_usual_one(environment: str) -> None:
    assert socket_path() == (environment or DEFAULT_SOCKET)


@pytest.mark.parametrize(
    ("host", "container", "wanted"),
    [
        (("0.0.0.0", "8000"), ("172.30.0.2", "80"), "0.0.0.0:8000 -> 172.30.0.2:80/tcp"),
        (("::", "8000-8010"), ("fd30::2", "80-90"), "[::]:8000-8010 -> [fd30::2]:80-90/tcp"),
    ],
)
def test_a_mapping_is_a_line(host: tuple[str, str], container: tuple[str, str], wanted: str) -> None:
    mapping = {"host_address": host[0], "host_ports": host[1], "protocol": "tcp"}
    assert line(mapping | {"container_address": container[0], "container_ports": container[1]}) == wanted
