"""What `gangway explain`, `network inspect` and `doctor` print."""

import sys

import msgspec
import pytest

from gangway.cli.tables import columns
from gangway.cli.views import explanation, print_checks, print_network
from gangway.daemon.messages import ExplainAnswer, MappingAnswer, NetworkAnswer
from gangway.model import Protocol
from gangway.relay.sockets import Counters
from tests.unit.samples import WEB, endpoint, mapping, planned


@pytest.mark.parametrize(
    ("protocol", "counted", "said"),
    [
        (Protocol.TCP, Counters(), []),
        (
            Protocol.TCP,
            Counters(connections=7, active=2, up_bytes=10, down_bytes=20, timeouts=1, not_admitted=3),
            [
                "relayed so far: connections 7 (2 now), bytes 10 to the container and 20 back; "
                "1 not answered by the container; 3 not admitted"
            ],
        ),
        (Protocol.UDP, Counters(lost=1), ["relayed so far: clients 0 (0 now), bytes 0 to the container and 0 back; "
                                          "1 lost for want of descriptors, watches or memory"]),
    ],
)  # fmt: skip
def test_explain_says_what_the_relay_has_carried(protocol: Protocol, counted: Counters, said: list[str]) -> None:
    found = planned(mapping("0.0.0.0", protocol=protocol))
    answer = ExplainAnswer("127.0.0.1", 80, "nftables", "web", [], MappingAnswer.of(found, relayed=counted))
    lines = explanation(msgspec.to_builtins(answer))
    assert [line for line in lines if line.startswith("relayed")] == said


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("A", "BB", ""), ("漢字", "[::1]:80", "x")]
    assert list(columns(rows)) == ["A     BB", "漢字  [::1]:80  x"]


def show_on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make standard output a terminal of this width."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))


@pytest.mark.parametrize(("no_color", "head"), [("", "\x1b[1mCHECK"), ("1", "CHECK")])
def test_a_terminal_shows_the_same_rows_if_they_fit(
    no_color: str, head: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_on_a_terminal(200, monkeypatch)
    monkeypatch.setenv("NO_COLOR", no_color)
    print_checks([{"check": "c", "holds": True, "note": "fine"}])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(head)
    assert second == "c      yes    fine"


def test_cells_are_folded_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_on_a_terminal(20, monkeypatch)
    print_checks([{"check": "c", "holds": True, "note": "as long as it takes"}])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2
    assert max(map(len, lines[1:])) <= 20
    assert (
        "".join(line.replace("c ", "").replace("yes", "").replace(" ", "") for line in lines[1:]) == "aslongasittakes"
    )


def test_a_pipe_gets_plain_lines_of_any_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    note = "long " * 30
    print_checks([{"check": "c", "holds": True, "note": note}])
    assert capsys.readouterr().out == f"CHECK  HOLDS  NOTE\nc      yes    {note.rstrip()}\n"


def test_a_network_is_shown_with_its_containers(capsys: pytest.CaptureFixture[str]) -> None:
    print_network(msgspec.to_builtins(NetworkAnswer.of(WEB, (endpoint(WEB), endpoint(WEB, "[bold]")))))
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[cell.strip() for cell in line if cell] for line in lines][3:] == [
        ["CONTAINER", "ADDRESSES"],
        ["box", "172.30.0.2, fd30::2"],
        ["[bold]", "172.30.0.2, fd30::2"],
    ]
