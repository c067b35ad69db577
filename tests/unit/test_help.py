"""Help: it is complete, fits a terminal, and its examples are valid."""

import shlex
from collections.abc import Iterator

import pytest

from gangway.cli import manual
from gangway.cli.commands import COMMANDS, GROUPS
from gangway.cli.main import parse
from gangway.model import parse_port


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse([*name.split(), "--help"])
    return capsys.readouterr().out


def command_lines(example: str) -> Iterator[list[str]]:
    """Yield the words of each gangway command in an example, without `gangway`."""
    lexer = shlex.shlex(example, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, "|"]:
        if not set(word) <= set("&|;"):
            words.append(word)
        else:
            if "gangway" in words:
                is_fed = words[0] == "xargs"  # with ports
                yield [*words[words.index("gangway") + 1 :], *(["8000:80"] if is_fed else [])]
            words = []


def test_every_command_has_a_section_and_two_examples() -> None:
    named = [name for section in manual.SECTIONS.values() for name in section]
    assert sorted(named) == sorted(COMMANDS), "add the command to gangway.cli.manual.SECTIONS, with two examples"
    assert not [name for name, pairs in manual.EXAMPLES.items() if len(pairs) < 2]


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name, pairs in manual.EXAMPLES.items() for line, _ in pairs]
)
def test_examples_are_valid(name: str, line: str) -> None:
    functions = []
    for words in command_lines(line):
        if words == ["--version"]:
            continue
        function, given = parse(words)
        functions.append(function)
        for text in given.get("ports", ()):
            parse_port(text)
    assert COMMANDS[name][0] in functions or "--version" in line


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS, ""])
def test_help_fits_80_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(name, capsys)
    assert max(map(len, text.splitlines())) <= manual.WIDTH


def test_help_of_a_command_has_examples_and_the_grammar_of_ports(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        text = help_of(name, capsys)
        assert all(f"\n  {line}\n" in text for line, _ in manual.EXAMPLES[name])
        assert ("\nPORTS, by example:\n  8000:80  " in text) == (name in ("publish", "unpublish", "run"))


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("", capsys)
    assert all(f"\n  {name}  " in text for name in COMMANDS)


def test_help_of_a_group_names_its_commands_only(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("network", capsys)
    assert "\n  network create  " in text
    assert "publish" not in text


@pytest.mark.parametrize("ports", [ports for ports, _ in manual.PORTS])
def test_the_grammar_of_ports_is_the_parsers(ports: str) -> None:
    parse_port(ports)
