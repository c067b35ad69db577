"""Published ports that the kernel must not choose: what is listed where the kernel keeps its list, and what stays."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.errors import HostRefused
from gangway.host import sysctl
from gangway.host.reserved_ports import LEAST, RANGE, RESERVED, Range, ReservedPorts, parse
from gangway.host.saved_settings import SavedSettings
from gangway.state.database import Database

LOWEST, HIGHEST = 32768, 60999
PORTS = st.integers(1, 65535) | st.integers(LOWEST - 3, LOWEST + 3) | st.integers(HIGHEST - 3, HIGHEST + 3)
Change = Callable[[ReservedPorts, Iterable[Range]], None]
RANGES = st.lists(st.tuples(PORTS, PORTS).map(lambda pair: (min(pair), max(pair))), max_size=5)


class Kernel:
    """The two settings, as the kernel has them: a list that is a set of ports, and written as ranges."""

    def __init__(self, listed: str = "") -> None:
        self.chosen_from = f"{LOWEST}\t{HIGHEST}"
        self.listed = ports_of(parse(listed))
        self.written: list[str] = []
        self.has_list = True
        self.is_ours = True
        """Whether we may change it."""

    def read(self, name: str) -> str | None:
        if name == RANGE:
            return self.chosen_from
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
        if not (self.is_ours and self.has_list):
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
    """A host with a daemon, and what it was warned of."""

    def __init__(self, folder: Path, kernel: Kernel, patch: pytest.MonkeyPatch) -> None:
        self.kernel = kernel
        self.warned: list[str] = []
        for name in ("read", "write", "extend"):
            patch.setattr(sysctl, name, getattr(kernel, name))
        self._database = Database(folder / "state")
        self.borrowed = SavedSettings(self._database)
        self.ephemeral = ReservedPorts(self.borrowed, self.warned.append)

    def successor(self) -> ReservedPorts:
        """Another daemon's, with the same state."""
        return ReservedPorts(SavedSettings(self._database), self.warned.append)

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
def test_a_range_is_cut_to_what_the_kernel_chooses_from(host: Host, published: Range, text: str) -> None:
    host.ephemeral.add([published])
    assert (listed(host), len(host.kernel.written)) == (text, 1)
    host.ephemeral.set([published])
    assert (listed(host), host.warned) == (text, [])


@pytest.mark.parametrize("published", [(1, LOWEST - 1), (8000, 8000), (HIGHEST + 1, 65535)])
def test_what_the_kernel_does_not_choose_is_not_listed(host: Host, published: Range) -> None:
    host.ephemeral.add([published])
    host.ephemeral.set([published])
    assert (host.kernel.written, host.borrowed.has(RESERVED)) == ([], False)


def test_one_more_is_added_to_what_is_listed(host: Host) -> None:
    host.ephemeral.add([(40000, 40010)])
    host.ephemeral.add([(50000, 50000), (45000, 45001)])
    assert host.kernel.written == ["+40000-40010", "+45000-45001,50000-50000"]
    assert listed(host) == "40000-40010,45000-45001,50000"


def test_what_is_listed_is_not_listed_twice(host: Host) -> None:
    """Of both protocols, of another address, or a part of another's."""
    host.ephemeral.set([(40000, 40010), (40000, 40010), (40003, 40004)])
    host.ephemeral.add([(40000, 40010), (40010, 40010)])
    assert host.kernel.written == ["40000-40010"]
    host.ephemeral.add([(40010, 40011)])
    assert listed(host) == "40000-40011"


def test_what_others_have_listed_stays(host: Host) -> None:
    host.kernel.listed = ports_of(parse("33000,50000-50010"))
    host.ephemeral.set([(40000, 40010), (50005, 50020)])
    assert listed(host) == "33000,40000-40010,50000-50020"
    host.ephemeral.add([(33000, 33001)])
    host.ephemeral.set([(40000, 40000)])
    assert listed(host) == "33000,40000,50000-50010"
    host.ephemeral.set([])
    assert listed(host) == "33000,50000-50010"
    assert not host.borrowed.has(RESERVED)


@pytest.mark.parametrize("before", ["", "50000-50010"])
def test_when_nothing_is_published_all_is_as_it_was(host: Host, before: str) -> None:
    host.kernel.listed = ports_of(parse(before))
    host.ephemeral.add([(40000, 40010)])
    host.ephemeral.set([])
    assert (listed(host), host.borrowed.has(RESERVED)) == (before, False)
    host.ephemeral.set([])
    host.ephemeral.add([(40000, 40000)])
    assert listed(host) == ",".join(filter(None, ["40000", before]))


def test_a_successor_knows_what_others_have_listed_from_what_we_have(host: Host) -> None:
    host.kernel.listed = ports_of(parse("50000-50010"))
    host.ephemeral.add([(40000, 40010)])
    successor = host.successor()
    successor.set([(40000, 40010)])
    assert listed(host) == "40000-40010,50000-50010"
    successor.set([(45000, 45000)])
    assert listed(host) == "45000,50000-50010"
    successor.set([])
    assert listed(host) == "50000-50010"


