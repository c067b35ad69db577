"""dockerd's rules among others, as iptables-save lists them: what is removed, and what stays."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.docker.leftovers import Leftovers, Rules, find, parse, removal, sets_of
from tests.unit.dockers_rules import OTHERS, RELEASE_20, RELEASE_28, RELEASES, Listing
from tests.unit.fake_iptables import Kernel, bare, restore, rules, save

TABLES = ("raw", "mangle", "nat", "filter")


def listed(*listings: Listing, policy: str = "ACCEPT", seed: int | None = None) -> str:
    """Return what iptables-save prints; with a seed the programs' rules are mixed."""
    text = []
    for table in TABLES:
        lines = [rule for listing in listings for rule in listing.get(table, ())]
        if seed is not None:
            Random(seed).shuffle(lines)
        chains = dict.fromkeys(line.split()[1] for line in lines)
        heads = [f":{chain} {policy if chain == 'FORWARD' else 'ACCEPT'} [0:0]" for chain in bare()[table]]
        heads += [f":{chain} - [0:0]" for chain in (*_targets(lines), *chains) if chain not in bare()[table]]
        text += [f"*{table}", *dict.fromkeys(heads), *lines, "COMMIT"]
    return "# Generated\n" + "\n".join(text) + "\n"


def _targets(lines: list[str]) -> list[str]:
    ends = [line.rpartition(" -j ")[2].split()[0] for line in lines if " -j " in line]
    return [end for end in ends if end.startswith("DOCKER") or end == "theirs"]


def left_after(listing: str, found: list[Leftovers]) -> str:
    """Return what iptables-save prints after the removal."""
    kernel: Kernel = bare()
    restore(kernel, "\n".join(line for line in listing.splitlines() if not line.startswith(("#", ":FORWARD"))))
    restore(kernel, "".join(map(removal, found)))
    return save(kernel)


def lines(listing: str) -> list[str]:
    return [line for line in listing.splitlines() if line.startswith("-A")]


def chains(listing: str) -> set[str]:
    return {line.split()[0] for line in listing.splitlines() if line.startswith(":DOCKER")}


@pytest.mark.parametrize("release", RELEASES)
def test_nothing_of_dockerds_stays(release: str) -> None:
    listing = listed(RELEASES[release])
    left = left_after(listing, find(parse(listing), {}))
    assert lines(left) == []
    assert chains(left) == set()


@pytest.mark.parametrize("release", RELEASES)
@given(seed=st.integers(0, 1 << 20))
def test_rules_of_other_programs_stay(release: str, seed: int) -> None:
    listing = listed(RELEASES[release], OTHERS, seed=seed)
    others = [line for found in OTHERS.values() for line in found if line not in RELEASES[release]["filter"]]
    wanted = [line for line in lines(left_after(listing, [])) if line.rstrip() in others]
    left = left_after(listing, find(parse(listing), {}))
    assert lines(left) == wanted
    assert chains(left) == set()


USERS = [
    ("filter", "-A DOCKER -j DOCKER-BLOCKED", "DOCKER"),
    ("filter", "-A DOCKER-USER -i eth0 -s 203.0.113.0/24 -j DROP", "DOCKER-USER"),
    ("filter", "-A DOCKER-USER -i eth0 ! -o eth0 -j RETURN", "DOCKER-USER"),
    ("filter", "-A theirs -i eth9 -j DOCKER-USER", "DOCKER-USER"),
    ("filter", "-A DOCKER -s 203.0.113.0/24 -j DROP", "DOCKER"),
    ("filter", "-A DOCKER -i eth0 -j DROP", "DOCKER"),
    ("nat", "-A DOCKER -s 203.0.113.0/24 -j RETURN", "DOCKER"),
]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("table", "rule", "chain"), USERS)
def test_a_chain_with_rules_of_others_stays_and_what_leads_to_it(
    release: str, table: str, rule: str, chain: str
) -> None:
    listing = listed({table: (rule,)}, RELEASES[release])
    found = find(parse(listing), {})
    kernel: Kernel = bare()
    restore(kernel, left_after(listing, found).replace("# Generated\n", "").replace("# Completed\n", ""))
    assert rule in rules(kernel, table, rule.split()[1])
    there = next(one for one in found if one.table == table)
    assert chain in there.kept
    assert list(map(str, there.users)) == [rule]
    # Whatever led there leads there still, over chains of dockerd's.
    jumps = {line for line in RELEASES[release].get(table, ()) if line.endswith(f" -j {chain}")}
    assert jumps <= set(lines(save(kernel)))
    assert {line.split()[1] for line in jumps} - {*bare()[table]} <= set(there.kept)
    if table != "nat":
        assert not [one for one in find(parse(save(kernel)), {}) if one.table == "nat"]


