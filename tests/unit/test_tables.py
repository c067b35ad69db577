"""What `gangway ls`, `network` and `doctor` print."""

import msgspec
import pytest

from gangway.cli.views import columns, explanation, print_checks, print_mappings, print_network, print_networks, roads
from gangway.daemon.messages import ExplainAnswer, MappingAnswer, NetworkAnswer
from gangway.facts import Firewall, HostFacts
from gangway.model import Protocol
from gangway.plan import Origin
from gangway.relay.sockets import Counters
from tests.unit.samples import BACK, DIRECT, INNER, NONE, WEB, admitting, endpoint, lease, mapping, planned


def test_an_origin_with_two_roads_shows_both() -> None:
    docker = HostFacts(Firewall.IPTABLES, own_bridge=False)
    answered = msgspec.to_builtins(MappingAnswer.of(planned(mapping("0.0.0.0"), docker)))
    assert [roads(answered, origin) for origin in Origin] == ["redirect", "nat", "nat", "nat, relay"]


def _table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Return what was printed: rows of columns."""
    lines = capsys.readouterr().out.splitlines()
    return [[column.strip() for column in line.split("  ") if column.strip()] for line in lines]


def test_mappings_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        planned(mapping("0.0.0.0", "8000", "80")),
        planned(mapping("::1", "53", protocol=Protocol.UDP)),
        planned(mapping("0.0.0.0", "80", protocol=Protocol.SCTP)),
    ]
    print_mappings(msgspec.to_builtins([MappingAnswer.of(one) for one in found]))
    assert _table(capsys) == [
        ["CONTAINER", "SOURCE", "PUBLISHED", "TARGET", "LOOPBACK", "HOST", "REMOTE", "CONTAINER"],
        ["box", "api", "0.0.0.0:8000", "172.30.0.2:80/tcp", "redirect", "nat", "nat", "nat"],
        ["box", "api", "[::1]:53", "[fd30::2]:53/udp", "redirect", "blocked", "blocked", "blocked"],
        ["box", "api", "0.0.0.0:80", "172.30.0.2:80/sctp", "relay", "nat", "nat", "nat"],
    ]


def test_admitted_clients_have_a_column_if_a_port_is_not_for_everybody(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(admitting(mapping("0.0.0.0"), "10.0.0.0/8", "fd00::/8")), planned(mapping("::"))
    print_mappings(msgspec.to_builtins([MappingAnswer.of(one) for one in found]))
    assert [row[4] for row in _table(capsys)] == ["FROM", "10.0.0.0/8, fd00::/8", "-"]


def test_port_that_waits_for_its_container_has_no_roads(capsys: pytest.CaptureFixture[str]) -> None:
    port = admitting(mapping("::", "53", protocol=Protocol.UDP, container="docker:web"), "fd00::/8")
    print_mappings(msgspec.to_builtins([MappingAnswer.waiting(port, "container is stopped")]))
    assert _table(capsys)[1] == ["docker:web", "api", "[::]:53", "53/udp (container is stopped)", "fd00::/8", *"----"]


def test_what_the_relay_has_carried_has_a_column_if_it_had_work(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(mapping("0.0.0.0")), planned(mapping("::"))
    counted = Counters(connections=7, active=2), Counters()
    answers = [MappingAnswer.of(one, relayed=relayed) for one, relayed in zip(found, counted, strict=True)]
    print_mappings(msgspec.to_builtins(answers))
    assert [row[-1] for row in _table(capsys)] == ["RELAYED", "7 (2 now)", "0 (0 now)"]


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


@pytest.mark.parametrize(("container", "shown"), [("", "-"), ("docker:web", "docker:web")])
def test_a_lease_is_shown_with_its_source(container: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = msgspec.to_builtins(MappingAnswer.of(planned(lease("0.0.0.0", "8000", "80"), NONE)))
    print_mappings([answer | {"container": container}])
    assert _table(capsys)[1][:4] == [shown, "lease", "0.0.0.0:8000", "172.17.0.2:80/tcp"]


def test_a_row_printed_to_a_pipe_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "/run/user/1000/" + "long/" * 30
    print_mappings(msgspec.to_builtins([MappingAnswer.of(planned(mapping("::", container=name)))]))
    assert _table(capsys)[1][0] == name


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("A", "BB", ""), ("漢字", "[::1]:80", "x")]
    assert list(columns(rows)) == ["A     BB         ", "漢字  [::1]:80  x"]


def test_a_terminal_shows_the_same_rows_if_they_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then assumes a terminal
    monkeypatch.setenv("COLUMNS", "200")
    print_checks([{"check": "c", "holds": True, "note": "fine"}])
    assert capsys.readouterr().out.splitlines()[1:] == ["c      yes    fine"]


def test_cells_are_folded_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    print_checks([{"check": "c", "holds": True, "note": "as long as it takes"}])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2
    assert (
        "".join(line.replace("c ", "").replace("yes", "").replace(" ", "") for line in lines[1:]) == "aslongasittakes"
    )


def test_the_table_of_networks_shows_unusual_policies(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [NetworkAnswer.of(network, (endpoint(network),)) for network in (WEB, BACK, INNER, DIRECT)]
    answers[0].mtu = 9000
    print_networks(msgspec.to_builtins(answers))
    assert _table(capsys) == [
        ["NETWORK", "BRIDGE", "SUBNETS", "GATEWAYS", "POLICY", "CONTAINERS"],
        ["web", "gw-web", "172.30.0.0/24, fd30::/64", "172.30.0.1, fd30::1", "mtu 9000", "1"],
        ["back", "gw-back", "172.31.0.0/24, fd31::/64", "172.31.0.1, fd31::1", "no masquerade, no icc", "1"],
        ["inner", "gw-inner", "172.29.0.0/24, fd29::/64", "172.29.0.1, fd29::1", "internal", "1"],
        ["direct", "gw-direct", "172.27.0.0/24, fd27::/64", "172.27.0.1, fd27::1", "IPv4 routed, IPv6 routed", "1"],
    ]


def test_a_network_is_shown_with_its_containers(capsys: pytest.CaptureFixture[str]) -> None:
    print_network(msgspec.to_builtins(NetworkAnswer.of(WEB, (endpoint(WEB), endpoint(WEB, "[bold]")))))
    lines = _table(capsys)
    assert lines[1][4] == "-"
    assert lines[3:] == [
        ["CONTAINER", "ADDRESSES"],
        ["box", "172.30.0.2, fd30::2"],
        ["[bold]", "172.30.0.2, fd30::2"],
    ]
