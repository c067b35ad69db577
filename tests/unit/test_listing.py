"""What `gangway ls` and `gangway network ls` print: rows, order, columns, formats and filters."""

from argparse import ArgumentTypeError
from ipaddress import ip_address
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.cli import listing
from gangway.cli.listing import MAPPINGS, NETWORKS, parse_filter, parse_format, select, show
from gangway.cli.main import parse
from gangway.cli.views import ORIGINS
from gangway.daemon.messages import MappingAnswer, NetworkAnswer
from gangway.facts import Firewall, HostFacts
from gangway.inet import PROTOCOLS
from gangway.model import PortMapping, PortRange, Protocol, Source, parse_port
from gangway.plan import MappingPlan, Origin, Road
from gangway.relay.sockets import Counters
from tests.unit.samples import BACK, DIRECT, INNER, NONE, WEB, admitting, endpoint, lease, mapping, planned

DOCKER = HostFacts(Firewall.IPTABLES, own_bridge=False)


def answers(*found: MappingPlan) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(MappingAnswer.of(one)) for one in found]


SAMPLES = answers(
    planned(mapping("::1", "53", protocol=Protocol.UDP)),
    planned(mapping("10.0.0.9", "9000-9010", container="db")),
    planned(mapping("0.0.0.0", "8000", "80")),
    planned(lease("0.0.0.0", "700", "80"), NONE),
)


def printed(found: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], **how: Any) -> list[list[str]]:
    """Return what `show` prints: rows of columns."""
    show(NETWORKS if "bridge" in found[0] else MAPPINGS, found, **how)
    lines = capsys.readouterr().out.splitlines()
    return [[column.strip() for column in line.split("  ") if column.strip()] for line in lines]


# Tables


def test_mappings_are_a_table_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show(MAPPINGS, select(MAPPINGS, SAMPLES, []))
    assert capsys.readouterr().out.splitlines() == [
        "PUBLISHED               CONTAINER   PORT       SOURCE  ROADS",
        "0.0.0.0:700/tcp         172.17.0.2  80         lease   relay; lo redirect",
        "0.0.0.0:8000/tcp        box         80         api     nat; lo redirect",
        "10.0.0.9:9000-9010/tcp  db          9000-9010  api     nat; lo blocked",
        "[::1]:53/udp            box         53         api     lo redirect only",
    ]


def test_usual_rows_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    found = answers(
        planned(mapping("0.0.0.0", "5060-5070", protocol=Protocol.SCTP, container="docker:shop-web-1")),
        planned(lease("::", "12000-12010", "8000-8010", container="172.17.0.2"), NONE),
    )
    show(MAPPINGS, found)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_wide_table_has_addresses_roads_clients_and_connections(capsys: pytest.CaptureFixture[str]) -> None:
    restricted = planned(admitting(mapping("0.0.0.0", "8000", "80"), "10.0.0.0/8", "fd00::/8"))
    found = msgspec.to_builtins(MappingAnswer.of(restricted, relayed=Counters(connections=7, active=2)))
    head, row = printed([found], capsys, wide=True)
    assert head == ["PUBLISHED", "CONTAINER", "TARGET", "SOURCE", *map(str.upper, ORIGINS[:-1]), "CONTAINERS", "FROM",
                    "RELAYED"]  # fmt: skip
    roads = ["redirect", "nat", "nat", "nat"]
    assert row == ["0.0.0.0:8000/tcp", "box", "172.30.0.2:80", "api", *roads, "10.0.0.0/8, fd00::/8", "7 (2 now)"]


@pytest.mark.parametrize("table", [MAPPINGS, NETWORKS])
def test_no_two_columns_have_one_name(table: listing.Listing) -> None:
    for names in (table.columns, table.wide):
        assert len(set(names)) == len(names)
        assert set(names) <= set(table.fields)


def test_port_that_waits_for_its_container_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = msgspec.to_builtins(
        MappingAnswer.waiting("docker:web", parse_port("[::]:53:53/udp"), "container is stopped")
    )
    assert printed(found, capsys)[1] == ["[::]:53/udp", "docker:web", "53", "api", "(container is stopped)"]
    assert printed(found, capsys, wide=True)[1][2:8] == ["53 (container is stopped)", "api", *"----"]


