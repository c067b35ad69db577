"""What has to be done: the difference between what is and what should be, as steps in an order.

What this file knows: the kinds of steps, what goes before what, and how each is undone.  What it must not know: how a
step is carried out.

How it works.  `diff(before, after)` compares two States.  A command compares the little that it changes; a daemon that
starts, or that was told of a change, compares what it found in the kernel with all that is wanted.  The order:

    taking down     redirects → forwarding → rules → steering → relay's ports → flows → attachments → bridges
    setting up      bridges → attachments → relay's ports → steering → rules → flows → forwarding → redirects

Nothing is translated to where it does not lead yet, and a port is the relay's before a rule leads past it: so no moment
refuses a connection that a moment later would have been served.  Forwarding is on only while the rules that restrict it
stand.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, TypeVar

from gangway.ebpf import keys
from gangway.ebpf.keys import PortBlock, blocks
from gangway.model import Endpoint, Network
from gangway.plan import MappingPlan, NetworkPlan, Plan

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class HostPorts(NamedTuple):
    """Ports that the relay keeps: one or a range."""

    protocol: str
    address: str
    first: int
    last: int


class Target(NamedTuple):
    """Where their clients are taken: those of the first port to this one, and so on."""

    address: str
    first: int
    is_steered: bool
    """By a socket that serves other ports, too."""


class Attachment(NamedTuple):
    """An endpoint with what it takes to make it."""

    endpoint: Endpoint
    network: Network
    namespace: str
    """The path of the container's."""
    isolated: bool
    """Its bridge port reaches the bridge only."""


class Ports(NamedTuple):
    """Some of the relay's ports."""

    of: tuple[tuple[HostPorts, Target], ...]


class Rewrite(NamedTuple):
    """All rules, from one plan to another; None: none are."""

    before: Plan | None
    after: Plan | None


class Change(NamedTuple):
    """Rules of mappings."""

    withdrawn: tuple[MappingPlan, ...]
    published: tuple[MappingPlan, ...]


class Entries(NamedTuple):
    """Entries of the redirect, or of steering (True: served)."""

    of: tuple[tuple[PortBlock, keys.Target | bool], ...]


class Flows(NamedTuple):
    """Connections by the rules of some mappings, as far as they are tracked."""

    of: tuple[MappingPlan, ...]


class Forwarding(NamedTuple):
    """Families that are to be forwarded."""

    before: frozenset[int]
    after: frozenset[int]


class Verb(StrEnum):
    """What a step does."""

    MAKE_BRIDGE = "make bridge"
    DELETE_BRIDGE = "delete bridge"
    ATTACH = "attach"
    DETACH = "detach"
    ISOLATE = "isolate"
    KEEP = "keep ports"
    DROP = "drop ports"
    STEER = "steer ports"
    UNSTEER = "unsteer ports"
    REWRITE = "rewrite rules"
    CHANGE = "change rules"
    ENTER = "enter redirects"
    ERASE = "erase redirects"
    FORGET = "forget flows"
    FORWARD = "forward"


@dataclass(frozen=True)
class Step:
    """One thing to do.  `name` is that of a link, for the steps about one."""

    verb: Verb
    what: object
    name: str = ""

    def undo(self) -> "Step | None":
        """What takes it back; None where nothing does, or need."""
        match self.what:
            case None:
                return None
            case Rewrite(before, after):
                return Step(self.verb, Rewrite(after, before))
            case Change(withdrawn, published):
                return Step(self.verb, Change(published, withdrawn))
            case Forwarding(before, after):
                return Step(self.verb, Forwarding(after, before))
        opposite = _OPPOSITES.get(self.verb)
        return None if opposite is None else Step(opposite, self.what, self.name)


_OPPOSITES = {
    Verb.MAKE_BRIDGE: Verb.DELETE_BRIDGE,
    Verb.DELETE_BRIDGE: Verb.MAKE_BRIDGE,
    Verb.ATTACH: Verb.DETACH,
    Verb.DETACH: Verb.ATTACH,
    Verb.KEEP: Verb.DROP,
    Verb.DROP: Verb.KEEP,
    Verb.STEER: Verb.UNSTEER,
    Verb.UNSTEER: Verb.STEER,
    Verb.ENTER: Verb.ERASE,
    Verb.ERASE: Verb.ENTER,
}


@dataclass(frozen=True)
class State:
    """What is, or should be.  Of what was only found, no more is known than its name: the value is None."""

    bridges: Mapping[str, NetworkPlan | None] = field(default_factory=dict)
    """By the bridge's name."""
    attachments: Mapping[str, Attachment | None] = field(default_factory=dict)
    """By the name of the host's end."""
    isolated: frozenset[str] = frozenset()
    """The host's ends that are."""
    ports: Mapping[HostPorts, Target] = field(default_factory=dict)
    steered: Mapping[PortBlock, bool] = field(default_factory=dict)
    """True: served; False: only reserved, and changed to served without being removed before."""
    redirects: Mapping[PortBlock, keys.Target] = field(default_factory=dict)
    mappings: Mapping[str, MappingPlan] = field(default_factory=dict)
    """Those whose rules change by themselves, by their text."""
    plan: Plan | None = None
    """Whose rules stand there."""
    forwarding: frozenset[int] = frozenset()


