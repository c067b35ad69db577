"""Ports that gangway publishes and another program translates."""

from collections.abc import Iterable, Sequence
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.daemon.overlaps import Overlap, describe, find_overlaps, wanted_matches
from gangway.facts import Firewall, HostFacts
from gangway.firewall.iptables.translations import parse_translations
from gangway.firewall.nft.kernel import SetElement
from gangway.firewall.nft.translations import Expression, read_rule
from gangway.firewall.translations import Match, Rule, Translation, all_but, in_order
from gangway.host.netlink import pack_attribute
from gangway.model import PortMapping, Protocol
from tests.unit.samples import NFTABLES, mapping

VIP = "198.51.100.7"
OWN = [ip_address(one) for one in ("127.0.0.1", "::1", "192.0.2.5", VIP, "2001:db8::5")]
RULE = f"-A PREROUTING -d {VIP}/32 -p tcp -m tcp --dport 8000 -j DNAT --to-destination 10.0.0.9:80"


def address(first: str, last: str = "") -> tuple[tuple[int, int], ...]:
    return ((int(ip_address(first)), int(ip_address(last or first))),)


def port(first: int, last: int = 0) -> tuple[tuple[int, int], ...]:
    return ((first, last or first),)


TCP, UDP = port(6), port(17)
SETS = {
    "vips": [Match(addresses=address(VIP), family=4), Match(addresses=address("203.0.113.1"), family=4)],
    "services": [
        Match(TCP, address(VIP), port(8000), 4),
        Match(TCP, address("203.0.113.1"), port(8001), 4),
    ],
    "ports": [Match(ports=port(8000)), Match(ports=port(8001))],
}


def nat(
    *rules: str, family: int = 4, own_chain: str = "", at: Sequence[PortMapping] = (mapping("0.0.0.0", "1-65535"),)
) -> list[Translation]:
    """Return what another program's rules in iptables' table `nat` translate of some mappings."""
    filtering = "*filter\n-A FORWARD -p tcp --dport 8000 -j DNAT\nCOMMIT\n"
    listing = "\n".join(("*nat", ":PREROUTING ACCEPT [0:0]", *rules, "COMMIT", ""))
    command = {4: "iptables", 6: "ip6tables"}[family]
    tables = filtering + listing + filtering
    return [
        *parse_translations(
            tables,
            family,
            wanted_matches(at, OWN),
            lambda name, to: SETS[name] if "dst" in to else [],
            command,
            own_chain,
        )
    ]


def overlaps(*rules: str, at: str = "0.0.0.0", ports: str = "8000", facts: HostFacts = NFTABLES) -> list[Overlap]:
    """Return the overlaps of a mapping with rules of iptables."""
    family, mappings = ip_address(at).version, [mapping(at, ports)]
    return [*find_overlaps(nat(*rules, family=family, at=mappings), mappings, OWN, facts)]


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        "-A PREROUTING -p tcp -m tcp --dport 8000 -j REDIRECT --to-ports 81",
        "-A PREROUTING -p tcp -m tcp --dport 7000:9000 -j DNAT --to-destination 10.0.0.9",
        "-A PREROUTING -p tcp -m multiport --dports 80,7000:7010,8000 -j DNAT --to-destination 10.0.0.9",
        f"-A PREROUTING -d {VIP}/32 -j DNAT --to-destination 10.0.0.9",
        "-A PREROUTING -d 198.51.100.0/24 -p tcp -m tcp --dport 8000 -j DNAT --to-destination 10.0.0.9",
        '-A PREROUTING -p tcp -m comment --comment "of us -j DROP" -m tcp --dport 8000 -j DNAT --to-destination :81',
        f"-A OUTPUT -d {VIP}/32 -p tcp -m tcp --dport 8000 -j DNAT --to-destination 10.0.0.9:80",
        "-A PREROUTING -p tcp -m multiport --ports 80,8000 -j DNAT --to-destination 10.0.0.9",
        "-A PREROUTING -p tcp -m multiport ! --dports 80,8001:8002 -j DNAT --to-destination 10.0.0.9",
        "-A PREROUTING -p tcp -m iprange --dst-range 198.51.100.1-198.51.100.9 -m tcp --dport 8000 -j REDIRECT",
        "-A PREROUTING -p tcp ! -d 192.0.2.5/32 -m tcp --dport 8000 -j REDIRECT --to-ports 81",
        "-A PREROUTING -m set --match-set services dst,dst -j DNAT --to-destination 10.0.0.9:80",
        "-A PREROUTING -p tcp -m set --match-set vips dst -m tcp --dport 8000 -j REDIRECT",
        "-A PREROUTING -p tcp -m set ! --match-set vips dst -m tcp --dport 8000 -j REDIRECT",
    ],
)
def test_translation_of_a_published_port_is_found(rule: str) -> None:
    (found,) = overlaps(rule)
    assert found.mapping == mapping("0.0.0.0", "8000")
    assert not overlaps(rule, ports="8001-8002") or "7000:9000" in rule or "port" not in rule


