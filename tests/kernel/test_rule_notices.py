"""Which changes of nftables are noticed as changes of our rules, or of chains that filter what is forwarded."""

from collections.abc import Iterator

import pytest

from gangway.firewall.nft import elements, kernel
from gangway.host.rule_notices import Change, RuleNotices
from lab.netns import Namespace

pytestmark = pytest.mark.any_kernel
FORWARD = "{ type filter hook forward priority 0; policy %s; }"


@pytest.fixture(scope="module")
def space() -> Iterator[Namespace]:
    with Namespace("rules") as made, made.entered():
        yield made


@pytest.fixture
def notices(space: Namespace) -> Iterator[RuleNotices]:
    """Our table, and notices that are all read."""
    space.run("nft", "flush ruleset; add table inet ours; add table ip theirs; add set ip theirs s { type ipv4_addr; }")
    made = RuleNotices()
    made.follow(_is_ours)
    made.forget()
    made.have_filters_changed()
    assert not made.is_pending()
    yield made
    made.close()


def _is_ours(change: Change) -> bool:
    return (change.family, change.table) == ("inet", "ours")


def seen(notices: RuleNotices) -> tuple[bool, bool]:
    return notices.have_ours_changed(), notices.have_filters_changed()


@pytest.mark.parametrize(
    "change",
    [
        "add element ip theirs s { 10.0.0.1, 10.0.0.2 }",
        "add chain ip theirs c",
        "add chain ip theirs c { type filter hook input priority 0; }",
        "add table inet other",
        "add table ip ours",
    ],
)
def test_changes_of_other_tables_are_ignored(space: Namespace, notices: RuleNotices, change: str) -> None:
    space.run("nft", change)
    assert seen(notices) == (False, False)


@pytest.mark.parametrize(
    "change", ["add chain inet ours c", "add set inet ours s { type ipv4_addr; }", "flush ruleset"]
)
def test_changes_of_our_table_are_noticed(space: Namespace, notices: RuleNotices, change: str) -> None:
    space.run("nft", change)
    assert seen(notices) == (True, False)
    assert seen(notices)[0]
    notices.forget()
    assert not notices.is_pending()


def test_elements_of_ours_are_less_urgent_than_rules(space: Namespace, notices: RuleNotices) -> None:
    space.run("nft", "add set inet ours s { type ipv4_addr; }")
    notices.forget()
    space.run("nft", "add element inet ours s { 10.0.0.1 }")
    assert notices.have_ours_changed()
    assert not notices.is_urgent()
    space.run("nft", "flush ruleset")
    assert notices.have_ours_changed()
    assert notices.is_urgent()


def test_own_changes_are_told_from_those_of_others(space: Namespace, notices: RuleNotices) -> None:
    with notices.own_change():
        space.run("nft", "add chain inet ours c")
        space.run("nft", "add chain ip theirs c")
    assert seen(notices) == (False, False)
    with notices.own_change():
        space.run("nft", "add rule inet ours c accept")
        space.run("nft", "flush chain inet ours c")
    assert notices.have_ours_changed()


def test_chains_that_filter_are_followed(space: Namespace, notices: RuleNotices) -> None:
    space.run("nft", f"add chain ip theirs f {FORWARD % 'accept'}")
    assert seen(notices) == (False, True)
    (chain,) = kernel.forward_chains()
    notices.follow_filters([str(chain)])
    for change in (
        "add rule ip theirs f drop",
        "flush chain ip theirs f",
        f"add chain ip theirs f {FORWARD % 'drop'}",
        "delete chain ip theirs f",
    ):
        space.run("nft", change)
        assert seen(notices) == (False, True), change
    assert kernel.forward_chains() == []


def test_lost_notices_count_as_changes(space: Namespace, notices: RuleNotices) -> None:
    """The kernel drops notices that do not fit into the socket's queue, and says so."""
    notices.sock.setsockopt(1, 8, 1)  # SOL_SOCKET, SO_RCVBUF: the least
    numbers = ", ".join(f"10.0.{high}.{low}" for high in range(16) for low in range(250))
    space.run("nft", f"add element ip theirs s {{ {numbers} }}")
    assert seen(notices) == (True, True)
    with notices.own_change():  # one transaction: it can only be ours
        space.run("nft", f"delete element ip theirs s {{ {numbers} }}")
    notices.forget()
    assert not notices.have_ours_changed()


@pytest.mark.parametrize(
    ("rules", "drops"),
    [
        ([], None),
        (["accept"], False),
        (["counter"], False),
        (["drop"], True),
        (["counter drop"], True),
        (["accept", "reject"], True),
        (["drop", "accept"], False),
        (["iifname lo drop"], False),
        (["log drop"], False),
    ],
)
def test_last_rules_that_drop(space: Namespace, notices: RuleNotices, rules: list[str], drops: bool | None) -> None:
    space.run("nft", f"add chain ip theirs f {FORWARD % 'accept'}")
    for rule in rules:
        space.run("nft", f"add rule ip theirs f {rule}")
    (chain,) = kernel.forward_chains()
    assert (str(chain), chain.versions, chain.policy) == ("ip theirs f", (4,), "accept")
    assert kernel.last_rule_drops(chain) is drops
    notices.drain()


@pytest.mark.parametrize(("target", "drops"), [("DROP", True), ("REJECT", True), ("ACCEPT", False)])
def test_last_rules_of_iptables(space: Namespace, target: str, drops: bool) -> None:
    space.run("nft", "flush ruleset")
    space.run("iptables", "-A", "FORWARD", "-j", target)
    (chain,) = kernel.forward_chains()
    assert str(chain) == "ip filter FORWARD"
    assert kernel.last_rule_drops(chain) is drops


@pytest.mark.parametrize(
    ("name", "kind", "text", "key"),
    [
        ("ports4", "inet_proto . inet_service : ipv4_addr . inet_service", "udp . 53 : 10.0.0.2 . 54", ("udp", "", 53)),
        (
            "ranges6",
            "inet_proto . ipv6_addr . inet_service : ipv6_addr; flags interval",
            "tcp . ::/0 . 1000-2000 : fd30::2",
            ("tcp", "fd31::1", 1500),
        ),
        (
            "addresses6",
            "inet_proto . ipv6_addr . inet_service : ipv6_addr . inet_service",
            "sctp . fd31::1 . 1 : fd30::2 . 65535",
            ("sctp", "fd31::1", 1),
        ),
    ],
)
def test_elements_are_read(space: Namespace, name: str, kind: str, text: str, key: tuple[str, str, int]) -> None:
    space.run("nft", "flush ruleset")
    space.run("nft", f"add table inet ours; add map inet ours {name} {{ type {kind}; }}")
    assert kernel.elements("inet ours", name) == frozenset()
    assert kernel.element("inet ours", name, elements.pack_key(*key)) is None
    space.run("nft", f"add element inet ours {name} {{ {text} }}")
    packed = elements.pack(text, name.startswith("ranges"))
    assert kernel.elements("inet ours", name) == {packed}
    assert kernel.element("inet ours", name, elements.pack_key(*key)) == packed
    assert elements.unpack_target(packed.target) == text.partition(" : ")[2]
    assert kernel.elements("inet ours", "none") == frozenset()