def link_name(container: str) -> str:
    """The host's end of a container's attachment: the same for the same container, and short enough for a link."""
    return "gw" + hashlib.blake2s(container.encode(), digest_size=6).hexdigest()


def ports_of(planned: MappingPlan) -> Iterator[tuple[HostPorts, Target]]:
    """The relay's ports for a mapping: all at once, or each with a socket of its own."""
    mapping = planned.mapping
    protocol, address, container = mapping.protocol.value, str(mapping.host_address), str(planned.container_address)
    if planned.is_steered:
        host, first = mapping.host_ports, mapping.container_ports.first
        yield HostPorts(protocol, address, host.first, host.last), Target(container, first, True)
    else:
        for port, container_port in mapping.pairs():
            yield HostPorts(protocol, address, port, port), Target(container, container_port, False)


def steered_of(planned: MappingPlan) -> Iterator[tuple[PortBlock, bool]]:
    """Steering's entries for a mapping."""
    if planned.is_steered:
        for block in _blocks(planned):
            yield block, True


def redirects_of(planned: MappingPlan) -> Iterator[tuple[PortBlock, keys.Target]]:
    """The redirect's entries for a mapping."""
    if planned.is_redirected:
        to = str(planned.container_address)
        shift = planned.mapping.container_ports.first - planned.mapping.host_ports.first
        for block in _blocks(planned):
            yield block, keys.Target(to, block.first + shift)


def _blocks(planned: MappingPlan) -> Iterator[PortBlock]:
    mapping = planned.mapping
    return blocks(mapping.protocol.value, str(mapping.host_address), mapping.host_ports.first, mapping.host_ports.last)


def diff(before: State, after: State) -> Iterator[Step]:
    """The steps from one to the other, in order."""
    yield from _take_down(before, after)
    yield from _set_up(before, after)


def _take_down(before: State, after: State) -> Iterator[Step]:
    erased = _missing(before.redirects, after.redirects)
    if erased:
        yield Step(Verb.ERASE, Entries(erased))
    if before.forwarding - after.forwarding:
        yield Step(Verb.FORWARD, Forwarding(before.forwarding, before.forwarding & after.forwarding))
    withdrawn = [planned for name, planned in before.mappings.items() if name not in after.mappings]
    if before.plan is not after.plan and _is_less(after.plan, before.plan):
        yield Step(Verb.REWRITE, Rewrite(before.plan, after.plan))
    elif withdrawn:
        yield Step(Verb.CHANGE, Change(tuple(withdrawn), ()))
    unsteered = tuple(entry for entry in before.steered.items() if entry[0] not in after.steered)
    if unsteered:
        yield Step(Verb.UNSTEER, Entries(unsteered))
    gone = _missing(before.ports, after.ports)
    if gone:
        yield Step(Verb.DROP, Ports(gone))
    if withdrawn:
        yield Step(Verb.FORGET, Flows(tuple(withdrawn)))
    for name, attachment in before.attachments.items():
        if name not in after.attachments:
            yield Step(Verb.DETACH, attachment, name)
    for name, network in before.bridges.items():
        if name not in after.bridges:
            yield Step(Verb.DELETE_BRIDGE, network, name)


def _set_up_links(before: State, after: State) -> Iterator[Step]:
    for name, network in after.bridges.items():
        if name not in before.bridges:
            yield Step(Verb.MAKE_BRIDGE, network, name)
    for name, attachment in after.attachments.items():
        # A new bridge has no ports: who was attached to one of that name is not any more.
        fresh = attachment is not None and attachment.network.bridge in after.bridges.keys() - before.bridges.keys()
        if name not in before.attachments or fresh:
            yield Step(Verb.ATTACH, attachment, name)
        elif attachment is not None and attachment.isolated != (name in before.isolated):
            yield Step(Verb.ISOLATE, attachment, name)


def _set_up(before: State, after: State) -> Iterator[Step]:
    yield from _set_up_links(before, after)
    new = _missing(after.ports, before.ports)
    if new:
        yield Step(Verb.KEEP, Ports(new))
    steered = _missing(after.steered, before.steered)
    if steered:
        yield Step(Verb.STEER, Entries(steered))
    published = [planned for name, planned in after.mappings.items() if name not in before.mappings]
    if before.plan is not after.plan and not _is_less(after.plan, before.plan):
        yield Step(Verb.REWRITE, Rewrite(before.plan, after.plan))
    elif published:
        yield Step(Verb.CHANGE, Change((), tuple(published)))
    stale = tuple(planned for planned in published if planned.mapping.protocol == "udp")
    if stale:
        yield Step(Verb.FORGET, Flows(stale))
    if after.forwarding - before.forwarding:
        yield Step(Verb.FORWARD, Forwarding(before.forwarding & after.forwarding, after.forwarding))
    entered = _missing(after.redirects, before.redirects)
    if entered:
        yield Step(Verb.ENTER, Entries(entered))


def _missing(here: Mapping[_Key, _Value], there: Mapping[_Key, _Value]) -> tuple[tuple[_Key, _Value], ...]:
    """What is there otherwise, or not at all."""
    return tuple((key, value) for key, value in here.items() if there.get(key) != value)


def _is_less(after: Plan | None, before: Plan | None) -> bool:
    """Rules go before what they lead to goes."""
    if after is None or before is None:
        return after is None
    return len(after.networks) < len(before.networks)
