"""A daemon that can be killed, or fail, at any of its operations, and the daemons that are started after it.

A daemon's parts run in this process, in the host's namespace. Each operation that changes the host or the database
(below the steps: a netlink message, a transaction of rules, an entry of an eBPF map, a request to the relay, a setting,
a row) is counted. At the n-th of those that are under test the daemon is killed: from then on no operation is carried
out, and none is undone. The next daemon starts with a copy of the database from that moment. Or the n-th operation
fails, once, as the kernel, a tool or the disk might refuse it.
"""

import re
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pyroute2.iproute.linux import RTNL_API

from gangway.daemon.config import Config, Loaded
from gangway.daemon.home import Home
from gangway.daemon.parts import Parts
from gangway.ebpf.keys import PortBlock
from gangway.ebpf.loader import LoadedObject
from gangway.errors import HostRefused
from gangway.firewall.iptables.tool import Iptables
from gangway.firewall.nft.library import Nftables
from gangway.host import sysctl
from gangway.host.events import Notices
from gangway.log import Log
from gangway.relay.client import RelayClient
from gangway.state.database import Database
from gangway.state.requests import Requests
from lab.netns import Namespace
from lab.waiting import wait_until

Act = Callable[[Requests], object]
Found = dict[str, Counter[str]]
"""The number of times that each word occurs in each listing: hash tables have no order."""

# What differs from one run to the next: numbers and names that the kernel chooses, timers, link-local addresses.
_PASSING = re.compile(
    r"^\d+: |@if\d+|link/ether \S+|link-netns(id)? \S+|(bridge_id|designated_\S+|root_id|port_id|port_no) \S+"
    r"|^ *inet6 fe80.*\n.*\n|^fe80.*\n|\S+_timer +[\d.]+|state \w+|(UP|LOWER_UP|NO-CARRIER),?|\[\d+:\d+\]",
    re.MULTILINE,
)
_SETTINGS = "ipv4/ip_*", "ipv4/tcp_tw_reuse", "ipv[46]/conf/*/forwarding", "ipv[46]/conf/*/accept_r*"
# The operations of classes and modules. Those of the second table are the same with every firewall, so they are under
# test without one.
_Operations = dict[Any, tuple[str, ...]]
_WITH_A_FIREWALL: _Operations = {
    Database: tuple(name for name in dir(Database) if re.match("add_|remove_|remember|forget", name)),
    sysctl: ("write", "extend"),
    Nftables: ("apply",),
    Iptables: ("apply", "set_policy"),
}
_WITHOUT: _Operations = {
    RTNL_API: ("link", "addr", "route", "brport"),
    LoadedObject: ("update", "delete"),
    RelayClient: ("serve", "remove", "share", "hold", "stop"),
}
_EACH_PORT = LoadedObject, RelayClient
"""Their operations are repeated for each port: under test are the first two of a row, and what follows them."""


class Killed(BaseException):
    """Stands for SIGKILL: no handler may do anything after it."""


class Trap:
    """Calls `spring` at an operation, after `left` others. `stays`: it springs at each one after that, too."""

    def __init__(
        self, left: int, is_under_test: Callable[[Any], bool], spring: Callable[[], None], stays: bool
    ) -> None:
        self._left = left
        self._is_under_test = is_under_test
        self._spring = spring
        self._stays = stays
        self._last: tuple[Any, str] | None = None
        self._row = 0  # how many times the last operation was carried out without another one between
        self.was_reached = False

    @contextmanager
    def laid(self) -> Iterator[None]:
        """Intercept all operations in the block."""
        with ExitStack() as stack:
            for owner, names in (_WITH_A_FIREWALL | _WITHOUT).items():
                for name in names:
                    trapped = self._trapped(getattr(owner, name), owner, name)
                    stack.enter_context(patch.object(owner, name, trapped))
            yield

    def _trapped(self, call: Callable[..., Any], owner: Any, name: str) -> Callable[..., Any]:
        def instead(*given: Any, **named: Any) -> Any:
            if "dump" not in given:  # pyroute2 reads by the same functions
                self._count(owner, name)
            return call(*given, **named)

        return instead

    def _count(self, owner: Any, name: str) -> None:
        self._row = self._row + 1 if self._last == (owner, name) else 1
        self._last = owner, name
        if self.was_reached:
            if self._stays:
                self._spring()
        elif self._is_under_test(owner) and (self._row <= 2 or owner not in _EACH_PORT):
            self._left -= 1
            self.was_reached = self._left < 0
            if self.was_reached:
                self._spring()


def _copy(path: Path, to: Path) -> None:
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)


def _next(path: Path) -> Path:
    return path.with_name(f"{path.name}+")


def _is_published(line: str) -> bool:
    """True unless the line is a shared socket, which has an unreachable address and a port that the kernel chose."""
    return "192.0.0.8:" not in line and "[100::1]:" not in line


def _spell(entries: Mapping[PortBlock, object]) -> str:
    return " ".join(f"{'/'.join(map(str, block))}={value!r}".replace(" ", "") for block, value in entries.items())


