"""A batch replaces gangway's rules, and leaves other programs' rules as they were."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.facts import HostFacts
from gangway.firewall.iptables.render import of_further, of_mappings, render
from gangway.firewall.iptables.tables import (
    Table,
    batch,
    built_in,
    chain_of,
    insertion,
    parse_listing,
    statements,
    with_change,
)
from gangway.model import Network, PortMapping
from gangway.plan import MappingPlan, Plan
from tests.unit.fake_iptables import Kernel, bare, restore, rules, save
from tests.unit.samples import APART, BACK, FACTS, FOUR, INNER, IPTABLES, NETWORKS, WEB, mapping, whole
from tests.unit.state_model import NEIGHBOURS

Tables = tuple[Table, ...]
THEIRS = """\
*filter
:theirs - [0:0]
-A FORWARD -j theirs
-A FORWARD -i eth9 -j DROP
-A theirs -s 203.0.113.0/24 -j RETURN
COMMIT
*nat
-A POSTROUTING -o eth9 -j MASQUERADE
COMMIT
"""
PREFIXES = st.sampled_from(("GANGWAY", "DOCKER"))
FAMILY = st.sampled_from((4, 6))
PLANS = st.builds(lambda facts, many, network: whole(facts, *many, networks=(network,)), FACTS, APART, NETWORKS)
# Two host ports that lead to the same port of the container.
TWICE = whole(IPTABLES, mapping("0.0.0.0", "8000", "80"), mapping("0.0.0.0", "8001", "80"))
ONCE = whole(IPTABLES, mapping("0.0.0.0", "8000", "80"))


def change(removed: Iterable[MappingPlan], added: Iterable[MappingPlan], family: int, prefix: str) -> str:
    """Return the text that removes mappings and adds others."""
    return statements(of_mappings(removed, family, prefix), of_mappings(added, family, prefix))


def others() -> Kernel:
    """Return a host with another program's rules."""
    kernel = bare()
    restore(kernel, THEIRS)
    return kernel


def apply_batch(kernel: Kernel, wanted: Tables, applied: Tables) -> None:
    restore(kernel, batch(wanted, applied, parse_listing(save(kernel))))


def with_rules(wanted: Tables) -> Kernel:
    """Return that host with more rules, which precede the others in built-in chains."""
    kernel = others()
    for table in wanted:
        chains = kernel[table.name]
        if table.has_chain:
            chains[table.chain] = []
        for rule in reversed(table.built_in):
            chains[chain_of(rule)].insert(0, rule.split(" ", 2)[2])
        for rule in table.own:
            chains[table.chain].append(rule.split(" ", 2)[2])
    return kernel


def in_any_order(kernel: Kernel) -> dict[str, dict[str, list[str]]]:
    return {table: {chain: sorted(found) for chain, found in chains.items()} for table, chains in kernel.items()}


@given(PLANS, FAMILY, PREFIXES)
def test_a_batch_writes_all_rules(made: Plan, family: int, prefix: str) -> None:
    kernel, wanted = others(), render(made, family, prefix)
    apply_batch(kernel, wanted, ())
    assert kernel == with_rules(wanted)


@given(PLANS, FAMILY, PREFIXES)
@example(TWICE, 4, "DOCKER")
def test_a_batch_does_not_change_rules_that_are_as_wanted(made: Plan, family: int, prefix: str) -> None:
    wanted = render(made, family, prefix)
    kernel = with_rules(wanted)
    for _ in range(2):
        apply_batch(kernel, wanted, built_in(wanted))
        assert kernel == with_rules(wanted)


@given(PLANS, FAMILY, PREFIXES, st.randoms(use_true_random=False))
@example(TWICE, 4, "DOCKER", Random(1))
def test_a_batch_completes_rules(made: Plan, family: int, prefix: str, random: Random) -> None:
    wanted = render(made, family, prefix)
    kernel = with_rules(wanted)
    for table in wanted:
        for chain, found in kernel[table.name].items():
            ours = {rule.split(" ", 2)[2] for rule in table.rules if chain_of(rule) == chain}
            found[:] = [rule for rule in found if rule not in ours or random.random() < 0.5]
    apply_batch(kernel, wanted, built_in(wanted))
    assert kernel == with_rules(wanted)


