"""Excludes published ports from the kernel's automatic port selection.

A program that leaves the choice to the kernel (bind() to port 0, connect(), sendto()) gets a port within
net.ipv4.ip_local_port_range that has no socket and is not in net.ipv4.ip_local_reserved_ports (ip-sysctl.rst; both are
for IPv6, too).  A steered port has no socket; so it is listed there.  A range is not listed if fewer
than `MIN_FREE_PORTS` would be left: a host that cannot connect to anything is worse off than one where a program now
and then gets a published port for as long as it needs it (ebpf/steering.bpf.c handles that).

To add ports takes the same time however many are listed; to release some, the whole list is written.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from gangway.errors import HostRefused
from gangway.host import sysctl
from gangway.host.saved_settings import SavedSettings, Setting
from gangway.host.usage import LocalPorts

RESERVED = "net.ipv4.ip_local_reserved_ports"
RANGE = "net.ipv4.ip_local_port_range"
MIN_FREE_PORTS = 4096
_PORTS = 1 << 16
_CONSEQUENCE = "the kernel may select one for a program, and clients on the host then reach that program"

Range = tuple[int, int]
"""A first port and a last one."""


class ReservedPorts:
    """The ports that are listed for gangway; `warn` logs those that cannot be."""

    def __init__(self, saved: SavedSettings, warn: Callable[[str], None]) -> None:
        self._saved = saved
        self._warn = warn
        self._listed = _bits(sysctl.read(RESERVED) or "")
        """A byte for each port: 1 if it is listed, for gangway or by another program."""
        self.refused = ""
        """Why not all published ports are listed, and the consequence; empty if they are."""
        self._warned: set[Range] = set()
        self._range: str | None = None
        """The range that the kernel selects from, as of our last change; None if nothing is listed for gangway."""
        read, write = partial(sysctl.read, RESERVED), partial(sysctl.write, RESERVED)
        saved.register(Setting(RESERVED, read, write, _without_ours))

    def add(self, ranges: Iterable[Range]) -> None:
        """List more published ports."""
        text = ",".join(self._list(ranges))
        if text:
            self._attempt(partial(self._saved.extend, RESERVED, text))
            self._range = sysctl.read(RANGE)

    def set(self, ranges: Iterable[Range]) -> None:
        """List these published ports, and release all others that were listed for gangway."""
        ranges = set(ranges)
        self._warned &= ranges
        foreign = self._saved.original(RESERVED) or ""
        self._listed = _bits(foreign)
        ours = ",".join(self._list(ranges))
        wanted = ",".join(filter(None, (foreign, ours)))
        self._attempt(partial(self._saved.set, RESERVED, wanted) if ours else partial(self._saved.restore, RESERVED))
        self._range = sysctl.read(RANGE) if ours else None

    def is_intact(self) -> bool:
        """True if no other program has changed the list or the range since our last change."""
        return self._range is None or (self._range == sysctl.read(RANGE) and self._saved.is_intact(RESERVED))

    def local_ports(self) -> LocalPorts:
        """Return the range that the kernel selects local ports from, and how many of them are not listed."""
        lowest, highest = map(int, (sysctl.read(RANGE) or "0 -1").split())
        return LocalPorts(lowest, highest, self._listed.count(0, lowest, highest + 1))

    def _list(self, ranges: Iterable[Range]) -> Iterator[str]:
        """Mark ranges as listed, as far as the kernel selects from them; yield the text of those that were not yet."""
        lowest, highest, free = self.local_ports()
        for first, last in sorted(ranges):
            low, high = max(first, lowest), min(last, highest)
            added = self._listed.count(0, low, high + 1)
            if added and free - added >= MIN_FREE_PORTS:
                free -= added
                self._listed[low : high + 1] = b"\1" * (high + 1 - low)
                yield f"{low}-{high}"
            elif added and (first, last) not in self._warned:
                self._warned.add((first, last))
                self._warn(
                    f"ports {first}-{last} not reserved: fewer than {MIN_FREE_PORTS} of {RANGE} would be left for "
                    "the kernel to select from"
                )

    def _attempt(self, change: Callable[[], None]) -> None:
        """Change the list; log once that it cannot be."""
        refused = ""
        try:
            change()
        except HostRefused as error:  # its text has all the ports
            why = sysctl.unwritable(RESERVED) or str(error).rpartition(": ")[2]
            refused = f"published ports cannot be listed in {RESERVED} ({why}): {_CONSEQUENCE}"
            if refused != self.refused:
                self._warn(refused)
        self.refused = refused  # at once: `doctor` reads it in another thread


def parse(text: str) -> Iterator[Range]:
    """Yield the ranges of a list as the kernel spells it: `1,2,10-19`."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first:
            yield int(first), int(last or first)


def _without_ours(before: str, written: str, now: str) -> str:
    """Remove the ports that gangway has added; those that were listed before stay, and those added by others."""
    bits_before, bits_written, bits_now = (int.from_bytes(_bits(text)) for text in (before, written, now))
    left = (bits_now & ~(bits_written & ~bits_before)).to_bytes(_PORTS) + b"\0"
    ranges, end = [], 0
    while (first := left.find(1, end)) >= 0:
        end = left.find(0, first)
        ranges.append(f"{first}-{end - 1}")
    return ",".join(ranges)


def _bits(text: str) -> bytearray:
    bits = bytearray(_PORTS)
    for first, last in parse(text):
        bits[first : last + 1] = b"\1" * (last + 1 - first)
    return bits
