"""What has to be done: the difference between two States, as steps in an order.

A request compares the little that it changes; a daemon that starts, or that was notified of a change, compares what it
found in the kernel with all that is wanted.  The order:

    removing      redirects → forwarding → rules → steering → relay's ports → flows → attachments → rules for further
                  neighbours → bridges
    adding        bridges → rules for further neighbours → first attachments → properties of links → relay's ports →
                  steering → rules → flows → further attachments → forwarding → redirects

Nothing is translated before its target exists, and the relay has a port before a rule leads past it: so at no moment is
a connection refused that would have been served a moment later.  Clients on a container's further network are
masqueraded, and their former flows deleted, before it has a link there that its answers would take: so a daemon that is
killed in between leaves no link that the next one would take for complete.  Forwarding is on only while the rules that
restrict it are applied.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

from gangway.ebpf.keys import PortBlock, SteeringState, Target
from gangway.neighbours import Neighbours
from gangway.plan import MappingPlan, NetworkPlan, Plan
from gangway.reconcile.properties import Property
from gangway.reconcile.state import Attachment, State, redirects_of, steered_of
from gangway.relay.protocol import Serve

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Change(Generic[_Value]):
    """One kind of thing that is replaced: `before` is removed, `after` is added.  Most steps do one of the two."""

    before: _Value
    after: _Value
    name: str = ""
    """The name of the link, in a step about a link: a link that was found has no value, and is deleted by its name."""

    def inverse(self) -> Self | None:
        """Return the step that undoes this one; None if nothing can undo it, or nothing has to."""
        return None if self.before == self.after else replace(self, before=self.after, after=self.before)


Step = Change[Any]
"""One change of the host."""


class Bridge(Change[NetworkPlan | None]):
    """The bridge of a network."""


class Veth(Change[Attachment | None]):
    """The veth of a container."""


class Isolation(Change[bool]):
    """Whether a veth's host end is an isolated bridge port."""


class Properties(Change[tuple[Property, ...]]):
    """Properties of links that are restored: they belong to the link, so nothing ever has to remove them."""

    def inverse(self) -> Self | None:
        return None


class Ports(Change[tuple[Serve, ...]]):
    """Ports that the relay serves."""


class Steered(Change[tuple[tuple[PortBlock, SteeringState], ...]]):
    """Entries of steering."""


class Redirects(Change[tuple[tuple[PortBlock, Target], ...]]):
    """Entries of the redirect."""


class Rewrite(Change[Plan | None]):
    """All rules, from one plan to another; None: no rules."""


class Rules(Change[tuple[MappingPlan, ...]]):
    """The rules of mappings."""


class Further(Change[frozenset[Neighbours]]):
    """The rules for clients on further networks of containers."""


class Flows(Change[tuple[MappingPlan, ...]]):
    """Tracked connections of mappings that are removed, and former ones of those that are added: they can be deleted,
    but not restored."""

    def inverse(self) -> Self | None:
        return None


class Forwarding(Change[frozenset[int]]):
    """Families that are forwarded."""


def diff(before: State, after: State) -> Iterator[Step]:
    """Yield the steps from one state to the other, in order."""
    yield from _remove(before, after)
    yield from _remove_links(before, after)
    yield from _add_links(before, after)
    yield from _add(before, after)


def parts(step: Step, unavailable: Sequence[MappingPlan]) -> Iterator[Step]:
    """Split a step so that an unavailable port does not prevent the others.  Its clients, which are another program's,
    are led neither to the relay nor to the container."""
    left_out = {block for one in unavailable for block, _ in steered_of(one)}
    left_out |= {block for one in unavailable for block, _ in redirects_of(one)}
    match step:
        case Ports(removed, added):
            yield from (Ports((one,), ()) for one in removed)
            yield from (Ports((), (one,)) for one in added)
        case Properties(_, missing):
            yield from (Properties((), (one,)) for one in missing)
        case Steered((), entries):
            yield Steered((), tuple(entry for entry in entries if entry[0] not in left_out))
        case Redirects((), entries):
            yield Redirects((), tuple(entry for entry in entries if entry[0] not in left_out))
        case _:
            yield step