@given(PLANS, PLANS, FAMILY, PREFIXES, PREFIXES)
@example(TWICE, ONCE, 4, "DOCKER", "DOCKER")
@example(TWICE, TWICE, 4, "DOCKER", "GANGWAY")
def test_a_batch_replaces_a_plan_by_another(
    before: Plan, after: Plan, family: int, prefix_before: str, prefix: str
) -> None:
    applied, wanted = render(before, family, prefix_before), render(after, family, prefix)
    kernel = with_rules(applied)
    apply_batch(kernel, wanted, built_in(applied))
    assert kernel == with_rules(wanted)


@given(PLANS, FAMILY, PREFIXES)
@example(TWICE, 4, "DOCKER")
def test_a_batch_removes_only_our_rules(made: Plan, family: int, prefix: str) -> None:
    applied = render(made, family, prefix)
    for found in (with_rules(applied), others()):
        apply_batch(found, (), built_in(applied))
        assert found == others()


def test_a_listed_rule_is_deleted_before_it_is_inserted() -> None:
    wanted = (Table("nat", "X", ("-A OUTPUT -j X", "-A POSTROUTING -j ACCEPT", "-A X -j RETURN")),)
    assert batch(wanted, (), {}) == (
        "*nat\n:X - [0:0]\n-A OUTPUT -j X\n-I POSTROUTING 1 -j ACCEPT\n-A X -j RETURN\nCOMMIT\n"
    )
    listed = parse_listing("*nat\n:OUTPUT ACCEPT [0:0]\n:X - [0:0]\n-A OUTPUT -j X\n-A X -j RETURN\nCOMMIT\n")
    other = (Table("nat", "X", ("-A OUTPUT -p tcp -j X", *wanted[0].rules[1:])),)
    assert batch(other, wanted, listed) == (
        "*nat\n:X - [0:0]\n-D OUTPUT -j X\n-A OUTPUT -p tcp -j X\n-I POSTROUTING 1 -j ACCEPT\n-A X -j RETURN\nCOMMIT\n"
    )
    assert batch((), wanted, listed) == "*nat\n-D OUTPUT -j X\n-F X\n-X X\nCOMMIT\n"
    assert batch((), wanted, {}) == "*nat\nCOMMIT\n"
    assert batch((), (), listed) == "\n"


def test_listed_rules_keep_their_places() -> None:
    """Another program's rule may have been inserted before or between ours."""
    rules = ("-A OUTPUT -j X", "-A POSTROUTING -p tcp -j ACCEPT", "-A POSTROUTING -j ACCEPT", "-A X -j RETURN")
    wanted = (Table("nat", "X", rules),)
    listed = parse_listing("\n".join(("*nat", ":X - [0:0]", *rules[:2], "-A POSTROUTING -j LOG", *rules[2:], "COMMIT")))
    assert batch(wanted, wanted, listed) == "*nat\n:X - [0:0]\n-A X -j RETURN\nCOMMIT\n"
    assert batch((wanted[0]._replace(rules=rules[:2]),), wanted, listed) == (
        "*nat\n:X - [0:0]\n-D POSTROUTING -p tcp -j ACCEPT\n-D POSTROUTING -j ACCEPT\n"
        "-I POSTROUTING 1 -p tcp -j ACCEPT\nCOMMIT\n"
    )


@given(APART, APART, FACTS, NETWORKS.filter(lambda network: network is not INNER), FAMILY, PREFIXES)
def test_a_change_is_the_difference_of_two_plans(
    old: list[PortMapping], new: list[PortMapping], facts: HostFacts, network: Network, family: int, prefix: str
) -> None:
    before, after = (whole(facts, *many, networks=(network,)) for many in (old, new))
    kernel = with_rules(render(before, family, prefix))
    restore(kernel, change(before.mappings, after.mappings, family, prefix))
    assert in_any_order(kernel) == in_any_order(with_rules(render(after, family, prefix)))


