"""A plan as nftables rules: the whole text of some plans, and properties of any."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.facts import Firewall, HostFacts
from gangway.firewall.nft.answers import Answers
from gangway.firewall.nft.features import Features
from gangway.firewall.nft.render import Name, chains, change, matching_rules, remove, render
from gangway.firewall.nft.transaction import MOST_ELEMENTS, TABLE
from gangway.model import Network, PortMapping, Protocol
from gangway.plan import MappingPlan, Plan, Road
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
    RESTRICTED,
    ROUTED,
    ROUTED_NETWORKS,
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
    "restricted": whole(NFTABLES, *RESTRICTED),
    "routed": whole(NFTABLES, *ROUTED, networks=ROUTED_NETWORKS),
}


@pytest.mark.parametrize("name", PLANS)
def test_whole_text(name: str) -> None:
    assert_golden(f"{name}.nft", render(PLANS[name]))


def test_mappings_without_nat_have_no_elements() -> None:
    text = render(PLANS["forms"])
    assert not [port for port in ("6000", "6001", "6005") if port in text]
    assert render(PLANS["family"]) == render(whole(NFTABLES, mapping("0.0.0.0", "8000", "80"), networks=(FOUR,)))


@given(APART, NETWORKS, FACTS)
def test_redirect_does_not_change_the_rules(many: list[PortMapping], network: Network, facts: HostFacts) -> None:
    """It serves the connections that no rule does."""
    able, unable = (whole(replace(facts, no_redirect=why), *many, networks=(network,)) for why in ("", "why not"))
    assert render(able) == render(unable)


def test_the_table_is_replaced_in_one_transaction() -> None:
    text = render(PLANS["one"])
    assert text.startswith(remove())
    assert remove() == f"table {TABLE}\ndelete table {TABLE}\n"


def names_in(text: str) -> list[Name]:
    """Return the sets, maps and chains in nft's language, each once."""
    return [*dict.fromkeys(re.findall(r"^\t(set|map|chain) (\w+) ", text, re.MULTILINE))]


def test_an_existing_table_is_changed_in_place() -> None:
    there = names_in(render(PLANS["one"]))
    text = render(PLANS["closed"], there=there)
    assert "delete" not in text
    assert f"flush table {TABLE}\nflush map {TABLE} ports4\n" in text
    sets = [name for name in there if name[0] != "chain"]
    assert re.findall(rf"^flush (set|map) {TABLE} (\w+)$", text, re.MULTILINE) == sets
    declared, rules_and_elements = render(PLANS["closed"]).removeprefix(remove()).split("\n}\n", 1)
    assert text.startswith(declared)
    assert text.endswith(rules_and_elements)


def test_a_table_with_other_chains_is_replaced() -> None:
    strange = names_in(render(PLANS["one"]).replace("chain input ", "chain other "))
    assert render(PLANS["one"], there=strange) == render(PLANS["one"])


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
    assert change((), [planned(one)]).text() == f"add element {TABLE} {elements}\n"
    assert change([planned(one)], ()).text() == f"delete element {TABLE} {elements}\n"


def test_deletions_precede_additions() -> None:
    old, new = planned(mapping("0.0.0.0", "8000", "80")), planned(mapping("0.0.0.0", "8000", "81"))
    assert change([old], [new]).text().splitlines() == [
        f"delete element {TABLE} ports4 {{ tcp . 8000 : 172.30.0.2 . 80 }}",
        f"add element {TABLE} ports4 {{ tcp . 8000 : 172.30.0.2 . 81 }}",
    ]


def test_mappings_of_one_form_are_one_statement() -> None:
    many = [planned(mapping("0.0.0.0", str(port), "80")) for port in range(8000, 8100)]
    assert len(change((), many).text().splitlines()) == 1


@pytest.mark.parametrize("one", [planned(FORMS[-1]), planned(FORMS[-4]), planned(FORMS[0], NONE)])
def test_mappings_without_nat_change_nothing(one: MappingPlan) -> None:
    assert change((), [one]).text() == change([one], ()).text() == ""


