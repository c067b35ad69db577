"""Completion of command lines: which words may follow, and what bash makes of them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.cli import completion
from gangway.cli.commands import COMMANDS
from gangway.cli.completion import candidates
from lab.shells import complete
from tests.unit.answering import ANSWERS, COMPLETED, answering

SCRIPTS = Path(__file__).parents[2] / "packaging/completions"


def get(target: str) -> Any:
    return ANSWERS.get(target, [])


def words_after(line: str, get: completion.Get = get) -> list[str]:
    """Return the candidates for the last word of a line, which is empty after a space."""
    return [word for word, _ in candidates(line.split(" ")[1:], get)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gangway pu", ["publish"]),
        ("gangway network ", ["create", "inspect", "ls", "rm"]),
        ("gangway network r", ["rm"]),
        ("gangway --socket /run/x network r", ["rm"]),
        ("gangway --so", ["--socket"]),
        ("gangway --socket /ru", [":files"]),
        ("gangway daemon --no", ["--no-ip-forward"]),
        ("gangway daemon re", ["reload", "restart"]),
        ("gangway daemon --firewall ", ["auto", "nftables", "iptables", "none"]),
        ("gangway daemon --state=/v", [":files"]),
        ("gangway network rm ", ["web", "back"]),
        ("gangway network rm w", ["web"]),
        ("gangway network create ", []),
        ("gangway attach box --network ", ["web", "back"]),
        ("gangway attach box --network=b", ["--network=back"]),
        ("gangway detach box --network ", ["web", "back"]),
        ("gangway detach docker:db --network ", ["back"]),
        ("gangway publish ", ["box", "docker:db", "x;id"]),
        ("gangway publish /run/n", [":files"]),
        ("gangway publish -p 80 b", ["box"]),
        ("gangway publish box ", []),
        ("gangway publish box -p ", []),
        ("gangway unpublish box -p ", ["0.0.0.0:8000:80/tcp", "[::1]:5060-5070:5060-5070/udp"]),
        ("gangway unpublish box -p [", ["[::1]:5060-5070:5060-5070/udp"]),
        ("gangway unpublish -p ", []),
        ("gangway explain ", ["0.0.0.0:8000/tcp", "[::1]:5060/udp"]),
        ("gangway explain x --from ", ["loopback", "host", "remote", "container"]),
        ("gangway ls --filter ro", ["road="]),
        ("gangway ls --filter road=re", ["road=redirect", "road=relay"]),
        ("gangway ls --filter network=", ["network=web", "network=back"]),
        ("gangway ls --filter=container=b", ["--filter=container=box"]),
        ("gangway ls -- -", []),
        ("gangway run ", [":commands"]),
        ("gangway run --name ", []),
        ("gangway run -- ", [":commands"]),
        ("gangway run cat --", [":files"]),
        ("gangway config check ", [":files"]),
        ("gangway frob ", []),
        ("gangway network frob ", []),
    ],
)
def test_candidates(line: str, words: list[str]) -> None:
    assert words_after(line) == words


def test_first_words_are_the_commands() -> None:
    assert set(words_after("gangway ")) == {name.split()[0] for name in COMMANDS}


def test_names_are_asked_for_only_if_they_are_needed() -> None:
    def refuse(target: str) -> Any:
        raise AssertionError(target)

    assert words_after("gangway publish --f", refuse) == ["--from"]


def test_a_container_is_offered_once_with_its_networks() -> None:
    assert candidates(["detach", "b"], get) == [("box", "on network web, back")]


def test_attach_offers_named_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", lambda _: ["b", "a"])
    assert words_after("gangway attach ") == ["a", "b"]


WORDS = st.sampled_from([*" ".join(COMMANDS).split(), "-p", "--filter", "--", "-", "road=", "", "--socket", "=x"])


@given(st.lists(WORDS | st.text(max_size=4), min_size=1, max_size=6))
def test_any_words_can_be_completed(words: list[str]) -> None:
    for word, _ in candidates(words, get):
        assert word.startswith(words[-1]) or word in (":files", ":commands")


def test_without_a_daemon_there_are_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GANGWAY_SOCKET", f"{tmp_path}/none.sock")
    completion.complete(["network", "rm", ""])
    assert capsys.readouterr() == ("", "")


# bash


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with answering(tmp_path_factory.mktemp("answers") / "gangway.sock") as found:
        yield found


@pytest.mark.parametrize(("typed", "completed"), [*COMPLETED, ("gangway detach x", r"gangway detach x\;id ")])
def test_bash_completes(typed: str, completed: str, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "something.toml").touch()
    assert complete("bash", SCRIPTS / "gangway.bash", typed, tmp_path, environment) == completed