@given(APART, APART, FACTS, FAMILY, PREFIXES)
def test_with_change_returns_the_rules_in_built_in_chains(
    old: list[PortMapping], new: list[PortMapping], facts: HostFacts, family: int, prefix: str
) -> None:
    before, after = (whole(facts, *many) for many in (old, new))
    tables = built_in(render(before, family, prefix))
    removed, added = (of_mappings(one.mappings, family, prefix) for one in (before, after))
    found = with_change(tables, removed, added)
    wanted = built_in(render(after, family, prefix))
    assert [(table.name, table.chain, sorted(table.rules)) for table in found] == [
        (table.name, table.chain, sorted(table.rules)) for table in wanted
    ]


def test_a_change_of_the_other_family_is_empty() -> None:
    assert change(ONCE.mappings, ONCE.mappings, 6, "GANGWAY") == ""
    assert change((), (), 4, "GANGWAY") == ""
    of_once = of_mappings(ONCE.mappings, 4, "GANGWAY")
    assert with_change((), of_once, of_once) == ()


def test_a_mapping_is_added_and_removed_by_its_own_rules() -> None:
    published = change((), ONCE.mappings, 4, "GANGWAY")
    assert published == (
        "*nat\n-A GANGWAY -p tcp -m tcp --dport 8000 -j DNAT --to-destination 172.30.0.2:80\nCOMMIT\n"
        "*filter\n-A GANGWAY -d 172.30.0.2/32 -o gw-web -p tcp -m tcp --dport 80 -j ACCEPT\n"
        "-A GANGWAY -s 172.30.0.2/32 -i gw-web -p tcp -m tcp --sport 80 ! --tcp-flags FIN,SYN,RST,ACK SYN "
        "-m conntrack --ctstate NEW -j REJECT --reject-with tcp-reset\nCOMMIT\n"
        "*mangle\n-A GANGWAY -p tcp -m tcp --dport 8000 -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n"
    )
    assert change(ONCE.mappings, (), 4, "GANGWAY") == published.replace("-A ", "-D ")


@pytest.mark.parametrize("network", [WEB, FOUR])
def test_two_mappings_to_one_container_port_are_independent(network: Network) -> None:
    first, second = (mapping("0.0.0.0", port, "80") for port in ("8000", "8001"))
    one, both = (whole(IPTABLES, *many, networks=(network,)) for many in ((first,), (first, second)))
    kernel = with_rules(render(both, 4, "DOCKER"))
    start = copy.deepcopy(kernel)
    restore(kernel, change(both.mappings[1:], (), 4, "DOCKER"))
    assert in_any_order(kernel) == in_any_order(with_rules(render(one, 4, "DOCKER")))
    restore(kernel, change((), both.mappings[1:], 4, "DOCKER"))
    assert in_any_order(kernel) == in_any_order(start)
    assert len(rules(kernel, "filter", "DOCKER")) == 2


@pytest.mark.parametrize("prefix", ["GANGWAY", "DOCKER"])
@pytest.mark.parametrize("family", [4, 6])
def test_further_neighbours_come_before_what_accepts_them(family: int, prefix: str) -> None:
    """A rule of their own is inserted, whatever other programs and mappings have added to the chain meanwhile."""
    without = whole(IPTABLES, mapping("0.0.0.0", "8000", "80"), mapping("::", "8000", "80"), networks=(WEB, BACK))
    within = replace(without, further=frozenset(NEIGHBOURS))
    kernel = with_rules(render(without, family, prefix))
    start, former = copy.deepcopy(kernel), rules(kernel, "nat", "POSTROUTING")
    clients = of_further(NEIGHBOURS, family, prefix)
    restore(kernel, statements((), clients, insertion))
    (rule,) = clients[0].rules
    assert rules(kernel, "nat", "POSTROUTING") == [rule, *former]
    assert in_any_order(kernel) == in_any_order(with_rules(render(within, family, prefix)))
    assert rule in with_change(built_in(render(without, family, prefix)), (), clients)[2].rules
    restore(kernel, statements(clients, ()))
    assert kernel == start