MATCHING = {
    "translated": (
        "prerouting: ip daddr != 127.0.0.0/8 fib daddr type local jump published4",
        "published4: dnat ip to meta l4proto . th dport map @ports4 { tcp . 8000 : 172.30.0.2 . 80 }",
        "forward: oifname @bridges ct status dnat accept",
    ),
    "hairpin": 'postrouting: oifname . ip saddr @neighbours4 ct status dnat masquerade { "gw-web" . 172.30.0.0/24 }',
}


def test_matching_rules_of_each_kind_of_client() -> None:
    found = planned(mapping("0.0.0.0", "8000", "80"))
    loopback, host, remote, container, neighbour = (
        tuple(matching_rules(found, route, WEB, 8000)) for route in found.routes
    )
    assert loopback == ()
    assert host == (MATCHING["translated"][0].replace("prerouting", "output"), MATCHING["translated"][1])
    assert remote == container == MATCHING["translated"]
    assert neighbour == (*MATCHING["translated"], MATCHING["hairpin"])


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
            "dnat ip to meta l4proto . th dport map @ports4 { tcp . 79 : 172.30.0.2 . 59 }",
        ),
    ],
)
def test_matching_element(one: PortMapping, lookup: str) -> None:
    found, port = planned(one), one.host_ports.last
    assert list(matching_rules(found, found.routes[2], WEB, port))[1] == f"published{found.family}: {lookup}"


@given(APART, FACTS)
def test_matching_rules_are_in_the_table(many: list[PortMapping], facts: HostFacts) -> None:
    made = whole(facts, *many)
    there = {f"{name}: {rule}" for name, (_, rules) in chains(made).items() for rule in rules}
    for one in made.mappings:
        for route in one.routes:
            matching = list(matching_rules(one, route, WEB, one.mapping.host_ports.first))
            assert bool(matching) == (route.road is Road.NAT)
            assert {re.split(r' { (?:tcp|udp|sctp|")', text)[0] for text in matching} <= there


@given(APART, FACTS)
def test_mappings_are_removed_by_the_elements_that_were_added(many: list[PortMapping], facts: HostFacts) -> None:
    found = whole(facts, *many).mappings
    assert change((), found).text().replace("add element", "delete element") == change(found, ()).text()
    assert change((), found).text() == "" or any(one.is_nat for one in found)


@given(APART, FACTS)
def test_mappings_do_not_change_the_rules(many: list[PortMapping], facts: HostFacts) -> None:
    bare, full = render(whole(facts)), render(whole(facts, *many))
    assert chains(whole(facts)) == chains(whole(facts, *many))
    without = [line for line in full.splitlines() if not line.startswith(f"add element {TABLE} ")]
    assert without == [line for line in bare.splitlines() if not line.startswith(f"add element {TABLE} ")]


@given(APART, FACTS, NETWORKS)
def test_statements_are_not_empty(many: list[PortMapping], facts: HostFacts, network: Network) -> None:
    made = whole(facts, *many, networks=(network,))
    statements = [line for line in render(made).splitlines() if " element " in line]
    assert not [line for line in statements if not line.partition("{")[2].strip(" }")]
    assert len({line.split()[4] for line in statements}) == len(statements), "one statement for each set"


@pytest.mark.parametrize("closed", [True, False])
def test_closed_families_accept_frames_within_other_programs_bridges(closed: bool) -> None:
    facts = FOREIGN if closed else replace(FOREIGN, forwarding=frozenset({4, 6}))
    text = render(whole(facts))
    assert ('"docker0" . "docker0"' in text) is closed
    assert ('"virbr0" . "virbr0"' in text) is closed


WITHOUT_LOOKUPS = Features(map_as_set=False)
WITHOUT_TIMEOUTS = Features(timeouts=False)