def _remove(before: State, after: State) -> Iterator[Step]:
    if redirects := _differing(before.redirects, after.redirects):
        yield Redirects(redirects, ())
    if before.forwarding - after.forwarding:
        yield Forwarding(before.forwarding, before.forwarding & after.forwarding)
    removed = tuple(planned for name, planned in before.mappings.items() if name not in after.mappings)
    if before.plan is not after.plan and _has_fewer_networks(after.plan, before.plan):
        yield Rewrite(before.plan, after.plan)
    elif removed:
        yield Rules(removed, ())
    if steered := tuple(entry for entry in before.steered.items() if _is_removed(entry, after)):
        yield Steered(steered, ())
    if ports := _differing(before.ports, after.ports):
        yield Ports(tuple(served for _, served in ports), ())
    if removed:
        yield Flows(removed, ())


def _remove_links(before: State, after: State) -> Iterator[Step]:
    for name, attachment in before.attachments.items():
        if name not in after.attachments:
            yield Veth(attachment, None, name)
    if neighbours := before.neighbours - after.neighbours:
        yield Further(neighbours, frozenset())
    for name, network in before.bridges.items():
        if name not in after.bridges:
            yield Bridge(network, None, name)


def _add_links(before: State, after: State) -> Iterator[Step]:
    for name, network in after.bridges.items():
        if name not in before.bridges:
            yield Bridge(None, network, name)
    if neighbours := after.neighbours - before.neighbours:
        yield Further(frozenset(), neighbours)
    yield from _new_links(before, after, is_first=True)
    # A link that was just created has all of them.  A new bridge has no ports: those of the former one join it here.
    there = {*before.bridges, *before.attachments}
    lost = sorted(after.properties - before.properties, key=lambda one: (one.kind, one))
    if lost := [one for one in lost if one.link in there]:
        yield Properties((), tuple(lost))
    for name, attachment in after.attachments.items():
        if name in before.attachments and attachment is not None and attachment.isolated != (name in before.isolated):
            yield Isolation(not attachment.isolated, attachment.isolated, name)


def _add(before: State, after: State) -> Iterator[Step]:
    if ports := _differing(after.ports, before.ports):
        yield Ports((), tuple(served for _, served in ports))
    if steered := _differing(after.steered, before.steered):
        yield Steered((), steered)
    added = tuple(planned for name, planned in after.mappings.items() if name not in before.mappings)
    if before.plan is not after.plan and not _has_fewer_networks(after.plan, before.plan):
        yield Rewrite(before.plan, after.plan)
    elif added:
        yield Rules((), added)
    if stale := tuple(one for one in added if one.mapping.protocol == "udp" and not one.mapping.is_routed):
        yield Flows((), stale)
    yield from _new_links(before, after, is_first=False)
    if after.forwarding - before.forwarding:
        yield Forwarding(before.forwarding & after.forwarding, after.forwarding)
    if redirects := _differing(after.redirects, before.redirects):
        yield Redirects((), redirects)


def _new_links(before: State, after: State, is_first: bool) -> Iterator[Step]:
    for name, attachment in after.attachments.items():
        if name not in before.attachments and attachment is not None and attachment.endpoint.is_first is is_first:
            yield Veth(None, attachment, name)


def _is_removed(entry: tuple[PortBlock, SteeringState], after: State) -> bool:
    """True if an entry of steering is removed; a reserved one that will be served is changed in place."""
    block, state = entry
    wanted = after.steered.get(block)
    return wanted is None or (wanted is not state and state is not SteeringState.RESERVED)


def _differing(here: Mapping[_Key, _Value], there: Mapping[_Key, _Value]) -> tuple[tuple[_Key, _Value], ...]:
    """Return the items of `here` that `there` lacks or has with another value."""
    return tuple((key, value) for key, value in here.items() if there.get(key) != value)


def _has_fewer_networks(after: Plan | None, before: Plan | None) -> bool:
    """True if rules must be removed before what they lead to is."""
    if after is None or before is None:
        return after is None
    return len(after.networks) < len(before.networks)
