"""A plan as nftables rules: the whole text for some plans, and what holds for any."""

import re
from dataclasses import replace

import pytest
from hypothesis import given

from gangway.firewall.nft.render import (
    MOST_ELEMENTS,
    TABLE,
    chains,
    change,
    opposite,
    remove,
    render,
    rules_met,
    transactions,
)
from gangway.model import Network, PortMapping, Protocol
from gangway.plan import Firewall, HostFacts, MappingPlan, Plan, Road
from tests.unit.golden import assert_golden
from tests.unit.samples import (
    APART,
    BACK,
    FACTS,
    FORMS,
    FOUR,
    INNER,
    NETWORKS,
    NFTABLES,
    NONE,
    WEB,
    mapping,
    planned,
    whole,
)

FOREIGN = HostFacts(
    Firewall.NFTABLES, forwarding=frozenset(), bridge_filtered=frozenset({4, 6}), foreign_bridges=("docker0", "virbr0")
)
PLANS: dict[str, Plan] = {
    "one": whole(NFTABLES, mapping("0.0.0.0", "8000", "80"), networks=(FOUR,)),
    "forms": whole(NFTABLES, *FORMS, networks=(BACK, INNER)),
    "family": whole(NFTABLES, mapping("0.0.0.0", "8000", "80"), mapping("::", "8000", "80"), networks=(FOUR,)),
    "closed": whole(HostFacts(Firewall.NFTABLES, forwarding=frozenset()), networks=(WEB,)),
    "closed4": whole(HostFacts(Firewall.NFTABLES, switched_on=frozenset({4})), networks=(WEB,)),
    "foreign": whole(FOREIGN, networks=(BACK,)),
    "unrouted": whole(
        HostFacts(Firewall.NFTABLES, forwarding=frozenset(), may_forward=False),
        mapping("0.0.0.0", "8000", "80"),
        networks=(WEB,),
    ),
    "empty": whole(NFTABLES),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_whole_text(name: str) -> None:
    assert_golden(f"{name}.nft", render(PLANS[name]))


def test_what_rules_do_not_carry_is_not_in_them() -> None:
    text = render(PLANS["forms"])
    assert not [port for port in ("6000", "6001", "6005") if port in text]
    assert render(PLANS["family"]) == render(whole(NFTABLES, mapping("0.0.0.0", "8000", "80"), networks=(FOUR,)))


@given(APART, NETWORKS, FACTS)
def test_rules_are_the_same_with_the_redirect_and_without(
    many: list[PortMapping], network: Network, facts: HostFacts
) -> None:
    """It is about sockets that no rule serves."""
    able, unable = (whole(replace(facts, no_redirect=why), *many, networks=(network,)) for why in ("", "why not"))
    assert render(able) == render(unable)


def test_the_table_is_made_anew_in_one_transaction() -> None:
    text = render(PLANS["one"])
    assert text.startswith(remove())
    assert remove() == f"table {TABLE}\ndelete table {TABLE}\n"


@pytest.mark.parametrize(
    ("one", "elements"),
    [
        (mapping("0.0.0.0", "8000", "80"), "ports4 { tcp . 8000 : 172.30.0.2 . 80 }"),
        (mapping("::", "53", protocol=Protocol.UDP), "ports6 { udp . 53 : fd30::2 . 53 }"),
        (mapping("192.0.2.5", "8000", "80"), "addresses4 { tcp . 192.0.2.5 . 8000 : 172.30.0.2 . 80 }"),
        (mapping("2001:db8::5", "80", protocol=Protocol.SCTP), "addresses6 { sctp . 2001:db8::5 . 80 : fd30::2 . 80 }"),
        (mapping("0.0.0.0", "9000-9010"), "ranges4 { tcp . 0.0.0.0/0 . 9000-9010 : 172.30.0.2 }"),
        (mapping("::", "9000-9010"), "ranges6 { tcp . ::/0 . 9000-9010 : fd30::2 }"),
        (mapping("192.0.2.5", "9000-9010"), "ranges4 { tcp . 192.0.2.5/32 . 9000-9010 : 172.30.0.2 }"),
        (
            mapping("0.0.0.0", "70-71", "50-51"),
            "ports4 { tcp . 70 : 172.30.0.2 . 50, tcp . 71 : 172.30.0.2 . 51 }",
        ),
    ],
)
def test_a_mapping_is_an_element(one: PortMapping, elements: str) -> None:
    assert change((), [planned(one)]) == f"add element {TABLE} {elements}\n"
    assert change([planned(one)], ()) == f"delete element {TABLE} {elements}\n"


def test_mappings_go_before_others_come() -> None:
    old, new = planned(mapping("0.0.0.0", "8000", "80")), planned(mapping("0.0.0.0", "8000", "81"))
    assert change([old], [new]).splitlines() == [
        f"delete element {TABLE} ports4 {{ tcp . 8000 : 172.30.0.2 . 80 }}",
        f"add element {TABLE} ports4 {{ tcp . 8000 : 172.30.0.2 . 81 }}",
    ]


def test_mappings_of_one_form_come_by_one_statement() -> None:
    many = [planned(mapping("0.0.0.0", str(port), "80")) for port in range(8000, 8100)]
    assert len(change((), many).splitlines()) == 1


@pytest.mark.parametrize("one", [planned(FORMS[-1]), planned(FORMS[-4]), planned(FORMS[0], NONE)])
def test_what_rules_do_not_carry_changes_nothing(one: MappingPlan) -> None:
    assert change((), [one]) == change([one], ()) == ""


MET = {
    "translated": (
        "prerouting: ip daddr != 127.0.0.0/8 fib daddr type local jump published4",
        "published4: dnat ip to meta l4proto . th dport map @ports4 { tcp . 8000 : 172.30.0.2 . 80 }",
        "forward: oifname @bridges ct status dnat accept",
    ),
    "hairpin": "postrouting: oifname vmap @to, ip saddr 172.30.0.0/24 ct status dnat masquerade",
}


def test_the_rules_that_each_kind_of_client_meets() -> None:
    found = planned(mapping("0.0.0.0", "8000", "80"))
    loopback, host, remote, container, neighbour = (tuple(rules_met(found, route, WEB)) for route in found.routes)
    assert loopback == ()
    assert host == (MET["translated"][0].replace("prerouting", "output"), MET["translated"][1])
    assert remote == container == MET["translated"]
    assert neighbour == (*MET["translated"], MET["hairpin"])


@pytest.mark.parametrize(
    ("one", "lookup"),
    [
        (
            mapping("2001:db8::5", "8000", "80"),
            "dnat ip6 to meta l4proto . ip6 daddr . th dport map @addresses6 "
            "{ tcp . 2001:db8::5 . 8000 : fd30::2 . 80 }",
        ),
        (
            mapping("0.0.0.0", "9000-9010"),
            "dnat ip to meta l4proto . ip daddr . th dport map @ranges4 { tcp . 0.0.0.0/0 . 9000-9010 : 172.30.0.2 }",
        ),
        (
            mapping("0.0.0.0", "70-79", "50-59"),
            "dnat ip to meta l4proto . th dport map @ports4 "
            "{ tcp . 70 : 172.30.0.2 . 50, … tcp . 79 : 172.30.0.2 . 59 }",
        ),
    ],
)
def test_the_element_that_a_client_meets(one: PortMapping, lookup: str) -> None:
    found = planned(one)
    assert list(rules_met(found, found.routes[2], WEB))[1] == f"published{found.family}: {lookup}"


@given(APART, FACTS)
def test_every_rule_that_is_met_is_there(many: list[PortMapping], facts: HostFacts) -> None:
    made = whole(facts, *many)
    there = {f"{name}: {rule}" for name, (_, rules) in chains(made).items() for rule in rules}
    for one in made.mappings:
        for route in one.routes:
            met = list(rules_met(one, route, WEB))
            assert bool(met) == (route.road is Road.NAT)
            hairpin = {f"to_0: {rule}" for text in met for rule in text.split(", ip")[1:]}
            assert {re.split(r" { (?:tcp|udp|sctp)|, ip", text)[0] for text in met} <= there
            assert {rule.replace("to_0: ", "to_0: ip") for rule in hairpin} <= there


@given(APART, FACTS)
def test_what_comes_is_what_goes(many: list[PortMapping], facts: HostFacts) -> None:
    found = whole(facts, *many).mappings
    assert change((), found).replace("add element", "delete element") == change(found, ())
    assert change((), found) == "" or any(one.is_nat for one in found)


@given(APART, FACTS)
def test_the_rules_are_the_same_whatever_the_mappings(many: list[PortMapping], facts: HostFacts) -> None:
    bare, full = render(whole(facts)), render(whole(facts, *many))
    assert chains(whole(facts)) == chains(whole(facts, *many))
    without = [line for line in full.splitlines() if not line.startswith(f"add element {TABLE} ")]
    assert without == [line for line in bare.splitlines() if not line.startswith(f"add element {TABLE} ")]


@given(APART, FACTS, NETWORKS)
def test_no_statement_is_empty(many: list[PortMapping], facts: HostFacts, network: Network) -> None:
    made = whole(facts, *many, networks=(network,))
    statements = [line for line in render(made).splitlines() if " element " in line]
    assert not [line for line in statements if not line.partition("{")[2].strip(" }")]
    assert len({line.split()[4] for line in statements}) == len(statements), "one statement for each set"


@pytest.mark.parametrize("closed", [True, False])
def test_frames_within_others_bridges_pass_where_a_family_is_closed(closed: bool) -> None:
    facts = FOREIGN if closed else replace(FOREIGN, forwarding=frozenset({4, 6}))
    text = render(whole(facts))
    assert ('"docker0" . "docker0"' in text) is closed
    assert ('"virbr0" . "virbr0"' in text) is closed


@given(APART, FACTS)
def test_a_change_is_the_rest_of_the_whole_text(many: list[PortMapping], facts: HostFacts) -> None:
    found = whole(facts, *many)
    assert render(found) == render(whole(facts)) + change((), found.mappings)


MOVED = planned(mapping("0.0.0.0", "1024-21023", "2024-22023"))


def test_a_range_that_stays_is_one_element_however_long() -> None:
    text = change((), [planned(mapping("0.0.0.0", "1-65535", "1-65535"))])
    assert text == f"add element {TABLE} ranges4 {{ tcp . 0.0.0.0/0 . 1-65535 : 172.30.0.2 }}\n"


def test_a_long_range_that_is_moved_goes_in_several_transactions() -> None:
    text = change((), [MOVED])
    cut = list(transactions(text))
    assert "".join(cut) == text
    assert [one.count(" : ") for one in cut] == [MOST_ELEMENTS] * 5
    assert "tcp . 21023 : 172.30.0.2 . 22023 }" in cut[-1]


@given(APART, FACTS)
def test_what_is_not_many_goes_in_one_transaction(many: list[PortMapping], facts: HostFacts) -> None:
    text = render(whole(facts, *many))
    assert list(transactions(text)) == [text]
    assert list(transactions("")) == []


def test_a_table_comes_before_its_elements() -> None:
    first, *others = transactions(render(whole(NFTABLES, MOVED.mapping)))
    assert first.startswith(f"table {TABLE}")
    assert {line[:12] for other in others for line in other.splitlines()} == {"add element "}


@given(APART, FACTS)
def test_the_opposite_of_what_comes_is_what_goes(many: list[PortMapping], facts: HostFacts) -> None:
    plans = whole(facts, *many).mappings
    assert sorted(opposite(change((), plans)).splitlines()) == sorted(change(plans, ()).splitlines())
    assert opposite(opposite(change(plans[:1], plans[1:]))) == change(plans[:1], plans[1:])
