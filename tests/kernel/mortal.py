"""A daemon's service that can be killed at any point, and the services that are started after it.

A service runs in this process, in the host's namespace.  A trap counts its operations (each step, each write to the
database) and kills it at the n-th: from then on no operation is carried out, and none is undone.  The next service
starts with a copy of the database from that moment.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

from gangway.daemon.config import Config
from gangway.errors import HostRefused
from gangway.log import Log
from gangway.reconcile.diff import Step
from gangway.relay.client import Relay
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
_CHANGES = re.compile("add_|remove_|remember|forget")


class Killed(BaseException):
    """Stands for SIGKILL: no handler may do anything after it."""


class Trap:
    """Kills a service after `left` operations."""

    def __init__(self, service: Requests, store: Database, path: Path, left: int) -> None:
        self._left = left
        self._path = path
        self.sprung = False
        for owner, names in (
            (service._executor, ["do"]),
            (store, [name for name in dir(store) if _CHANGES.match(name)]),
        ):
            for name in names:
                setattr(owner, name, self._trapped(getattr(owner, name)))

    def _trapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*words: Any) -> Any:
            if not self.sprung and self._left == 0:
                self.sprung = True
                with closing(sqlite3.connect(self._path)) as now, closing(sqlite3.connect(_next(self._path))) as then:
                    now.backup(then)
            if self.sprung:
                raise Killed
            self._left -= 1
            return call(*words)

        return instead


def _next(path: Path) -> Path:
    return path.with_name(f"{path.name}+")


def _is_published(line: str) -> bool:
    """True unless the line is a shared socket, which has an unreachable address and a port that the kernel chose."""
    return "192.0.0.8:" not in line and "[100::1]:" not in line


class Ground:
    """A host with two containers, and the services that run there one after the other."""

    def __init__(self, host: Namespace, boxes: list[Namespace], directory: Path, firewall: str) -> None:
        self.host = host
        self.boxes = boxes
        self._config = Config(firewall=firewall)
        self._relay_path = directory / "relay"
        self._path = directory / "state"
        self._relays: list[Relay] = []
        self.said: list[str] = []

    def start(self) -> None:
        """Start a service in the state that the last one left."""
        self._database = Database(self._path)
        self._relays.append(Relay(self._relay_path, self._config.relay_settings))
        log = Log(lambda _level, line: self.said.append(line))
        self.service = Requests(self._config, self._database, self._relays[-1], log)

    def is_killed(self, act: Act, left: int) -> bool:
        """Kill the service after `left` operations of an act, and start another; False if the act ended before."""
        trap = Trap(self.service, self._database, self._path, left)
        with suppress(Killed):
            act(self.service)
        self.service.close()
        if trap.sprung:
            self._path = _next(self._path)
        self.start()
        return trap.sprung

    def is_refused(self, act: Act, left: int) -> bool:
        """Let step number `left` of an act fail once, as the host might; False if there is no such step."""
        executor = self.service._executor
        do = executor.do
        steps = count()

        def instead(step: Step) -> None:
            if next(steps) == left:
                raise HostRefused("the step failed")
            do(step)

        vars(executor)["do"] = instead
        try:
            act(self.service)
        except HostRefused:
            return True
        finally:
            del vars(executor)["do"]
        return False

    def wants(self) -> set[str]:
        """Return the contents of the database."""
        mappings = map(str, self._database.mappings())
        return {
            *mappings,
            *(one.name for one, _ in self._database.networks()),
            *(e.container for e, _ in self._database.endpoints()),
        }

    def found(self) -> Found:
        """Return the state of the kernel."""
        steered = self.service._executor.dataplane.steering.entries()
        listings = {
            "rules": self.host.run("nft", "--stateless", "list", "ruleset").stdout,
            "links": self.host.run("ip", "--details", "link").stdout + self.host.ip("address"),
            "settings": self.host.run("sysctl", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding").stdout,
            "ports": "".join(filter(_is_published, self.host.run("ss", "-Hltun", "-O").stdout.splitlines(True))),
            "steered": "".join(f"{'/'.join(map(str, block))}={served} " for block, served in sorted(steered.items())),
            "containers": "".join(f"{box.ip('address')}{box.ip('route')}{box.ip('-6', 'route')}" for box in self.boxes),
        }
        return {name: Counter(_PASSING.sub("", text).split()) for name, text in listings.items()}

    def becomes(self, expected: Found) -> None:
        """Wait until the kernel is in this state.  AssertionError: it is not, with the difference."""

        def difference() -> list[tuple[str, Counter[str], Counter[str]]]:
            found = self.found()
            different = [name for name in expected if found[name] != expected[name]]
            return [(name, expected[name] - found[name], found[name] - expected[name]) for name in different]

        with suppress(AssertionError):
            wait_until(lambda: not difference(), "the expected state", 2)
        if left := difference():
            raise AssertionError(f"expected and missing, present and unexpected: {left}")

    def close(self) -> None:
        """End the service, and wait for the relays that it and those before it have started."""
        self.service.close()
        for relay in self._relays:
            if relay._process is not None:
                relay._process.wait(10)
