"""What is declared compared with what there is: what is done makes the one of the other, and nothing that was typed is
touched."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.daemon.declaration import Declaration, DeclaredContainer, DeclaredNetwork, DeclaredPort
from gangway.daemon.difference import (
    Attach,
    CreateNetwork,
    Current,
    Detach,
    Publish,
    RemoveNetwork,
    Step,
    Unpublish,
    check_free,
    compare,
    match,
)
from gangway.daemon.messages import NetworkRequest
from gangway.errors import Conflict
from gangway.model import ON_DEMAND, Endpoint, Network, PortMapping, PortRange, PortRequest, Source, parse_port
from tests.unit.samples import BACK, WEB, mapping, network

FILE = "/etc/gangway/conf.d/web.toml"
FIXED = ("8000:80", "8000:81", "[::]:8000:80", "127.0.0.1:9000-9001:90-91/udp")
CHOICES = ("7000-7009:70", "80", "127.0.0.1::80")
NAMES = ("a", "b", "docker:c")
ON_DEMANDS = network(ON_DEMAND, "10.201.0.0/24")


def everything_exists(_name: str) -> bool:
    return True


def asked(text: str, *clients: str) -> PortRequest:
    admitted = tuple(subnet for subnet in (*WEB.subnets, *BACK.subnets) if str(subnet) in clients)
    return replace(parse_port(text, admitted), source=Source.DECLARED)


def declared_container(
    name: str, of: Sequence[str] = (), *ports: PortRequest, addresses: Sequence[str] = ()
) -> DeclaredContainer:
    declared_ports = tuple(DeclaredPort(one, FILE) for one in ports)
    return DeclaredContainer(name, tuple(of), frozenset(map(ip_address, addresses)), FILE, declared_ports)


def declaration(networks: Iterable[NetworkRequest], containers: Iterable[DeclaredContainer]) -> Declaration:
    return Declaration(
        {one.name: DeclaredNetwork(one, FILE) for one in networks}, {one.name: one for one in containers}
    )


class World:
    """What a host would have after steps: the networks, endpoints and mappings, none of it twice."""

    def __init__(self, current: Current) -> None:
        self.networks = {one.name: one for one in current.networks}
        self.endpoints = list(current.endpoints)
        self.mappings = list(current.mappings)

    def current(self) -> Current:
        return Current(tuple(self.networks.values()), tuple(self.endpoints), tuple(self.mappings))

    def of(self, container: str) -> list[Endpoint]:
        return [one for one in self.endpoints if one.container == container]

    def do(self, step: Step) -> None:
        match step:
            case Unpublish():
                for one in step.mappings:
                    self.mappings.remove(one)
            case Detach():
                (left,) = (one for one in self.of(step.container) if one.network == step.network)
                self.endpoints.remove(left)
                if left.is_first:
                    assert not self.of(step.container)
                    self.mappings = [one for one in self.mappings if one.container != step.container]
                used = {one.network for one in self.endpoints}
                if ON_DEMAND not in used:
                    self.networks.pop(ON_DEMAND, None)
            case RemoveNetwork():
                assert step.name not in {one.network for one in self.endpoints}
                del self.networks[step.name]
            case CreateNetwork():
                made = step.declared.request.network(subnets=WEB.subnets, source=Source.DECLARED)
                assert made.name not in self.networks
                self.networks[made.name] = made
            case Attach():
                if step.network == ON_DEMAND:
                    self.networks.setdefault(ON_DEMAND, ON_DEMANDS)
                assert step.network in self.networks
                known = self.of(step.container)
                assert step.network not in {one.network for one in known}
                of = step.addresses, Source.DECLARED
                self.endpoints.append(Endpoint(step.container, step.network, *of, is_first=not known))
            case Publish():
                assert self.of(step.container) or step.container.startswith("docker:")
                for request in step.requests:
                    self._publish(step.container, request)

    def _publish(self, container: str, request: PortRequest) -> None:
        ports = request.host_ports
        if ports is None or request.is_choice:
            used = {one.host_ports.first for one in self.mappings if one.container == container}
            first, last = (ports.first, ports.last) if ports else (40000, 50000)
            number = next(port for port in range(first, last + 1) if port not in used)
            ports = PortRange(number, number)
        for address in request.host_addresses:
            of = request.source, False, request.admitted
            made = PortMapping(container, request.protocol, address, ports, request.container_ports, *of)
            assert made not in self.mappings
            self.mappings.append(made)


def after(current: Current, wanted: Declaration, is_complete: bool = True) -> Current:
    world = World(current)
    for step in compare(wanted, current, everything_exists, is_complete).steps:
        world.do(step)
    return world.current()


def parts(current: Current) -> set[object]:
    return {*current.networks, *current.endpoints, *current.mappings}


def requests_of(texts: Sequence[str]) -> st.SearchStrategy[PortRequest]:
    return st.builds(asked, st.sampled_from(texts), st.sampled_from(("", *map(str, WEB.subnets))))


requests = requests_of(FIXED + CHOICES)
SUBNETS = (["172.30.0.0/24"], ["172.29.0.0/24", "fd29::/64"])


@st.composite
def declarations(draw: st.DrawFn, leaves_choices: bool = True) -> Declaration:
    """What files may declare; unless it `leaves_choices`, there is one way only to do as they say."""
    subnets, ports_of = (([], *SUBNETS), requests) if leaves_choices else (SUBNETS, requests_of(FIXED))
    requested = st.builds(
        NetworkRequest, name=st.sampled_from(("web", "back")), subnets=st.sampled_from(subnets), icc=st.booleans()
    )
    networks = draw(st.lists(requested, unique_by=lambda one: one.name))
    known = [(), *permutations((*(one.name for one in networks), ON_DEMAND), 1)]
    known += permutations((*(one.name for one in networks), ON_DEMAND), 2)
    containers = []
    for name in draw(st.sets(st.sampled_from(NAMES))):
        of = () if name.startswith("docker:") else draw(st.sampled_from(known))
        # A request and another one for some of its addresses cannot both be served.
        ports = draw(st.lists(ports_of, unique_by=lambda one: (one.host_ports, one.container_ports, one.admitted)))
        containers.append(declared_container(name, of, *ports))
    return declaration(networks, containers)


@st.composite
def typed(draw: st.DrawFn) -> Current:
    """Networks, containers and ports that commands have made."""
    networks = draw(st.sets(st.sampled_from((WEB, BACK))))
    endpoints = [Endpoint("other", one.name, ()) for one in list(networks)[:1]]
    endpoints += [Endpoint("b", one.name, ()) for one in list(networks)[1:]]
    if len(networks) > 1 and draw(st.booleans()):
        endpoints.append(Endpoint("b", endpoints[0].network, (), is_first=False))
    mappings = [mapping("127.0.0.1", "6000", container=one.container) for one in endpoints if draw(st.booleans())]
    return Current(tuple(networks), tuple(endpoints), tuple(mappings))


@given(typed(), declarations())
def test_applying_twice_does_nothing(before: Current, wanted: Declaration) -> None:
    done = after(before, wanted)
    assert compare(wanted, done, everything_exists).steps == ()


@given(typed(), declarations(leaves_choices=False), declarations(leaves_choices=False))
def test_the_difference_is_undone_by_its_inverse(before: Current, one: Declaration, other: Declaration) -> None:
    first = after(before, one)
    assert parts(after(after(first, other), one)) == parts(first)
    assert parts(after(first, Declaration())) == parts(before)


@given(typed(), declarations(), declarations())
def test_what_was_typed_stays(before: Current, one: Declaration, other: Declaration) -> None:
    assert parts(before) <= parts(after(after(before, one), other))


@given(typed(), declarations(), declarations())
def test_nothing_undeclared_is_removed_while_a_file_is_wrong(
    before: Current, one: Declaration, other: Declaration
) -> None:
    steps = compare(other, after(before, one), everything_exists, is_complete=False).steps
    assert {step.name for step in steps if isinstance(step, RemoveNetwork)} <= other.networks.keys()
    assert {step.container for step in steps if isinstance(step, Detach)} <= other.containers.keys()
    assert not any(isinstance(step, Unpublish) for step in steps)


@given(st.lists(requests, unique=True), st.lists(requests, unique=True))
def test_no_mapping_belongs_to_two_requests(one: list[PortRequest], other: list[PortRequest]) -> None:
    world = World(Current())
    for request in dict.fromkeys(one):
        with suppress(AssertionError):  # another one is there already
            world.do(Publish("docker:c", (request,)))
    found = match(other, world.mappings)
    assert len(other) - len(found.missing) <= len(world.mappings) - len(found.unclaimed)
    assert set(found.unclaimed) <= set(world.mappings)
    assert match(found.missing, found.unclaimed).missing == found.missing


def test_a_container_that_does_not_exist_waits() -> None:
    wanted = declaration(
        [NetworkRequest("web", ["172.30.0.0/24"])], [declared_container("a", ["web"], asked("8000:80"))]
    )
    (step,) = compare(wanted, Current(), lambda _name: False).steps
    assert str(step) == "+ network web: 172.30.0.0/24"
    steps = compare(wanted, Current((made_of(step),)), everything_exists).steps
    assert list(map(str, steps)) == ["+ attach a: network web", "+ publish a: 8000:80"]


def made_of(step: Step) -> Network:
    assert isinstance(step, CreateNetwork)
    return step.declared.request.network(source=Source.DECLARED)


def test_what_commands_have_made_otherwise_is_said() -> None:
    wanted = declaration(
        [NetworkRequest("web", ["172.28.0.0/24"])], [declared_container("a", ["web"], asked("8000:80"))]
    )
    current = Current((WEB, BACK), (Endpoint("a", "back", ()),))
    steps, notes = compare(wanted, current, everything_exists)
    assert steps == ()
    assert notes == (
        f"network web is another one than {FILE} declares: gangway network rm web",
        f"container a is attached to network back otherwise than {FILE} declares: gangway detach a",
    )


def test_what_commands_use_of_what_was_declared_stays() -> None:
    declared = replace(WEB, source=Source.DECLARED)
    box, typed_port = Endpoint("box", "web", (), Source.DECLARED), mapping("127.0.0.1", "6000")
    current = Current((declared,), (box,), (typed_port, replace(mapping("127.0.0.1"), source=Source.DECLARED)))
    steps, notes = compare(Declaration(), current, everything_exists)
    assert list(map(str, steps)) == ["- publish box: 127.0.0.1:8000:8000/tcp"]
    assert notes == (
        "container box stays attached: 127.0.0.1:6000:6000/tcp is published by command",
        "network web stays as it is: box is attached by command",
    )


def test_clients_that_change_are_published_anew() -> None:
    wanted = declaration([], [declared_container("docker:c", (), asked("127.0.0.1:8000:80", str(WEB.subnets[0])))])
    before = after(Current(), declaration([], [declared_container("docker:c", (), asked("127.0.0.1:8000:80"))]))
    assert list(map(str, compare(wanted, before, everything_exists).steps)) == [
        "- publish docker:c: 127.0.0.1:8000:80/tcp",
        "+ publish docker:c: 127.0.0.1:8000:80 from 172.30.0.0/24",
    ]


def test_a_port_is_free_when_its_turn_comes() -> None:
    box, has_8000 = Endpoint("box", "web", (), Source.DECLARED), mapping("127.0.0.1", "8000", "80")
    current = Current((WEB,), (box, Endpoint("box", "back", (), Source.DECLARED, is_first=False)), (has_8000,))
    publish = Publish("a", (asked("8001:80"), asked("127.0.0.1:8000:80")))
    refused = r"^publish a: 8001:80, 127\.0\.0\.1:8000:80: 127\.0\.0\.1:8000/tcp is already published for container box"
    for steps in ((publish,), (Detach("box", "back"), publish), (Unpublish("box", ()), publish)):
        with pytest.raises(Conflict, match=refused):
            check_free(steps, current)
    for steps in ((Detach("box", "web"), publish), (Unpublish("box", (has_8000,)), publish)):
        check_free(steps, current)
    with pytest.raises(Conflict, match=r"^publish b: \[::\]:8001:80: \[::\]:8001/tcp .* container a: "):
        check_free((publish, Publish("b", (asked("[::]:8001:80"),))), Current())
    check_free((publish, Publish("b", (asked("[::]:8001:80"),))), Current(), has_ipv6=False)
    check_free((Publish("b", (asked("80"), asked("127.0.0.1:8000-8001:80"))),), current)


def test_a_port_without_an_address_has_none_of_ipv6_where_there_is_no_ipv6() -> None:
    (four, six) = (replace(mapping(at, "8000", "80"), source=Source.DECLARED) for at in ("0.0.0.0", "::"))
    for request in (asked("8000:80"), asked("8000-8010:80")):
        assert match([request], [four], has_ipv6=False) == ((), ())
        assert match([request], [four]) == ((request,), (four,))
        assert match([request], [four, six]) == ((), ())


def several(*containers: DeclaredContainer) -> Declaration:
    requested = NetworkRequest("web", ["172.30.0.0/24"]), NetworkRequest("back", ["172.31.0.0/24"])
    return declaration(requested, containers)


def steps_of(wanted: Declaration, current: Current) -> list[str]:
    return list(map(str, compare(wanted, current, everything_exists).steps))


def test_a_container_joins_further_networks_after_its_ports_are_published() -> None:
    box = declared_container("a", ["web", "back"], asked("8000:80"), addresses=["172.31.0.9", "172.30.0.5"])
    both = after(Current(), several(box))
    assert steps_of(several(box), Current())[2:] == [
        "+ attach a: network web, 172.30.0.5",
        "+ publish a: 8000:80",
        "+ attach a: network back, 172.31.0.9",
    ]
    moved = replace(box, addresses=frozenset({ip_address("172.31.0.8")}))
    assert steps_of(several(moved), both) == ["- attach a: network back", "+ attach a: network back, 172.31.0.8"]
    left = replace(moved, networks=("web",))
    assert steps_of(several(replace(left, addresses=frozenset())), both) == ["- attach a: network back"]
    turned = replace(box, networks=("back", "web"), addresses=frozenset())
    assert steps_of(several(turned), both) == [
        "- attach a: network back",
        "- attach a: network web",
        "+ attach a: network back",
        "+ publish a: 8000:80",
        "+ attach a: network web",
    ]
    assert steps_of(several(), both)[:2] == ["- attach a: network back", "- attach a: network web"]


def test_an_address_waits_for_the_further_network_that_it_may_be_of() -> None:
    web = declaration([NetworkRequest("web", ["172.30.0.0/24"])], [])
    for addresses, at_once in ((["172.31.0.9"], ""), (["172.31.0.9", "172.30.0.5"], ", 172.30.0.5")):
        box = declared_container("a", ["web", "back"], asked("8000:80"), addresses=addresses)
        steps = steps_of(replace(web, containers={"a": box}), Current())
        assert steps[1:] == [f"+ attach a: network web{at_once}", "+ publish a: 8000:80", "+ attach a: network back"]
    alone = declared_container("a", ["web"], asked("8000:80"), addresses=["172.31.0.9"])  # refused when it is attached
    assert steps_of(replace(web, containers={"a": alone}), Current())[1] == "+ attach a: network web, 172.31.0.9"


def test_a_further_network_that_was_typed_stays() -> None:
    web, back = (replace(one, subnets=one.subnets[:1], gateways=one.gateways[:1]) for one in (WEB, BACK))
    typed = Endpoint("a", "back", (back.subnets[0][2],), is_first=False)
    current = Current((web, back), (Endpoint("a", "web", (), Source.DECLARED), typed))
    steps, notes = compare(Declaration(), current, everything_exists)
    assert (steps, notes) == ((), ("container a stays attached: network back was joined by command",))
    box = declared_container("a", ["web", "back"])
    wanted = declaration([], [replace(box, addresses=frozenset({ip_address("172.31.0.9")}))])
    steps, notes = compare(wanted, current, everything_exists)
    assert steps == ()
    assert notes == (
        f"container a is attached to network back otherwise than {FILE} declares: gangway detach a --network back",
    )
    assert compare(declaration([], [box]), current, everything_exists) == ((), ())