def _output(*words: str) -> str:
    """Return what a program prints in the current namespace."""
    return subprocess.run(words, text=True, capture_output=True, check=True).stdout


def _settings() -> Iterator[str]:
    """Yield the settings of the current namespace, of which some cannot be read."""
    for path in sorted(path for pattern in _SETTINGS for path in Path("/proc/sys/net").glob(pattern)):
        with suppress(OSError):
            yield f"{path}:{path.read_text()}"


class Ground:
    """A host with two containers, and the daemons that run there one after the other."""

    def __init__(self, host: Namespace, boxes: list[Namespace], directory: Path, firewall: str) -> None:
        self.host = host
        self.boxes = boxes
        self._firewall = firewall
        self._home = Home(None, (-1, -1))  # not entered: no client connects to this daemon
        self._home.relay_path = directory / "relay"
        self._path, self._declared = directory / "state", directory / "conf.d"
        self._daemons: list[Parts] = []
        self._notices = Notices()

    @property
    def _parts(self) -> Parts:
        return self._daemons[-1]

    @property
    def requests(self) -> Requests:
        """The requests of the daemon that runs now."""
        return self._parts.requests

    def start(self) -> None:
        """Start a daemon in the state that the last one left."""
        config = Config(firewall=self._firewall, state=str(self._path))
        self._daemons.append(Parts.__new__(Parts))  # to be closed though it is killed while it starts
        log = Log(lambda _event: None)
        Parts.__init__(self._parts, Loaded(config, [], {}), self._home, log, self._notices, self._declared)

    def is_killed(self, act: Act, left: int) -> bool:
        """Kill the daemon after `left` operations of an act, and start another; False if the act ended before."""
        return self._is_killed(lambda: act(self.requests), left)

    def is_killed_while_it_starts(self, state: Path, left: int) -> bool:
        """Start a daemon with the database `state`, on a host where nothing of it is left, and kill it."""
        self._parts.close()
        self._path = self._path.with_name(f"{self._path.name}=")
        _copy(state, self._path)
        database = Database(self._path)
        database.forget("saved settings")  # they are of an earlier boot
        database.close()
        return self._is_killed(self.start, left)

    def save(self, state: Path) -> None:
        """Copy the database."""
        _copy(self._path, state)

    def _is_killed(self, call: Callable[[], object], left: int) -> bool:
        def kill() -> None:
            if not _next(self._path).exists():
                _copy(self._path, _next(self._path))
            raise Killed

        trap = Trap(left, self._is_under_test, kill, stays=True)
        with suppress(Killed), trap.laid():
            call()
        self._parts.close()
        if trap.was_reached:
            self._path = _next(self._path)
        self.start()
        return trap.was_reached

    def fails(self, act: Act, left: int) -> tuple[bool, bool]:
        """Let one operation of an act fail, after `left` others.

        Return whether there was such an operation, and whether the act was refused.
        """

        def fail() -> None:
            raise HostRefused("the operation failed")

        trap = Trap(left, self._is_under_test, fail, stays=False)
        is_refused = False
        with trap.laid():
            try:
                act(self.requests)
            except HostRefused:
                is_refused = True
        return trap.was_reached, is_refused

    def _is_under_test(self, owner: Any) -> bool:
        return self._firewall == "none" or owner in _WITH_A_FIREWALL

    def wanted(self) -> set[str]:
        """Return the contents of the database."""
        database = self._parts._database
        return {
            *map(str, database.mappings()),
            *(network.name for network, _ in database.networks()),
            *(f"{one.container} on {one.network}, first: {one.is_first}" for one, _ in database.endpoints()),
        }

    def found(self) -> Found:
        """Return the state of the kernel."""
        dataplane = self._parts.dataplane
        listings = {
            "rules": _output("nft", "--stateless", "list", "ruleset"),
            "links": _output("ip", "--details", "address"),
            "settings": "".join(_settings()),
            "ports": "".join(filter(_is_published, _output("ss", "-Hltun", "-O").splitlines(True))),
            "steered": _spell(dataplane.steering.entries()),
            "redirects": _spell(dataplane.redirect.entries()),
            "containers": "".join(f"{box.ip('address')}{box.ip('route')}{box.ip('-6', 'route')}" for box in self.boxes),
        }
        return {name: Counter(_PASSING.sub("", text).split()) for name, text in listings.items()}

    def wait_until_found(self, expected: Found) -> None:
        """Wait until the kernel is in this state. AssertionError: it is not; the message is the difference."""

        left: list[tuple[str, Counter[str], Counter[str]]] = []

        def is_found() -> bool:
            found = self.found()
            different = [name for name in expected if found[name] != expected[name]]
            left[:] = [(name, expected[name] - found[name], found[name] - expected[name]) for name in different]
            return not left

        with suppress(AssertionError):
            wait_until(is_found, "the expected state", 2)
        assert not left, f"expected and missing, present and unexpected: {left}"

    def close(self) -> None:
        """End the daemon, and the relays that it and those before it have started, which would end seconds later."""
        self._parts.close()
        self._notices.close()
        for parts in self._daemons:
            process = parts.dataplane.relay._process
            if process is not None:
                process.terminate()
                process.wait(10)
