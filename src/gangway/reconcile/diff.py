"""What has to be done: the difference between two States, as steps in an order.

What this file knows: the kinds of steps, their order, and the inverse of each.  What it must not know: how a step is
carried out.

`diff(before, after)` compares two States.  A request compares the little that it changes; a daemon that starts, or that
was notified of a change, compares what it found in the kernel with all that is wanted.  The order:

    removing      redirects → forwarding → rules → steering → relay's ports → flows → attachments → bridges
    adding        bridges → attachments → relay's ports → steering → rules → flows → forwarding → redirects

Nothing is translated before its target exists, and the relay has a port before a rule leads past it: so at no moment is
a connection refused that would have been served a moment later.  Forwarding is on only while the rules that restrict it
are applied.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypeVar

from gangway.ebpf.keys import PortBlock, Target
from gangway.plan import MappingPlan, Plan
from gangway.reconcile.state import State
from gangway.relay.protocol import Serve

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Ports(NamedTuple):
    """Ports that the relay serves."""

    ports: tuple[Serve, ...]


class Blocks(NamedTuple):
    """Blocks of ports that are steered."""

    blocks: tuple[PortBlock, ...]


class Redirects(NamedTuple):
    """Entries of the redirect."""

    entries: tuple[tuple[PortBlock, Target], ...]


class Rewrite(NamedTuple):
    """All rules, from one plan to another; None: no rules."""

    before: Plan | None
    after: Plan | None


class Change(NamedTuple):
    """The rules of mappings."""

    removed: tuple[MappingPlan, ...]
    added: tuple[MappingPlan, ...]


class Flows(NamedTuple):
    """Tracked connections by the rules of mappings."""

    mappings: tuple[MappingPlan, ...]


class Forwarding(NamedTuple):
    """Families that are forwarded."""

    before: frozenset[int]
    after: frozenset[int]


class Verb(StrEnum):
    """What a step does."""

    MAKE_BRIDGE = "make bridge"
    DELETE_BRIDGE = "delete bridge"
    ATTACH = "attach"
    DETACH = "detach"
    ISOLATE = "isolate"
    SERVE = "serve ports"
    REMOVE = "remove ports"
    STEER = "steer ports"
    UNSTEER = "stop steering ports"
    REWRITE = "rewrite rules"
    CHANGE = "change rules"
    REDIRECT = "add redirects"
    UNREDIRECT = "remove redirects"
    FLUSH = "flush flows"
    FORWARD = "set forwarding"


@dataclass(frozen=True)
class Step:
    """One thing to do.  `name` is that of a link, for the steps about one."""

    verb: Verb
    what: object
    name: str = ""

    def inverse(self) -> "Step | None":
        """Return the step that undoes it; None if it cannot be undone, or need not be."""
        match self.what:
            case None:
                return None
            case Rewrite(before, after):
                return Step(self.verb, Rewrite(after, before))
            case Change(removed, added):
                return Step(self.verb, Change(added, removed))
            case Forwarding(before, after):
                return Step(self.verb, Forwarding(after, before))
        opposite = _INVERSES.get(self.verb)
        return None if opposite is None else Step(opposite, self.what, self.name)


_PAIRS = (
    (Verb.MAKE_BRIDGE, Verb.DELETE_BRIDGE),
    (Verb.ATTACH, Verb.DETACH),
    (Verb.SERVE, Verb.REMOVE),
    (Verb.STEER, Verb.UNSTEER),
    (Verb.REDIRECT, Verb.UNREDIRECT),
)
_INVERSES = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}


def diff(before: State, after: State) -> Iterator[Step]:
    """Yield the steps from one state to the other, in order."""
    yield from _remove(before, after)
    yield from _add_links(before, after)
    yield from _add(before, after)


def _remove(before: State, after: State) -> Iterator[Step]:
    redirects = _differing(before.redirects, after.redirects)
    if redirects:
        yield Step(Verb.UNREDIRECT, Redirects(redirects))
    if before.forwarding - after.forwarding:
        yield Step(Verb.FORWARD, Forwarding(before.forwarding, before.forwarding & after.forwarding))
    removed = tuple(planned for name, planned in before.mappings.items() if name not in after.mappings)
    if before.plan is not after.plan and _has_fewer_networks(after.plan, before.plan):
        yield Step(Verb.REWRITE, Rewrite(before.plan, after.plan))
    elif removed:
        yield Step(Verb.CHANGE, Change(removed, ()))
    steered = tuple(block for block in before.steered if block not in after.steered)
    if steered:
        yield Step(Verb.UNSTEER, Blocks(steered))
    ports = _differing(before.ports, after.ports)
    if ports:
        yield Step(Verb.REMOVE, Ports(tuple(served for _, served in ports)))
    if removed:
        yield Step(Verb.FLUSH, Flows(removed))
    for name, attachment in before.attachments.items():
        if name not in after.attachments:
            yield Step(Verb.DETACH, attachment, name)
    for name, network in before.bridges.items():
        if name not in after.bridges:
            yield Step(Verb.DELETE_BRIDGE, network, name)


def _add_links(before: State, after: State) -> Iterator[Step]:
    for name, network in after.bridges.items():
        if name not in before.bridges:
            yield Step(Verb.MAKE_BRIDGE, network, name)
    for name, attachment in after.attachments.items():
        # A new bridge has no ports: an attachment to an earlier one of that name is lost.
        is_lost = attachment is not None and attachment.network.bridge in after.bridges.keys() - before.bridges.keys()
        if name not in before.attachments or is_lost:
            yield Step(Verb.ATTACH, attachment, name)
        elif attachment is not None and attachment.isolated != (name in before.isolated):
            yield Step(Verb.ISOLATE, attachment, name)


def _add(before: State, after: State) -> Iterator[Step]:
    ports = _differing(after.ports, before.ports)
    if ports:
        yield Step(Verb.SERVE, Ports(tuple(served for _, served in ports)))
    steered = tuple(block for block, _ in _differing(after.steered, before.steered))
    if steered:
        yield Step(Verb.STEER, Blocks(steered))
    added = tuple(planned for name, planned in after.mappings.items() if name not in before.mappings)
    if before.plan is not after.plan and not _has_fewer_networks(after.plan, before.plan):
        yield Step(Verb.REWRITE, Rewrite(before.plan, after.plan))
    elif added:
        yield Step(Verb.CHANGE, Change((), added))
    stale = tuple(planned for planned in added if planned.mapping.protocol == "udp")
    if stale:
        yield Step(Verb.FLUSH, Flows(stale))
    if after.forwarding - before.forwarding:
        yield Step(Verb.FORWARD, Forwarding(before.forwarding & after.forwarding, after.forwarding))
    redirects = _differing(after.redirects, before.redirects)
    if redirects:
        yield Step(Verb.REDIRECT, Redirects(redirects))


def _differing(here: Mapping[_Key, _Value], there: Mapping[_Key, _Value]) -> tuple[tuple[_Key, _Value], ...]:
    """Return the items of `here` that `there` lacks or has with another value."""
    return tuple((key, value) for key, value in here.items() if there.get(key) != value)


def _has_fewer_networks(after: Plan | None, before: Plan | None) -> bool:
    """True if rules must be removed before what they lead to is."""
    if after is None or before is None:
        return after is None
    return len(after.networks) < len(before.networks)