@pytest.mark.parametrize(
    "rule",
    [
        RULE.replace("tcp", "udp"),
        RULE.replace(VIP, "203.0.113.1"),  # no address of the host: what gangway publishes is elsewhere
        RULE.replace("8000", "8001"),
        RULE.replace(" -j DNAT --to-destination 10.0.0.9:80", " -j RETURN"),
        RULE.replace("PREROUTING", "OTHER"),  # no packet gets there
        RULE.replace("-d ", "! -d ").replace("--dport", "! --dport"),
        "-A PREROUTING -p tcp -j REDIRECT --to-ports 15001",
        "-A PREROUTING -p tcp -m multiport --dports 80,8001 -j DNAT --to-destination 10.0.0.9",
        "-A PREROUTING -p tcp -m multiport --sports 8000 -j DNAT --to-destination 10.0.0.9",
        "-A PREROUTING -m iprange --dst-range 198.51.100.8-198.51.100.9 -j DNAT --to-destination 10.0.0.9",
        "-A PREROUTING -p tcp -m set --match-set services dst,dst -m tcp --dport 8001 -j DNAT --to-destination :81",
        "-A PREROUTING -p tcp -m set --match-set unread dst -j RETURN",
    ],
)
def test_other_rules_are_no_overlaps(rule: str) -> None:
    assert overlaps(rule) == []


def test_rule_of_both_hooks_is_one_overlap_and_jumps_are_followed() -> None:
    rules = [f"-A {hook} -d {VIP}/32 -p tcp -m tcp --dport 8000 -j SERVICE" for hook in ("PREROUTING", "OUTPUT")]
    (found,) = overlaps(*rules, "-A SERVICE -j ENDPOINT", "-A ENDPOINT -p tcp -j DNAT --to-destination 10.0.0.9:80")
    assert found.translation.place == "iptables nat ENDPOINT"
    assert found.translation.match == Match(TCP, address(VIP), port(8000), 4)


def test_families_are_apart() -> None:
    rule = "-A PREROUTING -d 2001:db8::5/128 -p tcp -m tcp --dport 8000 -j DNAT --to-destination [fd00::9]:80"
    assert len(overlaps(rule, at="::")) == 1
    assert overlaps(RULE.replace(f"-d {VIP}/32 ", ""), at="::") != []
    found = nat(RULE.replace(f"-d {VIP}/32 ", ""))
    assert [*find_overlaps(found, [mapping("::")], OWN, NFTABLES)] == []


@pytest.mark.parametrize(
    ("at", "rule", "is_overlap"),
    [
        (VIP, RULE, True),
        ("192.0.2.5", RULE, False),
        ("127.0.0.1", "-A PREROUTING -p tcp --dport 8000 -j REDIRECT --to-ports 81", False),  # from elsewhere
        ("127.0.0.1", "-A OUTPUT -p tcp --dport 8000 -j REDIRECT --to-ports 81", True),
    ],
)
def test_mapping_of_one_address(at: str, rule: str, is_overlap: bool) -> None:
    assert bool(overlaps(rule, at=at)) is is_overlap


def test_excluded_address_is_no_overlap() -> None:
    facts = HostFacts(Firewall.NFTABLES, exclude=(VIP,), excluded=frozenset({ip_address(VIP)}))
    assert overlaps(RULE, facts=facts) == []
    assert len(overlaps(RULE.replace(VIP, "192.0.2.5"), facts=facts)) == 1


OURS = "-A PREROUTING -m addrtype --dst-type LOCAL -j GANGWAY"
OUR_RULE = "-A GANGWAY -p tcp -m tcp --dport 8000 -j DNAT --to-destination 172.30.0.2:80"


@pytest.mark.parametrize(
    ("rules", "order"), [((RULE, OURS, OUR_RULE), "it comes first"), ((OURS, OUR_RULE, RULE), "gangway's rule comes")]
)
def test_iptables_rules_come_in_their_order(rules: tuple[str, ...], order: str) -> None:
    found = [*find_overlaps(nat(*rules, own_chain="GANGWAY"), [mapping("0.0.0.0")], OWN, NFTABLES)]
    assert len(found) == 1
    assert order in describe(found, Firewall.IPTABLES)


