"""How a relay is replaced by one of another version: who serves when, and who does if one of them dies.

What this file must not know: how a relay is started.

How it works.  The daemon starts the new relay with its control socket beside the old one's, asks the old one for all
that it serves and holds, and gives it to the new one.  Descriptors are duplicated on the way (SCM_RIGHTS): both relays
have the same listening sockets with their queues, and as long as both accept, no client is refused or waits.  Then the
control sockets change places, and the old relay retires: it accepts nobody any more, and ends with its connections.

    step                                      clients are accepted by    if the daemon dies here, the next one finds
    1  NAME.next is started, and copied to    the old one, later both    both: the old one goes on, the new one retires
    2  NAME becomes NAME.PID                  both                       no NAME: NAME.next takes its place
    3  NAME.next becomes NAME                 both                       the old one at NAME.PID: it retires
    4  NAME.PID retires                       the new one                the same; that it retires already is no harm

So it has to be known only which of the control sockets are listened on.  If a relay dies before step 2, `decide` says
which one serves: a new one without all ports is better than none, as the daemon compares them with what is wanted.

UDP.  A socket that both have is read by both until step 4: it comes last.  Clients are not copied: the new relay knows
them by their next datagram, and sends it from another port of the gateway, as if they had been silent for
`udp_timeout_s`.  What their containers still answer to the old port is passed on by the old relay.

A relay that has retired is still asked to remove ports, so that their connections end when they are unpublished.  If it
missed one, that shows when its ports are compared with those that are wanted.  Those that the new relay serves do not
tell: once it is killed, there are none at first, and the connections of the retired one are to go on.  The retired one
keeps its sockets bound, so the successor is given those.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path

from gangway import __version__
from gangway.errors import HostRefused
from gangway.relay import protocol
from gangway.relay.connection import Connection
from gangway.relay.protocol import (
    GetHeld,
    GetPort,
    GetShared,
    Hold,
    HostPorts,
    List,
    ListExcluded,
    ListHeld,
    Mode,
    Remove,
    Retire,
    Serve,
    Share,
)
from gangway.relay.sockets import unlink_socket

_PROTOCOLS = ("tcp", "sctp", "udp")  # in this order


class Leader(Enum):
    """Which relay serves clients from now on; the other one retires, if it lives."""

    OLD = auto()
    NEW = auto()
    NONE = auto()


def is_due(version: int, release: str) -> bool:
    """True if a relay of these versions, of the protocol and of gangway, is to be replaced."""
    return (version, release) != (protocol.VERSION, __version__)


def decide(is_complete: bool, is_old_alive: bool, is_new_alive: bool) -> Leader:
    """Return who serves.  `is_complete`: the new one has all that the old one had."""
    if is_new_alive and (is_complete or not is_old_alive):
        return Leader.NEW
    return Leader.OLD if is_old_alive else Leader.NONE


def next_path(path: Path) -> Path:
    """Return the control socket of a relay that is to replace the one at `path`."""
    return path.with_name(f"{path.name}.next")


def replace(path: Path, old: Connection, new: Connection, limit_s: int) -> tuple[Leader, str]:
    """Have `new` replace `old`, which listens at `path`.  Return who serves, and what failed.

    Connections of the other one may last `limit_s` seconds.
    """
    failure = ""
    try:
        _copy(old, new)
    except HostRefused as error:
        failure = str(error)
    leader = decide(not failure, old.is_open(), new.is_open())
    if leader is Leader.NEW:
        _move(path, _retired_path(path, old))
        _move(next_path(path), path)
        _retire(old, limit_s)
    else:
        _move(next_path(path), _retired_path(path, new))
        _retire(new, limit_s)
    return leader, failure or ("" if leader is Leader.NEW else "the new relay exited")


def settle(path: Path, limit_s: int) -> str:
    """End a replacement in which a daemon was killed.  Return what to log; empty: there was none."""
    new = _connect(next_path(path))
    if new is None:
        return ""
    old = _connect(path)
    try:
        leader = decide(old is None, old is not None, True)
        if leader is Leader.NEW:
            _move(next_path(path), path)
            return f"relay (pid {new.pid}) takes over: an earlier daemon exited before it had replaced the former one"
        _move(next_path(path), _retired_path(path, new))
        _retire(new, limit_s)
        return f"relay (pid {new.pid}) retires: an earlier daemon exited while it was to replace the running one"
    finally:
        for one in (old, new):
            if one is not None:
                one.close()


def retired(path: Path, limit_s: int) -> Iterator[Connection]:
    """Yield connections to the relays that were replaced."""
    for place in path.parent.glob(f"{path.name}.[0-9]*"):
        if (found := _connect(place)) is not None:
            _retire(found, limit_s)
            yield found


def unwanted(former: Iterable[Serve], wanted: Collection[HostPorts]) -> list[HostPorts]:
    """Return the ports of a retired relay that are to be removed.  `wanted` are those of networks: a lease's port is
    wanted for as long as its launcher runs."""
    return [one.ports for one in former if one.mode is not Mode.LEASED and one.ports not in wanted]


def prune(relay: Connection, wanted: Collection[HostPorts]) -> None:
    """Have a retired relay remove the ports that are not wanted any more."""
    with suppress(HostRefused):  # it has exited, or its ports are described in a way of later versions
        for ports in unwanted(relay.pages(List, protocol.parse_served), wanted):
            relay.ask(Remove(ports))


def _copy(old: Connection, new: Connection) -> None:
    """Give a relay all that another one has.  HostRefused: one of them failed."""
    new.exclude(old.ask(ListExcluded())[0].split())
    for name in old.ask(ListHeld())[0].split():
        with old.lent(GetHeld(name)) as fds:
            new.ask(Hold(name, len(fds)), fds)
    ports = old.pages(List, protocol.parse_served)
    for kind in _PROTOCOLS:
        for port in ports:
            if port.ports.protocol == kind:
                _copy_port(port, old, new)
        for family in (4, 6):
            with old.lent(GetShared(kind, family)) as fds:
                if fds:  # after the ports: clients may be waiting
                    new.ask(Share(kind, family), fds)


def _copy_port(port: Serve, old: Connection, new: Connection) -> None:
    if port.mode is Mode.SHARED:
        new.ask(port)
        return
    if port.mode is Mode.ENDED:  # which the new one finds out by the launcher's pidfd
        port = port._replace(mode=Mode.LEASED)
    with old.lent(GetPort(port.ports)) as fds:
        new.ask(port, fds)


def _retired_path(path: Path, relay: Connection) -> Path:
    return path.with_name(f"{path.name}.{relay.pid}")


def _move(path: Path, to: Path) -> None:
    with suppress(FileNotFoundError):
        path.rename(to)


def _retire(relay: Connection, limit_s: int) -> None:
    with suppress(HostRefused):  # it has exited
        relay.ask(Retire(limit_s))


def _connect(path: Path) -> Connection | None:
    """Connect to a relay; remove the control socket of one that has exited."""
    try:
        found = Connection(path)
    except ConnectionRefusedError:
        unlink_socket(path)
        return None
    except OSError:
        return None
    try:
        found.greet()
    except HostRefused:
        found.close()
        return None
    return found
