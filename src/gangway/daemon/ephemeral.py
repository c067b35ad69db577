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

from gangway.daemon.borrowed import Borrowed
from gangway.errors import HostRefused
from gangway.kernel import sysctl

RESERVED = "net.ipv4.ip_local_reserved_ports"
RANGE = "net.ipv4.ip_local_port_range"
LEAST = 4096

Range = tuple[int, int]
"""A first port and a last one."""


class Ephemeral:
    """What of it we have listed; `warn` says what cannot be."""

    def __init__(self, borrowed: Borrowed, warn: Callable[[str], None]) -> None:
        self._borrowed = borrowed
        self._warn = warn
        self._listed = bytearray(1 << 16)
        """A byte for each port, not zero if it is listed, by us or by somebody else."""
        self._told: set[Range] = set()
        """What was said not to be listed."""

    def add(self, ranges: Iterable[Range]) -> None:
        """Some more are published."""
        text = ",".join(self._listing(ranges))
        if text:
            self._attempt(lambda: self._borrowed.extend(RESERVED, text))

    def set(self, ranges: Iterable[Range]) -> None:
        """These are published, and no others."""
        ranges = set(ranges)
        self._told &= ranges
        before = self._borrowed.before(RESERVED)
        foreign = before if before is not None else sysctl.read(RESERVED) or ""
        self._listed = bytearray(1 << 16)
        for first, last in parse(foreign):
            self._listed[first : last + 1] = b"\1" * (last + 1 - first)
        ours = ",".join(self._listing(ranges))
        if ours:
            self._attempt(lambda: self._borrowed.set(RESERVED, f"{foreign},{ours}".strip(",")))
        elif before is not None:
            self._attempt(lambda: self._borrowed.put_back(RESERVED))

    def _listing(self, ranges: Iterable[Range]) -> Iterator[str]:
        """How those are written that the kernel could choose, and that are not listed yet; they are from now on."""
        lowest, highest = map(int, (sysctl.read(RANGE) or "0 0").split())
        for first, last in sorted(ranges):
            low, high = max(first, lowest), min(last, highest)
            if low > high or 0 not in self._listed[low : high + 1]:
                continue
            after = bytearray(self._listed)
            after[low : high + 1] = b"\1" * (high + 1 - low)
            if after.count(0, lowest, highest + 1) < LEAST:
                self._tell(first, last)
                continue
            self._listed = after
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
