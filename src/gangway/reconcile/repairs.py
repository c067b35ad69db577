"""What the log says about repairs: what was wrong, on what, and what was done about it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from gangway.reconcile.diff import Bridge, Isolation, Ports, Properties, Redirects, Rewrite, Steered, Step, Veth
from gangway.reconcile.properties import Kind, Property
from gangway.reconcile.state import State

RULES_REWRITTEN = "rules were changed or deleted by another program: written again"
_MAX_NAMES = 5  # of so many things a line has the names, of more the number


def only(steps: Iterable[Step], was_applied: bool, has_lost_relay: bool) -> Iterator[Step]:
    """Yield the steps that repaired something: rules that were applied before, and not what a lost relay had."""
    left_out: tuple[type[Step], ...] = () if was_applied else (Rewrite,)
    left_out += (Ports, Steered, Redirects) if has_lost_relay else ()
    return (step for step in steps if not isinstance(step, left_out))


def describe(steps: Iterable[Step], wanted: State) -> Iterator[str]:
    """Yield a line for each kind of repair, in the order of the steps that were carried out towards `wanted`."""
    bridges, containers, properties, ports, entries = [], [], list[Property](), 0, 0
    for step in steps:
        match step:
            case Rewrite():
                yield RULES_REWRITTEN
            case Bridge(_, after) if after is not None:
                bridges.append(step.name)
            case Veth(_, after) if after is not None:
                containers.append(_container(step.name, wanted))
            case Properties(_, missing):
                properties += (one for one in missing if one.kind is not Kind.BRIDGE or one.value not in bridges)
            case Isolation():
                yield f"interface {step.name} of container {_container(step.name, wanted)}: isolation restored"
            case Ports((), added):
                ports += sum(one.ports.last - one.ports.first + 1 for one in added)
            case Steered((), added) | Redirects((), added):
                entries += len(added)
    yield from _counted("bridge", bridges, "missing: created again")
    yield from _counted("interface of container", containers, "missing: created again")
    yield from _properties(properties, wanted)
    if ports:
        yield f"{_number(ports, 'port')} not served by the relay: served again"
    if entries:
        yield f"{_number(entries, 'entry', 'entries')} of eBPF maps missing or changed: restored"


def relay_restarted(reason: str, ports: int) -> str:
    """Return the line about a relay that exited; `ports` are those that the next one serves."""
    exited = f"relay exited ({reason})" if reason else "relay exited"
    return f"{exited}: restarted, {_number(ports, 'port')} served again" if ports else f"{exited}: no port needs one"


def _properties(missing: Iterable[Property], wanted: State) -> Iterator[str]:
    """Yield a line for each end of a link."""
    by_place = defaultdict(list)
    for one in missing:
        by_place[one.link, one.namespace].append(one)
    places = list(by_place.items())
    for (link, namespace), lost in places[:_MAX_NAMES]:
        of = f"bridge {link}" if link in wanted.bridges else f"interface {link} of container {_container(link, wanted)}"
        where = f"{of}, in its namespace" if namespace else of
        yield f"{where}: {', '.join(map(str, lost))} missing: restored"
    if rest := places[_MAX_NAMES:]:
        count = sum(len(lost) for _, lost in rest)
        yield f"{len(rest)} more interfaces: {_number(count, 'address or route', 'addresses or routes')} restored"


def _counted(what: str, names: list[str], done: str) -> Iterator[str]:
    if names:
        plural = "s" * (len(names) > 1)
        said = ", ".join(names) if len(names) <= _MAX_NAMES else f"({len(names)})"
        first, _, rest = what.partition(" ")
        yield f"{first}{plural}{' ' * bool(rest)}{rest} {said} {done}"


def _container(link: str, wanted: State) -> str:
    attachment = wanted.attachments.get(link)
    return attachment.endpoint.container if attachment is not None else link


def _number(count: int, singular: str, plural: str = "") -> str:
    return f"1 {singular}" if count == 1 else f"{count} {plural or singular + 's'}"