@given(APART, FACTS)
def test_where_maps_are_no_sets_the_keys_of_tcp_mappings_are_in_sets(many: list[PortMapping], facts: HostFacts) -> None:
    found = whole(facts, *many)
    adds = change((), found.mappings, WITHOUT_LOOKUPS).adds
    maps = {name: elements for name, elements in adds.items() if not name.endswith("_keys")}
    assert maps == change((), found.mappings).adds
    for name, elements in maps.items():
        keys = [element.partition(" : ")[0] for element in elements if element.startswith("tcp")]
        assert keys == adds.get(f"{name}_keys", [])
    assert render(found, WITHOUT_LOOKUPS).count("_keys drop") == 6


def test_timeouts_are_left_out_where_the_kernel_has_none() -> None:
    assert render(PLANS["one"]).count("ct timeout") == 4
    assert "ct timeout" not in render(PLANS["one"], WITHOUT_TIMEOUTS)


@given(APART, FACTS)
def test_whole_text_is_an_empty_table_and_a_change(many: list[PortMapping], facts: HostFacts) -> None:
    found = whole(facts, *many)
    added = change((), found.mappings).extended({}, Answers(found.mappings).elements())
    assert render(found) == render(whole(facts)) + added.text()


MOVED = planned(mapping("0.0.0.0", "1024-21023", "2024-22023"))


def test_a_range_with_unchanged_ports_is_one_element() -> None:
    text = change((), [planned(mapping("0.0.0.0", "1-65535", "1-65535"))]).text()
    assert text == f"add element {TABLE} ranges4 {{ tcp . 0.0.0.0/0 . 1-65535 : 172.30.0.2 }}\n"


def test_a_long_range_with_changed_ports_is_split() -> None:
    whole_change = change((), [MOVED])
    parts = [part.text() for part in whole_change.split()]
    assert "".join(parts) == whole_change.text()
    assert [part.count(" : ") for part in parts] == [MOST_ELEMENTS] * 5
    assert "tcp . 21023 : 172.30.0.2 . 22023 }" in parts[-1]


def test_split_parts_delete_before_they_add() -> None:
    parts = list(change([MOVED], [MOVED]).split())
    assert [(bool(part.deletes), bool(part.adds)) for part in parts] == [(True, False)] * 5 + [(False, True)] * 5


@given(APART, APART, FACTS, st.integers(1, 5))
def test_split_parts_make_the_same_change_within_the_limit(
    removed: list[PortMapping], added: list[PortMapping], facts: HostFacts, limit: int
) -> None:
    whole_change = change(whole(facts, *removed).mappings, whole(facts, *added).mappings)
    parts = list(whole_change.split(limit))
    for verb in (0, 1):
        joined: dict[str, list[str]] = {}
        for part in parts:
            for name, elements in part[verb].items():
                joined.setdefault(name, []).extend(elements)
        assert joined == whole_change[verb]
    sizes = [sum(map(len, (*part.deletes.values(), *part.adds.values()))) for part in parts]
    assert all(0 < size <= limit for size in sizes)


@given(APART, FACTS)
def test_a_short_change_is_one_transaction(many: list[PortMapping], facts: HostFacts) -> None:
    short = change((), whole(facts, *many).mappings)
    assert list(short.split()) == ([short] if short.text() else [])


def test_the_table_precedes_its_elements() -> None:
    text = render(whole(NFTABLES, MOVED.mapping))
    table, elements = text[: text.index("add element ")], text[text.index("add element ") :]
    assert table.startswith(f"table {TABLE}")
    assert {line[:12] for line in elements.splitlines()} == {"add element "}


@given(APART, FACTS)
def test_the_inverse_of_an_addition_is_a_removal(many: list[PortMapping], facts: HostFacts) -> None:
    plans = whole(facts, *many).mappings
    assert change((), plans).inverse() == change(plans, ())
    assert change(plans[:1], plans[1:]).inverse() == change(plans[1:], plans[:1])
    assert change(plans[:1], plans[1:]).inverse().inverse() == change(plans[:1], plans[1:])
