"""The facts about the host that decisions depend on, as values; `gangway.host` and `reconcile.observe` find them."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from gangway.model import Address, Protocol, without_zone
from gangway.reasons import Code, Reason

FORWARDING_SETTING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


class Firewall(StrEnum):
    """What gangway writes its rules with."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    NONE = "none"


class Detour(NamedTuple):
    """An interface of the host whose clients no rule can serve."""

    interface: str
    family: int
    addresses: frozenset[Address]  # the host's addresses that clients reach by it
    reason: Reason


class LostSource(NamedTuple):
    """An address of the host that a policy rule routes: packets from it would not get to a container."""

    address: Address
    requested: frozenset[Address]  # the host's addresses that its own processes connect to from this one
    reason: Reason


@dataclass(frozen=True)
class HostFacts:
    """The facts about the host that decisions depend on.  Families are 4 and 6."""

    firewall: Firewall
    forwarding: frozenset[int] = frozenset({4, 6})  # families that the kernel forwards
    may_forward: bool = True  # the daemon may enable forwarding
    unforwardable: tuple[tuple[int, str], ...] = ()  # families that cannot be forwarded, and why: which sysctl is off
    switched_on: frozenset[int] = frozenset()  # families that are forwarded because the daemon enabled it
    obey_input: bool = False  # what the host's firewall drops in INPUT has to hold for published ports, too
    forward_droppers: tuple[tuple[int, str], ...] = ()  # other programs' chains, with their family
    own_bridge: bool = True  # rules also translate connections from the container's own bridge
    bridge_filtered: frozenset[int] = frozenset()  # families whose bridged frames pass the firewall (br_netfilter)
    foreign_bridges: tuple[str, ...] = ()  # other programs' bridges whose frames the firewall sees
    missing_protocols: frozenset[Protocol] = frozenset()  # protocols of which the kernel has no sockets
    detours: tuple[Detour, ...] = ()
    lost_sources: tuple[LostSource, ...] = ()
    leased: bool = False  # docker-proxy launchers have the sockets of the ports that dockerd holds
    answers_elsewhere: frozenset[Address] = frozenset()  # containers' addresses whose answers do not pass the host
    exclude: tuple[str, ...] = ()  # the setting: addresses and interfaces that are left to other programs
    excluded: frozenset[Address] = frozenset()  # the addresses that it stands for now, without zones
    no_redirect: str = ""  # why sockets cannot be redirected; empty if they can
    no_steering: str = ""  # why one socket cannot serve many ports; empty if it can
    no_raw: str = ""  # why UDP answers cannot leave from a port that another program has bound; empty if they can

    def __hash__(self) -> int:
        return hash(self.firewall)  # decisions about thousands of mappings are looked up by the same facts

    def dropper(self, family: int) -> str | None:
        """Return another program's chain that drops forwarded packets of a family; None if there is none."""
        return next((chain for version, chain in self.forward_droppers if version == family), None)

    def why_not_translated(self, family: int) -> Reason | None:
        """Return why connections that come in by an interface are not translated; None if they are."""
        if self.firewall is Firewall.NONE:
            return Reason(Code.NO_FIREWALL)
        if self.obey_input:
            return Reason(Code.OBEY_INPUT)
        if family in dict(self.unforwardable):
            return Reason(Code.UNFORWARDABLE, dict(self.unforwardable)[family])
        if not (self.may_forward or family in self.forwarding):
            return Reason(Code.NOT_FORWARDED, FORWARDING_SETTING[family])
        return Reason(Code.FORWARD_DROPPED, dropper) if (dropper := self.dropper(family)) else None

    def why_not_forwarded(self, family: int) -> str:
        """Return why packets for a container's own address do not get there; empty if they do."""
        if family in dict(self.unforwardable):
            return dict(self.unforwardable)[family]
        if family not in self.forwarding and (self.firewall is Firewall.NONE or not self.may_forward):
            return f"{FORWARDING_SETTING[family]} is off"
        return f"another program's chain drops forwarded traffic ({found})" if (found := self.dropper(family)) else ""

    def is_excluded(self, address: Address) -> bool:
        """True if nothing is published at an address because of the setting `exclude`."""
        return without_zone(address) in self.excluded

    def excluded_in(self, family: int) -> tuple[Address, ...]:
        """Return the excluded addresses of a family, in order."""
        return tuple(sorted((one for one in self.excluded if one.version == family), key=int))

    def detour_of(self, address: Address) -> Reason | None:
        """Return why no rule can serve clients of an address that come in by an interface; None if one can."""
        return next((detour.reason for detour in self.detours if address in detour.addresses), None)

    def exceptional_addresses(self, family: int) -> tuple[Address, ...]:
        """Return the host's addresses at which some clients may take another road than at the others."""
        found = {address for detour in self.detours for address in detour.addresses}
        found |= {address for lost in self.lost_sources for address in (lost.address, *lost.requested)}
        return tuple(sorted((one for one in found if one.version == family), key=int))
