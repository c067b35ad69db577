"""The API's messages: requests become networks, plans become answers."""

from ipaddress import ip_address, ip_network

import msgspec
import pytest

from gangway.daemon.messages import (
    AttachRequest,
    EndpointAnswer,
    MappingAnswer,
    NetworkAnswer,
    NetworkRequest,
    PublishRequest,
    RouteAnswer,
    origin,
)
from gangway.errors import InvalidRequest
from gangway.model import Network
from gangway.plan import Origin
from gangway.relay.sockets import Counters
from tests.unit.samples import BACK, INNER, NFTABLES, WEB, endpoint, lease, mapping, planned

FOUR, SIX = "172.30.0.0/24", "fd30::/64"


@pytest.mark.parametrize(
    ("subnets", "gateways", "wanted"),
    [
        ([FOUR], [], ["172.30.0.1"]),
        ([SIX], [], ["fd30::1"]),
        ([FOUR, SIX], [], ["172.30.0.1", "fd30::1"]),
        ([SIX, FOUR], [], ["fd30::1", "172.30.0.1"]),
        ([FOUR, SIX], ["172.30.0.254"], ["172.30.0.254", "fd30::1"]),
        ([FOUR, SIX], ["fd30::fe"], ["172.30.0.1", "fd30::fe"]),
        ([FOUR, SIX], ["fd30::fe", "172.30.0.254"], ["172.30.0.254", "fd30::fe"]),
    ],
)
def test_gateway_is_given_or_the_first_address(subnets: list[str], gateways: list[str], wanted: list[str]) -> None:
    made = NetworkRequest("web", subnets, gateways).network()
    assert made.subnets == tuple(map(ip_network, subnets))
    assert made.gateways == tuple(map(ip_address, wanted))


