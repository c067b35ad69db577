"""The reasons for a road: one code for each, which `gangway.cli.views` has a sentence for."""

from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """Why a road was chosen; the comments say which fact goes with each reason."""

    TRANSLATED = "translated"  # a rule translates the destination: the container's address and ports
    MASQUERADED = "masqueraded"  # another rule also translates the source to the gateway's address: the same
    REDIRECTED = "redirected"  # a socket's destination is replaced when it connects or sends: the same
    REDIRECTED_AS_IPV4 = "redirected_as_ipv4"  # so is that of an IPv6 socket, for a container with IPv4 only: the same
    LOOPBACK = "loopback"  # the kernel neither routes loopback addresses nor redirects such sockets: the addresses
    NO_REDIRECT = "no_redirect"  # it does not route loopback addresses, and the redirect is not available: why not
    LINK_LOCAL = "link_local"  # the kernel forwards nothing from a link-local address: the host address
    FAMILY = "family"  # the container has no address of the client's family: its address
    NO_FIREWALL = "no_firewall"  # the daemon is configured to write no rules: empty
    NOT_FORWARDED = "not_forwarded"  # the kernel does not forward: the sysctl that disables it
    UNFORWARDABLE = "unforwardable"  # it does not, and the sysctl that disables it cannot be written: it, and why
    OBEY_INPUT = (
        "obey_input"  # the setting `obey-input`: only what is for the host itself passes its chain INPUT: empty
    )
    NOT_FORWARDED_FROM = "not_forwarded_from"  # it forwards nothing from one interface: that interface's sysctl
    SOURCE_ROUTED = "source_routed"  # answers from the host address leave by another way than forwarded ones: the rule
    ANSWER_LOST = "answer_lost"  # that rule also leads the relay's answers to containers elsewhere: the rule
    ANSWERS_ELSEWHERE = "answers_elsewhere"  # MASQUERADED, because the container answers by another way: the same
    FORWARD_DROPPED = "forward_dropped"  # another program drops forwarded packets: its chain
    OWN_BRIDGE = "own_bridge"  # Docker's layout translates no connections from the container's own bridge: the bridge
    OWN_LOOPBACK = "own_loopback"  # a client elsewhere reaches its own loopback, not the host's: the address
    LOOPBACK_ONLY = "loopback_only"  # published on a loopback address: that address
    ELSEWHERE = "elsewhere"  # published on an address that the client does not connect to: that address
    EXCLUDED = "excluded"  # the setting `exclude` leaves the address to other programs: empty
    ISOLATED = "isolated"  # the bridge isolates its containers, and nothing is translated within it: the bridge
    NO_SOCKETS = "no_sockets"  # the kernel has no sockets of the protocol, so there is no relay: the protocol
    HELD = "held"  # dockerd holds the port by a socket, and the relay cannot serve it beside that: why not
    ROUTED = "routed"  # clients connect to the container's own address: it, and the container's ports
    CLOSED = "closed"  # they would, and cannot: why not
    DOCKERS_RULES = "dockers_rules"  # dockerd writes the rules of the container's network: its bridge
    LEASE = "lease"  # Docker's own rules may carry it first; what they leave is relayed: empty


@dataclass(frozen=True)
class Reason:
    """Why, for machines; `gangway.cli.views` has the sentences."""

    code: Code
    fact: str = ""