@pytest.mark.parametrize(
    ("firewall", "priority", "order"),
    [
        (Firewall.NFTABLES, -100, "it comes first"),
        (Firewall.NFTABLES, -50, "is not known"),
        (Firewall.NFTABLES, -40, "gangway's rule comes first"),
        (Firewall.IPTABLES, -100, "is not known"),
        (Firewall.NONE, 0, "it comes first"),
    ],
)
def test_chains_come_by_their_priorities(firewall: Firewall, priority: int, order: str) -> None:
    match = Match(TCP, None, port(8000), 4)
    one = Translation("nftables ip theirs pre", "prerouting", priority, match)
    text = describe([Overlap(one, match, mapping("0.0.0.0"))], firewall)
    assert text.startswith("nftables ip theirs pre translates tcp port 8000 at every address, published as ")
    assert order in text
    assert "--exclude" not in text


def test_remedy_is_typed_out() -> None:
    assert describe(overlaps(RULE), Firewall.NFTABLES) == (
        f"iptables nat PREROUTING translates tcp port 8000 at {VIP}, published as 0.0.0.0:8000:8000/tcp: "
        f"it comes first; gangway daemon --exclude {VIP} leaves the address to the other program"
    )
    assert "--exclude" not in describe(overlaps(RULE, at=VIP), Firewall.NFTABLES)


def test_many_overlaps_are_counted() -> None:
    mappings = [mapping("0.0.0.0", str(port)) for port in range(8000, 8012)]
    rule = f"-A PREROUTING -d {VIP}/32 -j DNAT --to-destination 10.0.0.9"
    text = describe([*find_overlaps(nat(rule), mappings, OWN, NFTABLES)], Firewall.NFTABLES)
    assert text.count(" translates ") == 5
    assert text.endswith("; 7 more")


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size)


def value(data: bytes) -> bytes:
    """Pack what a register is compared with."""
    return pack_attribute(1, data)


def loaded(register: int, base: int, offset: int, length: int) -> Expression:
    return "payload", {1: number(register), 2: number(base), 3: number(offset), 4: number(length)}


def compared(register: int, data: bytes, operator: int = 0) -> Expression:
    return "cmp", {1: number(register), 2: number(operator), 3: value(data)}


IS_TCP = [("meta", {1: number(1), 2: number(16)}), compared(1, b"\x06")]
PROTOCOL, DADDR, DPORT = ("meta", {1: number(1), 2: number(16)}), loaded(1, 1, 16, 4), loaded(1, 2, 2, 2)
PORT = [*IS_TCP, DPORT, compared(1, number(8000, 2))]
DNAT = ("nat", {1: number(1), 2: number(2)})
BETWEEN = [compared(1, b"\x1f\x40", 5), compared(1, b"\x1f\x42", 3)]
THEIR_SETS = {
    "ports": [(number(80, 2), number(80, 2), ""), (number(8000, 2), number(8010, 2), "")],
    "protocols": [(b"\x06", b"\x06", ""), (b"\x11", b"\x11", "")],
    "services": [
        (bytes([198, 51, 100, 7]) + number(8000, 2) + bytes(2),) * 2 + ("web",),
        (bytes([198, 51, 100, 8]) + number(53, 2) + bytes(2),) * 2 + ("dns",),
    ],
    "either": [(number(0), number(0), "web"), (number(1), number(1), "dns"), (b"", b"", "rest")],
}


def lookup(name: str, result: int | None = None, flags: int = 0) -> Expression:
    found = {1: name.encode() + b"\0", 2: number(1), 5: number(flags)}
    return "lookup", found if result is None else found | {3: number(result)}


def read(expressions: list[Expression]) -> list[Rule]:
    return [*read_rule(expressions, lambda name: [SetElement(*one) for one in THEIR_SETS[name]])]


def at(first: str, last: str = "") -> Match:
    return Match(TCP, address(first, last), port(8000), 4)