@pytest.mark.parametrize(
    ("subnets", "gateways", "why"),
    [
        ([FOUR], ["fd30::1"], "the gateway fd30::1 is not in any of the subnets"),
        ([FOUR], ["172.30.0.1", "172.30.0.2"], "the gateway 172.30.0.2 is not in any of the subnets"),
        ([FOUR], ["172.31.0.1"], "gateway 172.31.0.1 is not in subnet 172.30.0.0/24"),
        ([FOUR], ["first"], "'first' is not an IP address"),
        ([], [], "network web needs one subnet of IPv4, one of IPv6, or both"),
        ([FOUR, "172.31.0.0/24"], [], "one subnet of IPv4, one of IPv6, or both"),
        (["172.30.0.1/24"], [], "invalid subnet '172.30.0.1/24': it has host bits set; write 172.30.0.0/24"),
        (["172.30.0.0/33"], [], "invalid subnet '172.30.0.0/33'"),
        (["172.30.0.0"], [], "no room"),
        (["web"], [], "invalid subnet 'web'"),
        ([""], [], "invalid subnet ''"),
    ],
)
def test_invalid_network_is_refused(subnets: list[str], gateways: list[str], why: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        NetworkRequest("web", subnets, gateways).network()
    assert why in str(refusal.value)


def test_bridge_is_named_after_the_network_by_default() -> None:
    assert NetworkRequest("web", [FOUR]).network().bridge == "gw-web"
    assert NetworkRequest("web", [FOUR], bridge="br0").network().bridge == "br0"


@pytest.mark.parametrize("network", [WEB, BACK, INNER])
def test_answer_can_be_sent_back_as_a_request(network: Network) -> None:
    answer = msgspec.to_builtins(NetworkAnswer.of(network, (endpoint(network),)))
    assert answer.pop("endpoints") == [msgspec.to_builtins(EndpointAnswer.of(endpoint(network)))]
    assert answer.pop("routed") == []  # only Docker creates others
    assert msgspec.convert(answer, NetworkRequest).network() == network


@pytest.mark.parametrize(
    ("uplink", "given", "mtu"), [(None, None, 1500), (1400, None, 1400), (1400, 9000, 9000), (70000, None, 65535)]
)
def test_mtu_is_the_uplinks_unless_it_is_given(uplink: int | None, given: int | None, mtu: int) -> None:
    assert NetworkRequest("web", [FOUR], mtu=given).network(uplink).mtu == mtu


@pytest.mark.parametrize(
    ("subnets", "gateways", "is_described"),
    [
        ([FOUR, SIX], ["172.30.0.254", "fd30::fe"], True),
        ([SIX, FOUR], ["172.30.0.254", "fd30::fe"], True),
        ([SIX, FOUR], ["fd30::fe", "172.30.0.254"], True),
        ([SIX, FOUR], ["172.30.0.254"], False),
        ([SIX, FOUR], [], False),
        ([FOUR], ["172.30.0.254"], False),
        ([], [], False),
    ],
)
def test_a_network_is_described_in_any_order(subnets: list[str], gateways: list[str], is_described: bool) -> None:
    network = NetworkRequest("web", [FOUR, SIX], ["172.30.0.254", "fd30::fe"]).network()
    assert NetworkRequest("web", subnets, gateways).describes(network) == is_described


def test_an_mtu_that_is_not_requested_is_right_whatever_it_is() -> None:
    network = NetworkRequest("web", [FOUR], mtu=1400).network()
    assert [NetworkRequest("web", [FOUR], mtu=mtu).describes(network) for mtu in (None, 1400, 1500)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("kind", [NetworkRequest, AttachRequest, PublishRequest])
def test_request_with_an_unknown_field_is_refused(kind: type[msgspec.Struct]) -> None:
    least = {"name": "web", "subnets": []} if kind is NetworkRequest else {"container": "box"}
    assert msgspec.convert(least, kind) is not None
    with pytest.raises(msgspec.ValidationError, match="gatway"):
        msgspec.convert(least | {"gatway": "172.30.0.1"}, kind)


def test_endpoint_answer() -> None:
    assert msgspec.to_builtins(EndpointAnswer.of(endpoint(WEB))) == {
        "container": "box",
        "network": "web",
        "addresses": ["172.30.0.2", "fd30::2"],
        "is_first": True,
        "note": "",
    }


def test_mapping_answer_has_the_road_of_each_kind_of_client() -> None:
    answer = msgspec.to_builtins(MappingAnswer.of(planned(mapping("::", "8000-8001", "80-81"), NFTABLES)))
    routes, relayed = answer.pop("routes"), answer.pop("relayed")
    assert relayed == Counters()._asdict()
    assert answer == {
        "container": "box",
        "protocol": "tcp",
        "host_address": "::",
        "host_ports": "8000-8001",
        "container_address": "fd30::2",
        "container_ports": "80-81",
        "source": "api",
        "redirected": 0,
        "from": [],
        "note": "",
    }
    assert [(route["origin"], route["neighbour"]) for route in routes] == [
        ("loopback", False),
        ("host", False),
        ("remote", False),
        ("container", False),
        ("container", True),
    ]
    assert routes[0] == {
        "origin": "loopback",
        "neighbour": False,
        "road": "redirect",
        "code": "redirected",
        "fact": "fd30::2 port 80-81",
        "seen_as": "gateway",
        "rules": [],
    }


def test_mapping_answer_of_a_lease() -> None:
    answer = MappingAnswer.of(planned(lease("0.0.0.0", "8000", "80")))
    assert (answer.container, answer.source, answer.container_address) == ("172.17.0.2", "lease", "172.17.0.2")


def test_mapping_answer_may_have_some_routes_only() -> None:
    found = planned(mapping("0.0.0.0"))
    route = RouteAnswer.of(found.routes[1], ("output: first", "published: second"))
    answer = MappingAnswer.of(found, routes=[route])
    assert answer.routes == [route]
    assert route.rules == ["output: first", "published: second"]
    assert MappingAnswer.of(found, routes=[]).routes == []


def test_mapping_answer_counts_redirected_sockets() -> None:
    assert msgspec.to_builtins(MappingAnswer.of(planned(mapping("0.0.0.0")), 1 << 40))["redirected"] == 1 << 40


def test_a_mappings_answer_has_its_source() -> None:
    assert MappingAnswer.of(planned(lease("0.0.0.0"))).source == "lease"


@pytest.mark.parametrize("word", list(Origin))
def test_origin_is_parsed(word: Origin) -> None:
    assert origin(word.value) is word


@pytest.mark.parametrize("word", ["", "neighbour", "HOST", "host "])
def test_unknown_origin_is_refused_with_the_known_ones(word: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        origin(word)
    assert str(refusal.value) == f"unknown origin {word!r}: loopback, host, remote, container"
