"""Keeps the kernel from choosing published ports by itself.

What this file knows: two settings, and lists of ports as the kernel writes them.  What it must not know: mappings, who
would have got a port.

How it works.  Whoever leaves the choice to the kernel (bind() to port 0, connect(), sendto()) gets a port within
net.ipv4.ip_local_port_range that no socket has, and that is not in net.ipv4.ip_local_reserved_ports (ip-sysctl.rst;
both are IPv6's, too).  A published port that is steered has no socket; so it is listed there.  If fewer than `LEAST`
would be left to choose from, a range is not listed: a host that cannot connect to anything is worse off than one
whose programs now and then get a published port, for as long as they need it (steering/steer.bpf.c, `lent`).

What is written at a position other than 0 is added to what is listed (kernel/sysctl.c, proc_do_large_bitmap), so one
more costs the same however many there are; to take some away the whole list is written.
"""

from collections.abc import Callable, Iterable, Iterator

from gangway.errors import HostRefused
from gangway.host import sysctl
from gangway.host.saved_settings import SavedSettings

RESERVED = "net.ipv4.ip_local_reserved_ports"
RANGE = "net.ipv4.ip_local_port_range"
LEAST = 4096
_PORTS = 1 << 16

Range = tuple[int, int]
"""A first port and a last one."""


class ReservedPorts:
    """What of it we have listed; `warn` says what cannot be."""

    def __init__(self, borrowed: SavedSettings, warn: Callable[[str], None]) -> None:
        self._saved = borrowed
        self._warn = warn
        self._listed = bytearray(_PORTS)
        """A byte for each port: 1 if it is listed, by us or by somebody else."""
        self._published: set[Range] = set()
        self._told: set[Range] = set()
        """What was said not to be listed."""
        self._seen: tuple[str | None, ...] = ()
        """The two settings, as our last change has left them; empty if nothing is listed by us."""

    def add(self, ranges: Iterable[Range]) -> None:
        """Some more are published."""
        ranges = set(ranges)
        self._published |= ranges
        text = ",".join(self._listing(ranges))
        if text:
            self._attempt(lambda: self._saved.extend(RESERVED, text))
            self._seen = _settings()

    def set(self, ranges: Iterable[Range]) -> None:
        """These are published, and no others.

        What is listed and was never published somebody else has listed, before or meanwhile, and it stays so.
        """
        ranges, until_now = set(ranges), self._published
        self._published = ranges
        self._told &= ranges
        now, before = _bits(parse(sysctl.read(RESERVED) or "")), self._saved.before(RESERVED)
        foreign = now if before is None else _foreign(now, _bits(ranges | until_now), _bits(parse(before)))
        self._listed, theirs = bytearray(foreign), ",".join(_spelled(foreign))
        ours = ",".join(self._listing(ranges))
        if before is not None or ours:
            self._saved.remember(RESERVED, theirs)
            self._attempt(lambda: self._saved.set(RESERVED, ",".join(filter(None, (theirs, ours)))))
        if before is not None and not ours:
            self._saved.keep(RESERVED)
        self._seen = _settings() if ours else ()

    def is_intact(self) -> bool:
        """Nobody else has changed the two settings."""
        return not self._seen or self._seen == _settings()

    def _listing(self, ranges: Iterable[Range]) -> Iterator[str]:
        """How those are written that the kernel could choose, and that are not listed yet; they are from now on."""
        lowest, highest = map(int, (sysctl.read(RANGE) or "0 0").split())
        left = self._listed.count(0, lowest, highest + 1)
        for first, last in sorted(ranges):
            low, high = max(first, lowest), min(last, highest)
            more = self._listed.count(0, low, high + 1)
            if more and left - more < LEAST:
                self._tell(first, last)
            elif more:
                left -= more
                self._listed[low : high + 1] = b"\1" * (high + 1 - low)
                yield f"{low}-{high}"

    def _tell(self, first: int, last: int) -> None:
        if (first, last) not in self._told:
            self._told.add((first, last))
            self._warn(f"{first}-{last}: nearly all ports that the kernel chooses from are published; see the README")

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except HostRefused as error:
            self._warn(str(error))


def parse(text: str) -> Iterator[Range]:
    """A list as the kernel writes it: `1,2,10-19`."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first:
            yield int(first), int(last or first)


def _settings() -> tuple[str | None, ...]:
    return sysctl.read(RESERVED), sysctl.read(RANGE)


def _bits(ranges: Iterable[Range]) -> bytearray:
    bits = bytearray(_PORTS)
    for first, last in ranges:
        bits[first : last + 1] = b"\1" * (last + 1 - first)
    return bits


def _foreign(now: bytearray, published: bytearray, before: bytearray) -> bytearray:
    """What is listed and not by us: it is not published, or it was there before."""
    there, ours, was = (int.from_bytes(bits) for bits in (now, published, before))
    return bytearray((there & ~ours | there & was).to_bytes(_PORTS))


def _spelled(bits: bytearray) -> Iterator[str]:
    """As a list."""
    end = 0
    while (first := bits.find(1, end)) >= 0:
        end = bits.find(0, first)
        end = _PORTS if end < 0 else end
        yield f"{first}-{end - 1}"