def test_what_somebody_lists_meanwhile_stays_and_is_noticed(host: Host) -> None:
    host.ephemeral.set([(40000, 40010)])
    assert host.ephemeral.is_intact()
    host.kernel.listed = host.kernel.listed | ports_of(parse("50000-50010"))
    assert not host.ephemeral.is_intact()
    host.ephemeral.set([(40000, 40010)])
    assert (listed(host), host.ephemeral.is_intact()) == ("40000-40010,50000-50010", True)
    host.ephemeral.set([])
    assert (listed(host), host.ephemeral.is_intact()) == ("50000-50010", True)


@pytest.mark.parametrize("before", ["", "50000-50010"])
def test_a_list_that_somebody_writes_anew_is_noticed(host: Host, before: str) -> None:
    """As `sysctl --system` does."""
    host.kernel.listed = ports_of(parse(before))
    host.ephemeral.add([(40000, 40010)])
    host.kernel.listed = ports_of(parse("33000"))
    assert not host.ephemeral.is_intact()
    host.ephemeral.set([(40000, 40010)])
    assert (listed(host), host.ephemeral.is_intact()) == ("33000,40000-40010", True)
    host.kernel.chosen_from = f"{LOWEST} 65535"
    assert not host.ephemeral.is_intact()
    host.ephemeral.set([])
    assert listed(host) == "33000"


@pytest.mark.parametrize("change", [ReservedPorts.add, ReservedPorts.set])
def test_enough_is_left_for_the_kernel_to_choose_from(host: Host, change: Change) -> None:
    change(host.ephemeral, [(1, HIGHEST - LEAST)])
    assert (listed(host), host.warned) == (f"{LOWEST}-{HIGHEST - LEAST}", [])
    assert len(ports_of([(LOWEST, HIGHEST)]) - host.kernel.listed) == LEAST


@pytest.mark.parametrize("change", [ReservedPorts.add, ReservedPorts.set])
def test_a_range_that_would_leave_too_few_is_not_listed_and_the_others_are(host: Host, change: Change) -> None:
    change(host.ephemeral, [(LOWEST, HIGHEST - LEAST + 1), (60000, 60010), (40000, 40000)])
    assert listed(host) == "40000,60000-60010"
    (warning,) = host.warned
    assert warning.startswith(f"{LOWEST}-{HIGHEST - LEAST + 1}: nearly all ports")


def test_what_others_have_listed_is_not_left_to_choose_from(host: Host) -> None:
    host.kernel.listed = ports_of([(LOWEST, HIGHEST - LEAST)])
    host.ephemeral.set([(60000, 60000)])
    assert len(host.warned) == 1
    assert host.kernel.written == []


def test_where_it_may_not_be_changed_that_is_said(host: Host) -> None:
    host.kernel.is_ours = False
    host.ephemeral.add([(40000, 40000)])
    host.ephemeral.set([(40000, 40000)])
    assert host.warned == ["it cannot be set: run as root"] * 2
    host.kernel.is_ours = True
    host.ephemeral.set([(40000, 40000)])
    assert listed(host) == "40000"


@pytest.mark.parametrize("chosen_from", ["1024 65535", "60000 60999", "40000 44095"])
def test_another_range_to_choose_from(host: Host, chosen_from: str) -> None:
    host.kernel.chosen_from = chosen_from
    lowest, highest = map(int, chosen_from.split())
    host.ephemeral.set([(40000, 40010)])
    few = highest - lowest + 1 - LEAST < 11
    inside = lowest <= 40000
    assert listed(host) == ("40000-40010" if inside and not few else "")
    assert len(host.warned) == (inside and few)


@given(RANGES, RANGES, RANGES)
@example([(1, 65535)], [(40000, 40000)], [])
@example([], [(1, 40000), (41000, 65535)], [(40500, 50000)])
def test_whatever_is_published_is_listed_as_far_as_it_may_be(
    foreign: list[Range], first: list[Range], more: list[Range]
) -> None:
    chosen_from = ports_of([(LOWEST, HIGHEST)])
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        host = Host(Path(folder), Kernel(",".join(f"{low}-{high}" for low, high in foreign)), patch)
        before = host.kernel.listed
        host.ephemeral.set(first)
        host.ephemeral.add(more)
        ours = ports_of([*first, *more]) & chosen_from
        assert before <= host.kernel.listed <= before | ours
        if not host.warned:
            assert host.kernel.listed == before | ours
        if host.kernel.listed != before:
            assert len(chosen_from - host.kernel.listed) >= LEAST
        for published in [*first, *more]:
            said = any(text.startswith(f"{published[0]}-{published[1]}:") for text in host.warned)
            assert said or ports_of([published]) & chosen_from <= host.kernel.listed
        host.ephemeral.set([])
        assert host.kernel.listed == before
        host.close()


@pytest.mark.parametrize(
    ("text", "ranges"),
    [("", []), ("1", [(1, 1)]), ("1,2,10-19", [(1, 1), (2, 2), (10, 19)]), ("1-65535", [(1, 65535)])],
)
def test_a_list_is_read_as_the_kernel_writes_it(text: str, ranges: list[Range]) -> None:
    assert list(parse(text)) == ranges
