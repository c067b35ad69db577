"""Networks, endpoints, mappings and facts for tests: examples, and strategies for any others."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

from hypothesis import strategies as st

from gangway.addressing import first_gateway
from gangway.facts import Firewall, HostFacts
from gangway.model import Endpoint, Network, PortMapping, PortRange, Protocol, Source, lease_endpoint
from gangway.plan import MappingPlan, Plan, assemble, plan_mapping

NFTABLES = HostFacts(Firewall.NFTABLES)
IPTABLES = HostFacts(Firewall.IPTABLES)
NONE = HostFacts(Firewall.NONE)
NO_CGROUPS = "this kernel has no cgroup v2"
NO_RAW = "raw sockets are not permitted"
NO_REDIRECT = HostFacts(Firewall.NFTABLES, no_redirect=NO_CGROUPS)
NO_STEERING = HostFacts(Firewall.NFTABLES, no_steering=NO_CGROUPS)


def network(
    name: str = "web",
    subnets: str = "172.30.0.0/24,fd30::/64",
    masquerade: bool = True,
    icc: bool = True,
    internal: bool = False,
) -> Network:
    """Return a network whose bridge is gw-NAME."""
    found = tuple(ip_network(text) for text in subnets.split(","))
    return Network(name, f"gw-{name}", found, tuple(map(first_gateway, found)), masquerade, icc, internal)


WEB = network()
BACK = network("back", "172.31.0.0/24,fd31::/64", masquerade=False, icc=False)
INNER = network("inner", "172.29.0.0/24,fd29::/64", internal=True)
FOUR = network("four", "172.28.0.0/24")
SIX = network("six", "fd28::/64")
DIRECT = replace(network("direct", "172.27.0.0/24,fd27::/64"), source=Source.DOCKER, routed=frozenset({4, 6}))
"""One in the gateway mode `routed`."""


def endpoint(of: Network = WEB, container: str = "box") -> Endpoint:
    """Return an endpoint with the address after the gateway's in each subnet."""
    return Endpoint(container, of.name, tuple(subnet[2] for subnet in of.subnets))


def mapping(
    at: str, ports: str = "8000", to: str = "", protocol: Protocol = Protocol.TCP, container: str = "box"
) -> PortMapping:
    """Return a mapping to the same ports of a container, or to the ports `to`."""
    return PortMapping(container, protocol, ip_address(at), PortRange.parse(ports), PortRange.parse(to or ports))


def admitting(one: PortMapping, *subnets: str) -> PortMapping:
    """Return a mapping for the clients of some subnets."""
    return replace(one, admitted=tuple(map(ip_network, subnets)))


def lease(
    at: str, ports: str = "8000", to: str = "", protocol: Protocol = Protocol.TCP, container: str = "172.17.0.2"
) -> PortMapping:
    """Return a docker-proxy launcher's mapping: `container` is the container's address."""
    return replace(mapping(at, ports, to, protocol, container), source=Source.LEASE)


def held(
    at: str, ports: str = "8000", to: str = "", protocol: Protocol = Protocol.TCP, container: str = "box"
) -> PortMapping:
    """Return a mapping whose ports dockerd holds by sockets of its own."""
    return replace(mapping(at, ports, to, protocol, container), source=Source.DOCKER, is_held=True)


def routed(
    ports: str = "8000", family: int = 4, protocol: Protocol = Protocol.TCP, of: Network = DIRECT
) -> PortMapping:
    """Return a mapping at the container's own address."""
    at = next(one for one in endpoint(of).addresses if one.version == family)
    return replace(mapping(str(at), ports, protocol=protocol), source=Source.DOCKER, is_routed=True)


def planned(one: PortMapping, facts: HostFacts = NFTABLES, of: Network = WEB) -> MappingPlan:
    """Return the plan of a mapping of a container on the network `of`, or of a lease."""
    if one.source is Source.LEASE:
        return plan_mapping(one, lease_endpoint(one), None, facts)
    return plan_mapping(one, endpoint(of), of, facts)


def whole(facts: HostFacts, *mappings: PortMapping, networks: tuple[Network, ...] = (WEB,)) -> Plan:
    """Return a plan of these networks and a container on the first of them with these mappings."""
    planned_mappings = tuple(planned(one, facts, networks[0]) for one in mappings)
    return assemble(networks, frozenset(), planned_mappings, facts)