def test_sets_that_the_rules_used_are_named() -> None:
    names = {release: [*map(sets_of, find(parse(listed(rules)), {}))] for release, rules in RELEASES.items()}
    assert [one for found in names.pop("28.0") for one in found] == ["docker-ext-bridges-v4"]
    assert not any(one for found in names.values() for one in found)


def test_gangways_own_rules_stay() -> None:
    """For a bridge of dockerd's, gangway writes some of the very same rules."""
    same = "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"
    own: Rules = {"nat": {same: 1}, "filter": {"-A FORWARD -i docker0 ! -o docker0 -j ACCEPT": 1}}
    once, twice = listed(RELEASE_28), listed(RELEASE_28, {"nat": (same,)})
    for listing in (once, twice):
        assert lines(left_after(listing, find(parse(listing), own))) == [same]


def test_without_dockerds_chains_the_operator_has_written_the_rules() -> None:
    copied: Listing = {
        "nat": tuple(rule for rule in RELEASE_20["nat"] if "POSTROUTING" in rule),
        "filter": tuple(rule for rule in RELEASE_20["filter"] if "FORWARD -i" in rule),
    }
    assert find(parse(listed(copied)), {}) == []
    user: Listing = {"filter": ("-A FORWARD -j DOCKER-USER", "-A DOCKER-USER -j RETURN")}
    listing = listed(copied, user)
    assert lines(left_after(listing, find(parse(listing), {}))) == lines(listed(copied))


def test_a_rule_that_is_added_to_docker_user_meanwhile_makes_the_removal_fail() -> None:
    listing = listed(RELEASE_20)
    found = find(parse(listing), {})
    with pytest.raises(AssertionError, match="-X DOCKER-USER: it has rules"):
        left_after(listed({"filter": ("-A DOCKER-USER -i eth0 -j DROP",)}, RELEASE_20), found)


def test_the_policy_of_forward_is_opened_if_nothing_relies_on_it() -> None:
    def text(listing: str, opens: bool = True) -> str:
        return "".join(removal(one, opens) for one in find(parse(listing), {}))

    assert "-P FORWARD ACCEPT" in text(listed(RELEASE_20, policy="DROP"))
    assert "-P FORWARD" not in text(listed(RELEASE_20, policy="DROP"), opens=False)
    assert "-P FORWARD" not in text(listed(RELEASE_20, policy="ACCEPT"))
    assert "-P FORWARD" not in text(listed(RELEASE_20, OTHERS, policy="DROP"))
    user: Listing = {"filter": ("-A DOCKER-USER -i eth0 -j DROP",)}
    assert "-P FORWARD" not in text(listed(RELEASE_20, user, policy="DROP"))


def test_other_chains_whose_names_begin_like_dockerds_stay() -> None:
    """Some operators name a chain of their own like that."""
    own: Listing = {
        "filter": (
            "-A FORWARD -j DOCKER-BLOCKED",
            "-A DOCKER-BLOCKED -o docker0 -j DROP",
            "-A DOCKER-BLOCKED -i docker0 -j DOCKER-BLOCKED-IPV4",
            "-A DOCKER-BLOCKED-IPV4 -j RETURN",
        )
    }
    listing = listed(own, RELEASE_20, RELEASE_28)
    left = left_after(listing, find(parse(listing), {}))
    assert lines(left) == [*own["filter"]]
    assert chains(left) == {":DOCKER-BLOCKED", ":DOCKER-BLOCKED-IPV4"}


def test_the_dns_of_a_container_stays() -> None:
    listing = listed(
        RELEASE_20,
        {
            "nat": (
                "-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT",
                "-A DOCKER_OUTPUT -d 127.0.0.11/32 -p udp -m udp --dport 53 -j DNAT --to-destination 127.0.0.11:4127",
            )
        },
    )
    assert len(lines(left_after(listing, find(parse(listing), {})))) == 2
