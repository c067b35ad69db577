"""The terms of a decision: origins, roads, the reasons for them, and the facts about the host that they depend on."""

from dataclasses import dataclass
from enum import StrEnum

from gangway.model import Protocol


class Firewall(StrEnum):
    """What gangway writes its rules with."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    NONE = "none"


class Origin(StrEnum):
    """Who opens the connection."""

    LOOPBACK = "loopback"
    HOST = "host"
    REMOTE = "remote"
    CONTAINER = "container"


class Road(StrEnum):
    """The path that a connection takes to the container."""

    NAT = "nat"
    REDIRECT = "redirect"
    RELAY = "relay"
    BLOCKED = "blocked"


class Code(StrEnum):
    """Why a road was chosen, and the fact that goes with each reason."""

    TRANSLATED = "translated"
    """A rule translates the destination.  Fact: the container's address and ports."""
    MASQUERADED = "masqueraded"
    """The same, and another rule translates the source to the gateway's address.  Fact: the same."""
    REDIRECTED = "redirected"
    """A socket's destination is replaced when it connects or sends.  Fact: the container's address and ports."""
    REDIRECTED_AS_IPV4 = "redirected_as_ipv4"
    """The same for an IPv6 socket and a container that has IPv4 only.  Fact: the same."""
    LOOPBACK = "loopback"
    """The kernel does not route loopback addresses, and cannot redirect such sockets.  Fact: the addresses."""
    NO_REDIRECT = "no_redirect"
    """The kernel does not route loopback addresses, and the redirect is not available.  Fact: why not."""
    LINK_LOCAL = "link_local"
    """The kernel forwards nothing from a link-local address.  Fact: the host address."""
    FAMILY = "family"
    """The container has no address of the client's family.  Fact: its address."""
    NO_FIREWALL = "no_firewall"
    """The daemon is configured to write no rules.  Fact: empty."""
    NOT_FORWARDED = "not_forwarded"
    """The kernel does not forward.  Fact: the sysctl that disables it."""
    FORWARD_DROPPED = "forward_dropped"
    """Another program drops forwarded packets.  Fact: its chain."""
    OWN_BRIDGE = "own_bridge"
    """Docker's layout translates no connections from the container's own bridge.  Fact: the bridge."""
    LOOPBACK_ONLY = "loopback_only"
    """Published on a loopback address.  Fact: that address."""
    ELSEWHERE = "elsewhere"
    """Published on an address that the client does not connect to.  Fact: that address."""
    ISOLATED = "isolated"
    """The bridge isolates its containers, and nothing is translated within it.  Fact: the bridge."""
    NO_SOCKETS = "no_sockets"
    """The kernel has no sockets of the protocol, so there is no relay.  Fact: the protocol."""
    LEASE = "lease"
    """Docker's own rules may carry it first; what they leave is relayed.  Fact: empty."""


@dataclass(frozen=True)
class Reason:
    """Why, for machines; `cli.tables` has the sentences."""

    code: Code
    fact: str = ""


class SeenAs(StrEnum):
    """Whose address the container sees as its client's; nobody's if it sees no client."""

    CLIENT = "client"
    GATEWAY = "gateway"
    NOBODY = "nobody"


@dataclass(frozen=True)
class Route:
    """The road of one kind of client.  A `neighbour` is on the container's own network; it may be the container."""

    origin: Origin
    neighbour: bool
    road: Road
    reason: Reason
    seen_as: SeenAs


@dataclass(frozen=True)
class HostFacts:
    """The facts about the host that decisions depend on.  Families are 4 and 6."""

    firewall: Firewall
    forwarding: frozenset[int] = frozenset({4, 6})
    """Families that the kernel forwards."""
    may_forward: bool = True
    """True if the daemon may enable forwarding."""
    switched_on: frozenset[int] = frozenset()
    """Families that the kernel forwards because the daemon enabled it."""
    forward_droppers: tuple[tuple[int, str], ...] = ()
    """Other programs' chains that drop forwarded packets: family and chain."""
    own_bridge: bool = True
    """True if the rules also translate connections from the container's own bridge."""
    bridge_filtered: frozenset[int] = frozenset()
    """Families whose bridged frames pass through the firewall (br_netfilter)."""
    foreign_bridges: tuple[str, ...] = ()
    """Other programs' bridges whose frames the firewall sees."""
    missing_protocols: frozenset[Protocol] = frozenset()
    """Protocols of which the kernel has no sockets."""
    no_redirect: str = ""
    """Why sockets cannot be redirected; empty if they can."""
    no_steering: str = ""
    """Why one socket cannot serve many ports; empty if it can."""

    def dropper(self, family: int) -> str | None:
        """Return another program's chain that drops forwarded packets of a family; None if there is none."""
        return next((chain for version, chain in self.forward_droppers if version == family), None)
