"""A daemon's service that can be cut off at any point, and the services that follow it.

How it works.  A service runs in this process, in the host's namespace.  A trap counts what it does (each step, each
write to the store) and at the n-th cuts it off: from then on nothing that it tries is done, nor undone.  Its database
as it was at that moment is what the next service starts with.
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
"""How often each word stands in each listing: a hash has no order."""

# What differs from one time to the next: numbers and names of the kernel's, timers, what link-local addresses do.
_PASSING = re.compile(
    r"^\d+: |@if\d+|link/ether \S+|link-netns(id)? \S+|(bridge_id|designated_\S+|root_id|port_id|port_no) \S+"
    r"|^ *inet6 fe80.*\n.*\n|^fe80.*\n|\S+_timer +[\d.]+|state \w+|(UP|LOWER_UP|NO-CARRIER),?|\[\d+:\d+\]",
    re.MULTILINE,
)
_CHANGES = re.compile("add_|remove_|remember|forget")


class Killed(BaseException):
    """As if by SIGKILL: no handler may do anything more."""


class Trap:
    """Lets a service do `left` things."""

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
    """The sockets that others share have ports of the kernel's choice, at addresses that nobody can ask."""
    return "192.0.0.8:" not in line and "[100::1]:" not in line


class Ground:
    """A host with two containers, and the services that follow one another there."""

    def __init__(self, host: Namespace, boxes: list[Namespace], directory: Path, firewall: str) -> None:
        self.host = host
        self.boxes = boxes
        self._config = Config(firewall=firewall)
        self._relay_path = directory / "relay"
        self._path = directory / "state"
        self._relays: list[Relay] = []
        self.said: list[str] = []

    def start(self) -> None:
        """A service on what the last one has left."""
        self._database = Database(self._path)
        self._relays.append(Relay(self._relay_path, self._config.relay_settings))
        log = Log(lambda _level, line: self.said.append(line))
        self.service = Requests(self._config, self._database, self._relays[-1], log)

    def is_killed(self, act: Act, left: int) -> bool:
        """Does `left` things of an act, and starts anew; False if it was all done before."""
        trap = Trap(self.service, self._database, self._path, left)
        with suppress(Killed):
            act(self.service)
        self.service.close()
        if trap.sprung:
            self._path = _next(self._path)
        self.start()
        return trap.sprung

    def is_refused(self, act: Act, left: int) -> bool:
        """Lets an act's step number `left` fail, as the host might, once; False if there is no such step."""
        hands = self.service._executor
        do = hands.do
        steps = count()

        def instead(step: Step) -> None:
            if next(steps) == left:
                raise HostRefused("it cannot be done")
            do(step)

        vars(hands)["do"] = instead
        try:
            act(self.service)
        except HostRefused:
            return True
        finally:
            del vars(hands)["do"]
        return False

    def wants(self) -> set[str]:
        """What is in the store."""
        mappings = map(str, self._database.mappings())
        return {
            *mappings,
            *(one.name for one, _ in self._database.networks()),
            *(e.container for e, _ in self._database.endpoints()),
        }

    def found(self) -> Found:
        """What is in the kernel."""
        steered = self.service._controller.steered.entries()
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
        """What is in the kernel is this, or soon will be; AssertionError tells the difference."""

        def difference() -> list[tuple[str, Counter[str], Counter[str]]]:
            found = self.found()
            different = [name for name in expected if found[name] != expected[name]]
            return [(name, expected[name] - found[name], found[name] - expected[name]) for name in different]

        with suppress(AssertionError):
            wait_until(lambda: not difference(), "what is wanted", 2)
        if left := difference():
            raise AssertionError(f"wanted and not there, there and not wanted: {left}")

    def close(self) -> None:
        """Ends the service, and waits for the relays that it and those before it have started."""
        self.service.close()
        for relay in self._relays:
            if relay._process is not None:
                relay._process.wait(10)
