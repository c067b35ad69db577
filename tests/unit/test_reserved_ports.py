"""Published ports in the kernel's list of reserved ports, beside other programs' entries."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.errors import HostRefused
from gangway.host import sysctl
from gangway.host.reserved_ports import MIN_FREE_PORTS, RANGE, RESERVED, Range, ReservedPorts, parse
from gangway.host.saved_settings import SavedSettings
from gangway.state.database import Database

LOWEST, HIGHEST = 32768, 60999
PORTS = st.integers(1, 65535) | st.integers(LOWEST - 3, LOWEST + 3) | st.integers(HIGHEST - 3, HIGHEST + 3)
Change = Callable[[ReservedPorts, Iterable[Range]], None]
RANGES = st.lists(st.tuples(PORTS, PORTS).map(lambda pair: (min(pair), max(pair))), max_size=5)


class Kernel:
    """The two settings; the list is a set of ports, and printed as ranges."""

    def __init__(self, listed: str = "") -> None:
        self.selected_from = f"{LOWEST}\t{HIGHEST}"
        self.listed = ports_of(parse(listed))
        self.written: list[str] = []
        self.has_list = True
        self.is_writable = True

    def read(self, name: str) -> str | None:
        if name == RANGE:
            return self.selected_from
        assert name == RESERVED
        return ",".join(_ranges(self.listed)) if self.has_list else None

    def write(self, name: str, value: str) -> None:
        self._change(name, value)
        self.listed = ports_of(parse(value))

    def extend(self, name: str, value: str) -> None:
        self._change(name, f"+{value}")
        self.listed = self.listed | ports_of(parse(value))

    def _change(self, name: str, text: str) -> None:
        assert name == RESERVED
        if not (self.is_writable and self.has_list):
            raise HostRefused("it cannot be set: run as root")
        self.written.append(text)


def ports_of(ranges: Iterable[Range]) -> frozenset[int]:
    return frozenset(port for first, last in ranges for port in range(first, last + 1))


def _ranges(ports: frozenset[int]) -> Iterator[str]:
    firsts = sorted(port for port in ports if port - 1 not in ports)
    lasts = sorted(port for port in ports if port + 1 not in ports)
    for first, last in zip(firsts, lasts, strict=True):
        yield str(first) if first == last else f"{first}-{last}"


class Host:
    """A host with a daemon, and the warnings that it logged."""

    def __init__(self, folder: Path, kernel: Kernel, patch: pytest.MonkeyPatch) -> None:
        self.kernel = kernel
        self.warned: list[str] = []
        for name in ("read", "write", "extend"):
            patch.setattr(sysctl, name, getattr(kernel, name))
        self._database = Database(folder / "state")
        self.saved = SavedSettings(self._database, self.warned.append)
        self.reserved = ReservedPorts(self.saved, self.warned.append)

    def successor(self) -> ReservedPorts:
        """Return those of another daemon with the same storage."""
        return ReservedPorts(SavedSettings(self._database, self.warned.append), self.warned.append)

    def close(self) -> None:
        self._database.close()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host(tmp_path, Kernel(), monkeypatch)
    yield made
    made.close()


def listed(host: Host) -> str | None:
    return host.kernel.read(RESERVED)


@pytest.mark.parametrize(
    ("published", "text"),
    [
        ((40000, 40000), "40000"),
        ((40000, 40010), "40000-40010"),
        ((8000, 40000), f"{LOWEST}-40000"),
        ((60000, 65535), f"60000-{HIGHEST}"),
        ((1, LOWEST), str(LOWEST)),
        ((HIGHEST, 65535), str(HIGHEST)),
    ],
)
def test_a_range_is_clipped_to_what_the_kernel_selects_from(host: Host, published: Range, text: str) -> None:
    host.reserved.add([published])
    assert (listed(host), len(host.kernel.written)) == (text, 1)
    host.reserved.set([published])
    assert (listed(host), host.warned) == (text, [])


@pytest.mark.parametrize("published", [(1, LOWEST - 1), (8000, 8000), (HIGHEST + 1, 65535)])
def test_ports_outside_the_range_are_not_listed(host: Host, published: Range) -> None:
    host.reserved.add([published])
    host.reserved.set([published])
    assert (host.kernel.written, host.saved.is_changed(RESERVED)) == ([], False)


def test_add_extends_the_list(host: Host) -> None:
    host.reserved.add([(40000, 40010)])
    host.reserved.add([(50000, 50000), (45000, 45001)])
    assert host.kernel.written == ["+40000-40010", "+45000-45001,50000-50000"]
    assert listed(host) == "40000-40010,45000-45001,50000"


def test_ports_are_not_listed_twice(host: Host) -> None:
    """The same ports of another protocol or address, or a part of another range."""
    host.reserved.set([(40000, 40010), (40000, 40010), (40003, 40004)])
    host.reserved.add([(40000, 40010), (40010, 40010)])
    assert host.kernel.written == ["40000-40010"]
    host.reserved.add([(40010, 40011)])
    assert listed(host) == "40000-40011"


def test_other_programs_entries_stay(host: Host) -> None:
    host.kernel.listed = ports_of(parse("33000,50000-50010"))
    host.reserved.set([(40000, 40010), (50005, 50020)])
    assert listed(host) == "33000,40000-40010,50000-50020"
    host.reserved.add([(33000, 33001)])
    host.reserved.set([(40000, 40000)])
    assert listed(host) == "33000,40000,50000-50010"
    host.reserved.set([])
    assert listed(host) == "33000,50000-50010"
    assert not host.saved.is_changed(RESERVED)


@pytest.mark.parametrize("before", ["", "50000-50010"])
def test_the_list_is_restored_when_nothing_is_published(host: Host, before: str) -> None:
    host.kernel.listed = ports_of(parse(before))
    host.reserved.add([(40000, 40010)])
    host.reserved.set([])
    assert (listed(host), host.saved.is_changed(RESERVED)) == (before, False)
    host.reserved.set([])
    host.reserved.add([(40000, 40000)])
    assert listed(host) == ",".join(filter(None, ["40000", before]))


def test_a_successor_tells_other_programs_entries_from_ours(host: Host) -> None:
    host.kernel.listed = ports_of(parse("50000-50010"))
    host.reserved.add([(40000, 40010)])
    successor = host.successor()
    successor.set([(40000, 40010)])
    assert listed(host) == "40000-40010,50000-50010"
    successor.set([(45000, 45000)])
    assert listed(host) == "45000,50000-50010"
    successor.set([])
    assert listed(host) == "50000-50010"


def test_an_entry_added_by_another_program_is_noticed_and_stays(host: Host) -> None:
    host.reserved.set([(40000, 40010)])
    assert host.reserved.is_intact()
    host.kernel.listed = host.kernel.listed | ports_of(parse("50000-50010"))
    assert not host.reserved.is_intact()
    host.reserved.set([(40000, 40010)])
    assert (listed(host), host.reserved.is_intact()) == ("40000-40010,50000-50010", True)
    host.reserved.set([])
    assert (listed(host), host.reserved.is_intact()) == ("50000-50010", True)


@pytest.mark.parametrize("before", ["", "50000-50010"])
def test_a_list_rewritten_by_another_program_is_noticed_and_completed(host: Host, before: str) -> None:
    """As `sysctl --system` does."""
    host.kernel.listed = ports_of(parse(before))
    host.reserved.add([(40000, 40010)])
    host.kernel.listed = ports_of(parse("33000"))
    assert not host.reserved.is_intact()
    host.reserved.set([(40000, 40010)])
    assert (listed(host), host.reserved.is_intact()) == ("33000,40000-40010", True)
    host.kernel.selected_from = f"{LOWEST} 65535"
    assert not host.reserved.is_intact()
    host.reserved.set([])
    assert listed(host) == "33000"


@pytest.mark.parametrize("change", [ReservedPorts.add, ReservedPorts.set])
def test_enough_ports_are_left_for_the_kernel(host: Host, change: Change) -> None:
    change(host.reserved, [(1, HIGHEST - MIN_FREE_PORTS)])
    assert (listed(host), host.warned) == (f"{LOWEST}-{HIGHEST - MIN_FREE_PORTS}", [])
    assert len(ports_of([(LOWEST, HIGHEST)]) - host.kernel.listed) == MIN_FREE_PORTS


@pytest.mark.parametrize("change", [ReservedPorts.add, ReservedPorts.set])
def test_a_range_that_would_leave_too_few_is_skipped(host: Host, change: Change) -> None:
    change(host.reserved, [(LOWEST, HIGHEST - MIN_FREE_PORTS + 1), (60000, 60010), (40000, 40000)])
    assert listed(host) == "40000,60000-60010"
    (warning,) = host.warned
    assert warning.startswith(f"ports {LOWEST}-{HIGHEST - MIN_FREE_PORTS + 1} not reserved:")


def test_other_programs_entries_are_not_free_ports(host: Host) -> None:
    host.kernel.listed = ports_of([(LOWEST, HIGHEST - MIN_FREE_PORTS)])
    host.reserved.set([(60000, 60000)])
    assert len(host.warned) == 1
    assert host.kernel.written == []


def test_a_refused_change_is_logged(host: Host) -> None:
    host.kernel.is_writable = False
    host.reserved.add([(40000, 40000)])
    host.reserved.set([(40000, 40000)])
    (warning,) = host.warned
    assert warning.startswith(
        f"published ports cannot be listed in {RESERVED} (run as root): the kernel may select one"
    )
    assert host.reserved.refused == warning
    host.kernel.is_writable = True
    host.reserved.set([(40000, 40000)])
    assert listed(host) == "40000"


def test_what_is_listed_already_is_not_written(host: Host) -> None:
    host.kernel.listed = ports_of(parse("39000-41000"))
    host.kernel.is_writable = False
    for reserved in (host.successor(), host.successor()):
        reserved.add([(40000, 40010)])
        reserved.set([(40000, 40010)])
        reserved.set([])
    assert host.warned == []


@pytest.mark.parametrize("selected_from", ["1024 65535", "60000 60999", "40000 44095"])
def test_other_port_ranges(host: Host, selected_from: str) -> None:
    host.kernel.selected_from = selected_from
    lowest, highest = map(int, selected_from.split())
    host.reserved.set([(40000, 40010)])
    few = highest - lowest + 1 - MIN_FREE_PORTS < 11
    inside = lowest <= 40000
    assert listed(host) == ("40000-40010" if inside and not few else "")
    assert len(host.warned) == (inside and few)


@given(RANGES, RANGES, RANGES)
@example([(1, 65535)], [(40000, 40000)], [])
@example([], [(1, 40000), (41000, 65535)], [(40500, 50000)])
def test_published_ports_are_listed_as_far_as_possible(
    foreign: list[Range], first: list[Range], more: list[Range]
) -> None:
    selected_from = ports_of([(LOWEST, HIGHEST)])
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        host = Host(Path(folder), Kernel(",".join(f"{low}-{high}" for low, high in foreign)), patch)
        before = host.kernel.listed
        host.reserved.set(first)
        host.reserved.add(more)
        ours = ports_of([*first, *more]) & selected_from
        assert before <= host.kernel.listed <= before | ours
        if not host.warned:
            assert host.kernel.listed == before | ours
        if host.kernel.listed != before:
            assert len(selected_from - host.kernel.listed) >= MIN_FREE_PORTS
        for published in [*first, *more]:
            said = any(text.startswith(f"ports {published[0]}-{published[1]} not reserved:") for text in host.warned)
            assert said or ports_of([published]) & selected_from <= host.kernel.listed
        host.reserved.set([])
        assert host.kernel.listed == before
        host.close()


@pytest.mark.parametrize(
    ("text", "ranges"),
    [("", []), ("1", [(1, 1)]), ("1,2,10-19", [(1, 1), (2, 2), (10, 19)]), ("1-65535", [(1, 65535)])],
)
def test_parse(text: str, ranges: list[Range]) -> None:
    assert list(parse(text)) == ranges


def test_a_successor_releases_ports_that_are_not_published_any_more(host: Host) -> None:
    host.kernel.listed = ports_of(parse("50000"))
    host.reserved.add([(40000, 40010)])
    host.successor().set([])
    assert (listed(host), host.warned) == ("50000", [])


def test_restoring_the_list_releases_our_ports(host: Host) -> None:
    host.kernel.listed = ports_of(parse("50000"))
    host.reserved.add([(40000, 40010)])
    host.kernel.listed = host.kernel.listed | ports_of(parse("33000"))
    host.saved.restore(RESERVED)
    assert (listed(host), host.saved.is_changed(RESERVED)) == ("33000,50000", False)