def test_a_port_that_is_to_be_chosen_is_any(capsys: pytest.CaptureFixture[str]) -> None:
    found = msgspec.to_builtins(MappingAnswer.waiting("box", parse_port("127.0.0.1::80"), "container does not exist"))
    assert printed(found, capsys)[1] == ["127.0.0.1:any/tcp", "box", "80", "api", "(container does not exist)"]
    assert parse_port(listing.MAPPINGS.fields["ports"][1](found[0])) == parse_port("127.0.0.1::80")


def test_a_long_name_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "/run/user/1000/" + "long/" * 30
    assert printed(answers(planned(mapping("::", container=name))), capsys)[1][1] == name


def test_networks_are_a_table_with_unusual_policies(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        msgspec.to_builtins(NetworkAnswer.of(network, (endpoint(network),))) for network in (WEB, BACK, INNER, DIRECT)
    ]
    found[0]["mtu"] = 9000
    assert printed(select(NETWORKS, found, []), capsys) == [
        ["NAME", "BRIDGE", "SUBNETS", "CONTAINERS", "POLICY"],
        ["back", "gw-back", "172.31.0.0/24, fd31::/64", "1", "no masquerade, no icc"],
        ["direct", "gw-direct", "172.27.0.0/24, fd27::/64", "1", "IPv4 routed, IPv6 routed"],
        ["inner", "gw-inner", "172.29.0.0/24, fd29::/64", "1", "internal"],
        ["web", "gw-web", "172.30.0.0/24, fd30::/64", "1", "mtu 9000"],
    ]
    assert printed(found, capsys, wide=True)[1][3:5] == ["172.30.0.1, fd30::1", "9000"]
    assert [one["name"] for one in select(NETWORKS, found, [("name", "web"), ("name", "back")])] == ["back", "web"]
    assert select(NETWORKS, found, [("container", "nobody")]) == []


# Roads


@pytest.mark.parametrize(
    ("found", "short"),
    [
        (planned(mapping("0.0.0.0")), "nat; lo redirect"),
        (planned(mapping("0.0.0.0", protocol=Protocol.SCTP)), "nat; lo relay"),
        (planned(mapping("::1")), "lo redirect only"),
        (planned(mapping("0.0.0.0"), DOCKER), "nat; lo redirect; container nat/relay"),
        (planned(mapping("0.0.0.0"), NONE), "relay; lo,host redirect"),
        (planned(admitting(mapping("0.0.0.0"), "10.0.0.0/8")), "nat; lo redirect; restricted"),
    ],
)
def test_roads_in_short_name_the_usual_one_first(found: MappingPlan, short: str) -> None:
    (answered,) = answers(found)
    assert MAPPINGS.fields["roads"][1](answered) == short


def test_an_origin_with_two_roads_shows_both() -> None:
    (answered,) = answers(planned(mapping("0.0.0.0"), DOCKER))
    columns = ("loopback", "host", "remote", "containers")
    assert [MAPPINGS.fields[name][1](answered) for name in columns] == ["redirect", "nat", "nat", "nat, relay"]


# Order


def test_rows_are_sorted_by_family_address_and_port_as_numbers() -> None:
    places = [
        ("10.0.0.9", "80"),
        ("9.0.0.1", "80"),
        ("9.0.0.1", "9-10"),
        ("::", "1"),
        ("fe80::1%eth0", "1"),
        ("::1", "7"),
    ]
    found = [{"host_address": address, "host_ports": ports, "protocol": "tcp"} for address, ports in places]
    assert [(one["host_address"], one["host_ports"]) for one in select(MAPPINGS, found, [])] == [
        ("9.0.0.1", "9-10"), ("9.0.0.1", "80"), ("10.0.0.9", "80"), ("::", "1"), ("::1", "7"), ("fe80::1%eth0", "1"),
    ]  # fmt: skip


# Filters