FORMS = (
    mapping("0.0.0.0", "8000", "80"),
    mapping("0.0.0.0", "53", protocol=Protocol.UDP),
    mapping("::", "8000", "80"),
    mapping("192.0.2.5", "8443", "443"),
    mapping("2001:db8::5", "8443", "443", Protocol.SCTP),
    mapping("0.0.0.0", "9000-9010"),
    mapping("::", "9000-9010", protocol=Protocol.UDP),
    mapping("192.0.2.5", "9000-9010", protocol=Protocol.UDP),
    mapping("2001:db8::5", "9020-9021"),
    mapping("0.0.0.0", "7000-7002", "5000-5002"),
    mapping("192.0.2.5", "7100-7101", "5000-5001"),
    mapping("127.0.0.1", "6000"),
    mapping("::1", "6000"),
    mapping("127.0.0.1", "6001-6005"),
    mapping("fe80::5", "6000"),
)
RESTRICTED = (
    admitting(mapping("0.0.0.0", "8000", "80"), "10.0.0.0/8", "192.0.2.5/32", "fd00::/8"),
    admitting(mapping("::", "8000", "80"), "10.0.0.0/8"),
    admitting(mapping("192.0.2.5", "9000-9010", protocol=Protocol.UDP), "0.0.0.0/0"),
    admitting(mapping("fe80::5", "6000"), "fd00::/8"),
)
"""Mappings for some clients."""
ROUTED = (
    routed("8000"),
    routed("9000-9010", 6, Protocol.UDP),
    admitting(routed("80", protocol=Protocol.SCTP), "10.0.0.0/8", "192.0.2.5/32", "fd00::/8"),
    admitting(routed("80", 6), "10.0.0.0/8"),
    mapping("0.0.0.0", "7000", "70"),
)
"""Mappings at containers' own addresses, and one that is translated."""
ROUTED_NETWORKS = (DIRECT, replace(BACK, routed=frozenset({6})), replace(INNER, routed=frozenset({4, 6})))
"""All forms of a mapping; no rules carry the last four."""

_FAMILIES = st.frozensets(st.sampled_from((4, 6)))
FACTS = st.builds(
    HostFacts,
    firewall=st.sampled_from(Firewall),
    forwarding=_FAMILIES,
    may_forward=st.booleans(),
    unforwardable=st.sampled_from(((), ((4, "a switch is off"),), ((6, "another is off"),))),
    switched_on=_FAMILIES,
    obey_input=st.booleans(),
    forward_droppers=st.sampled_from(((), ((4, "ip filter FORWARD"),), ((6, "ip6 theirs drop"),))),
    own_bridge=st.booleans(),
    bridge_filtered=_FAMILIES,
    foreign_bridges=st.sampled_from(((), ("docker0",), ("br0", "virbr0"))),
    missing_protocols=st.frozensets(st.sampled_from(Protocol)),
    no_redirect=st.sampled_from(("", NO_CGROUPS)),
    no_steering=st.sampled_from(("", NO_CGROUPS)),
    no_raw=st.sampled_from(("", NO_RAW)),
)
NETWORKS = st.sampled_from((WEB, BACK, INNER, FOUR, SIX))
HOST_ADDRESSES = tuple(
    map(ip_address, ("0.0.0.0", "::", "127.0.0.1", "::1", "192.0.2.5", "2001:db8::5", "fe80::5", "169.254.0.5"))
)


@st.composite
def mappings(draw: st.DrawFn, containers: tuple[str, ...] = ("box",), may_be_held: bool = False) -> PortMapping:
    """Draw any mapping; many collide."""
    first, to = draw(st.integers(8000, 8008)), draw(st.integers(80, 83) | st.integers(8000, 8002))
    length = draw(st.sampled_from((0, 0, 0, 1, 4)))
    return PortMapping(
        draw(st.sampled_from(containers)),
        draw(st.sampled_from(Protocol)),
        draw(st.sampled_from(HOST_ADDRESSES)),
        PortRange(first, first + length),
        PortRange(to, to + length),
        is_held=may_be_held and draw(st.booleans()),
    )


def collide(one: PortMapping, other: PortMapping) -> bool:
    """True if both mappings have a host port of one address.  0.0.0.0 and :: stand for all addresses of a family."""
    addresses = {one.host_address, other.host_address}
    return (
        one.protocol is other.protocol
        and max(one.host_ports.first, other.host_ports.first) <= min(one.host_ports.last, other.host_ports.last)
        and one.host_address.version == other.host_address.version
        and (len(addresses) == 1 or any(address.is_unspecified for address in addresses))
    )


def apart(many: list[PortMapping]) -> list[PortMapping]:
    """Return the mappings that do not collide with an earlier one."""
    found: list[PortMapping] = []
    for one in many:
        if not any(collide(one, other) for other in found):
            found.append(one)
    return found


APART = st.lists(mappings(), max_size=8).map(apart)