@pytest.mark.parametrize(
    ("expressions", "expected"),
    [
        ([*PORT, DNAT], Match(TCP, None, port(8000), 4)),
        ([*PORT, ("redir", {})], Match(TCP, None, port(8000))),
        ([*IS_TCP, DPORT, *BETWEEN, DNAT], Match(TCP, None, port(8000, 8002), 4)),
        ([*IS_TCP, DPORT, compared(1, b"\x1f\x40", 1), DNAT], Match(TCP, None, ((0, 7999), (8001, 65535)), 4)),
        ([*IS_TCP, DPORT, compared(1, b"\x1f\x40", 2), DNAT], Match(TCP, None, port(0, 7999), 4)),
        ([*IS_TCP, DPORT, compared(1, b"\x1f\x40", 4), DNAT], Match(TCP, None, port(8001, 65535), 4)),
        ([DADDR, compared(1, bytes([198, 51, 100, 7])), *PORT, DNAT], at(VIP)),
        ([loaded(1, 1, 16, 3), compared(1, bytes([198, 51, 100])), *PORT, DNAT], at("198.51.100.0", "198.51.100.255")),
        (
            [
                DADDR,
                ("bitwise", {1: number(1), 2: number(1), 4: value(bytes([255, 255, 255, 240]))}),
                compared(1, bytes([198, 51, 100, 16])),
                *PORT,
                DNAT,
            ],
            at("198.51.100.16", "198.51.100.31"),
        ),
        ([loaded(1, 1, 12, 4), compared(1, bytes(4)), *PORT, DNAT], Match(TCP, None, port(8000), 4)),  # a source
        ([*IS_TCP, DPORT, ("fib", {1: number(1)}), compared(1, number(2)), DNAT], Match(TCP, None, None, 4)),
        ([*IS_TCP, DPORT, lookup("ports"), DNAT], Match(TCP, None, (*port(80), *port(8000, 8010)), 4)),
        ([*IS_TCP, DPORT, lookup("ports", flags=1), DNAT], Match(TCP, None, ((0, 79), (81, 7999), (8011, 65535)), 4)),
        ([*IS_TCP, DPORT, lookup("ports", result=1), DNAT], Match(TCP, None, (*port(80), *port(8000, 8010)), 4)),
        ([PROTOCOL, lookup("protocols"), *PORT[2:], DNAT], Match(((6, 6), (17, 17)), None, port(8000), 4)),
    ],
)  # fmt: skip
def test_rule_of_nftables_is_read(expressions: list[Expression], expected: Match) -> None:
    assert read(expressions) == [Rule(expected)]


SERVICE = [DADDR, loaded(9, 2, 2, 2)]  # one after the other, in the registers 8 and 9


def test_elements_of_several_fields_are_alternatives() -> None:
    web = Match(None, address(VIP), port(8000), 4)
    dns = Match(None, address("198.51.100.8"), port(53), 4)
    assert read([*IS_TCP, *SERVICE, lookup("services"), DNAT]) == [
        Rule(one._replace(protocols=TCP)) for one in (web, dns)
    ]
    assert read([*SERVICE, lookup("services", result=0)]) == [Rule(web, "web"), Rule(dns, "dns")]
    assert read([*PORT, ("numgen", {1: number(1)}), lookup("either", result=0)]) == [
        Rule(Match(TCP, None, port(8000)), target) for target in ("web", "dns", "rest")
    ]


@pytest.mark.parametrize(
    "expressions",
    [
        PORT,
        [*PORT, ("nat", {1: number(0)})],  # of the source
        [*PORT, ("target", {})],  # of iptables
        [*PORT, lookup("unread"), ("immediate", {})],
        [*PORT, DPORT, compared(1, number(80, 2)), DNAT],  # no packet has both ports
    ],
)
def test_other_rules_of_nftables_are_left_out(expressions: list[Expression]) -> None:
    assert read(expressions) == []


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)).map(lambda ends: (min(ends), max(ends)))))
def test_spans_are_sets_of_numbers(spans: list[tuple[int, int]]) -> None:
    def numbers(found: Iterable[tuple[int, int]]) -> list[int]:
        return [number for first, last in found for number in range(first, last + 1)]

    found, rest = in_order(spans), all_but(in_order(spans), 8)
    assert numbers(found) == sorted({*numbers(spans)})
    assert sorted((*numbers(found), *numbers(rest))) == [*range(256)]
    half = Match(ports=port(50, 150)).within(Match(ports=found or port(0)))
    assert numbers(half.ports or () if half else ()) == [one for one in numbers(found) if 50 <= one <= 150]


def test_many_services_elsewhere_are_passed_over() -> None:
    rules = [f"-A PREROUTING -d 10.96.{n // 250}.{n % 250 + 1}/32 -p tcp --dport 8000 -j DNAT" for n in range(2000)]
    mappings: list[PortMapping] = [mapping("0.0.0.0", str(8000 + n), protocol=Protocol.TCP) for n in range(1000)]
    assert nat(*rules, at=mappings) == []