@pytest.mark.parametrize(
    ("texts", "ports"),
    [
        (["port=9005"], ["9000-9010"]),
        (["port=8000", "port=53"], ["8000", "53"]),
        (["port=8000", "protocol=udp"], []),
        (["protocol=udp"], ["53"]),
        (["container=db"], ["9000-9010"]),
        (["source=lease"], ["700"]),
        (["road=relay"], ["700"]),
        (["address=0.0.0.0"], ["700", "8000"]),
        (["address=[::1]"], ["53"]),
        (["address=0:0::1"], ["53"]),
        ([], ["700", "8000", "9000-9010", "53"]),
    ],
)
def test_filters_of_one_key_add_up_and_those_of_several_exclude(texts: list[str], ports: list[str]) -> None:
    filters = [parse_filter(text, MAPPINGS) for text in texts]
    assert [one["host_ports"] for one in select(MAPPINGS, SAMPLES, filters)] == ports


def test_a_networks_ports_are_those_of_its_containers_addresses() -> None:
    filters = [("network", {("box", "172.30.0.2")})]
    assert [one["host_ports"] for one in select(MAPPINGS, SAMPLES, filters)] == ["8000"]


@pytest.mark.parametrize(
    "text", ["", "port", "port=", "port=0", "port=65536", "port=80-90", "port=²", "moon=1", "protocol=icmp", "road=sea",
             "source=me", "address=box", "container="]
)  # fmt: skip
def test_invalid_filters_are_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        parse_filter(text, MAPPINGS)


def test_values_of_filters_are_the_models() -> None:
    assert set(listing.ROADS) == set(Road)
    assert set(listing.SOURCES) == set(Source)
    assert set(PROTOCOLS) == set(Protocol)
    assert list(ORIGINS) == list(Origin)


# Formats


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{host_address}:{host_ports}", "0.0.0.0:8000"),
        (r"{container}\t{port:>5}|{target}\n", "box\t   80|172.30.0.2:80\n"),
        ("{{{protocol}}}", "{tcp}"),
        ("", ""),
    ],
)
def test_a_format_is_a_line_for_each_row(text: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(MAPPINGS, [SAMPLES[2]], template=parse_format(text, MAPPINGS))
    assert capsys.readouterr().out == f"{line}\n"


@pytest.mark.parametrize(
    "text", ["{", "}", "{}", "{0}", "{moon}", "{port.real}", "{port[0]}", "{port!r}", "{port:d}", "{port:{host}}",
             "{container.__class__}"]
)  # fmt: skip
def test_invalid_formats_are_refused_when_they_are_read(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["ls", "--format", text])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("gangway: argument --format: ")


@pytest.mark.parametrize("words", ["ls --json -q", "ls --wide --format {port}", "network ls -q --json"])
def test_only_one_form_can_be_asked_for(words: str) -> None:
    function, arguments = parse(words.split())
    with pytest.raises(Exception, match="only one of --json, --wide, --format and -q"):
        function(**arguments)


PORT_RANGES = st.tuples(st.integers(1, 65535), st.integers(0, 20)).map(
    lambda found: PortRange(found[0], min(found[0] + found[1], 65535))
)


@given(
    at=st.sampled_from(["0.0.0.0", "::", "127.0.0.1", "::1", "192.0.2.5", "2001:db8::5", "fe80::1%eth0"]),
    ports=PORT_RANGES,
    protocol=st.sampled_from(Protocol),
    shift=st.integers(0, 100),
)
def test_quiet_lines_name_the_mapping_after_p(at: str, ports: PortRange, protocol: Protocol, shift: int) -> None:
    inner = PortRange(max(1, ports.first - shift), max(1, ports.first - shift) + ports.count - 1)
    one = PortMapping("box", protocol, ip_address(at), ports, inner)
    template = parse(["ls", "-q"])[1]["template"]
    answer = {
        "host_address": at,
        "host_ports": str(ports),
        "container_ports": str(inner),
        "protocol": str(protocol),
    }
    assert template == "{ports}"
    assert parse_port(MAPPINGS.fields["ports"][1](answer)).names(one)
