"""The kernel's switches for forwarding, and all that goes with them.

What this file knows: what the kernel does besides when one is turned.  What it must not know: who needs forwarding.

Facts that it leans on (ip-sysctl.rst; net/ipv4/devinet.c, inet_forward_change; net/ipv6/addrconf.c,
addrconf_fixup_forwarding):

* Turning ip_forward, or IPv6's `all`, writes the same to every interface's own switch, and ip_forward turns
  net.ipv4.conf.all.accept_redirects the other way.  So what these were is remembered, and written back after.
* An interface that forwards IPv6 heeds no router advertisements, unless its accept_ra is 2: the host's default route,
  if it came that way, would be gone.  Whoever has had an advertisement goes on heeding them.
* Another program that came later may count on forwarding: dockerd does not switch on what it finds on.  A chain for
  what is forwarded that was not there before tells; then forwarding stays on.
"""

import json
from collections.abc import Callable, Collection
from contextlib import suppress

from gangway.errors import GangwayError, HostRefused
from gangway.host import probe, sysctl
from gangway.host.links import Links
from gangway.host.saved_settings import SavedSettings
from gangway.state.database import Database

_REDIRECTS = "net/ipv4/conf/all/accept_redirects"


class ForwardingSwitch:
    """The switches.  `filters` gives the names of other programs' chains for what a family forwards; `warn` says."""

    def __init__(
        self,
        store: Database,
        borrowed: SavedSettings,
        links: Links,
        filters: Callable[[int], Collection[str]],
        warn: Callable[[str], None],
    ) -> None:
        self._database = store
        self._saved = borrowed
        self._links = links
        self._filters = filters
        self._warn = warn

    @property
    def switched_on(self) -> frozenset[int]:
        """The families that are forwarded because we switched it on."""
        return frozenset(family for family, names in probe.FORWARDING.items() if any(map(self._saved.has, names)))

    def switch(self, families: Collection[int]) -> None:
        """These families are forwarded; of the others, those are not any more that we have switched on.  All of it, or
        nothing."""
        before = self.switched_on
        try:
            for family in probe.FORWARDING:
                if family in families:
                    self._on(family)
                elif family in self.switched_on:
                    self._off(family)
        except GangwayError:
            for family in probe.FORWARDING:
                with suppress(GangwayError):
                    if family in self.switched_on - before:
                        self._off(family)
                    elif family in before - self.switched_on:
                        self._on(family)
            raise

    def _on(self, family: int) -> None:
        if family not in self.switched_on:
            beside = {name: sysctl.read(name) for name in self._beside(family)}
            memory = {"boot": probe.boot_id(), "beside": beside, "filters": sorted(self._filters(family))}
            self._database.remember(_key(family), json.dumps(memory))
        if family == 6:
            for interface in self._links.interfaces_with_advertised_routes():
                name = f"net/ipv6/conf/{interface}/accept_ra"
                if sysctl.read(name) == "1":
                    self._saved.set(name, "2")
        for name in probe.FORWARDING[family]:
            self._saved.set(name, "1")

    def _off(self, family: int) -> None:
        memory = json.loads(self._database.recall(_key(family)) or "{}")
        newcomers = set(self._filters(family)) - set(memory.get("filters", ()))
        if newcomers:
            self._warn(f"{probe.FORWARDING[family][-1]} stays on: {', '.join(sorted(newcomers))} came to filter")
            for name in probe.FORWARDING[family]:
                self._saved.keep(name)
        else:
            for name in probe.FORWARDING[family]:
                self._saved.put_back(name)
            if memory.get("boot") == probe.boot_id():
                _write_back(memory["beside"])
        if family == 6:
            for interface in sysctl.interfaces(6):
                self._saved.put_back(f"net/ipv6/conf/{interface}/accept_ra")
        self._database.forget(_key(family))

    def _beside(self, family: int) -> list[str]:
        names = [f"net/ipv{family}/conf/{interface}/forwarding" for interface in sysctl.interfaces(family)]
        return [_REDIRECTS, *names] if family == 4 else names


def _write_back(beside: dict[str, str | None]) -> None:
    for name, value in beside.items():
        if value is not None and sysctl.read(name) not in (None, value):
            with suppress(HostRefused):  # the interface is gone meanwhile
                sysctl.write(name, value)


def _key(family: int) -> str:
    return f"forwarding {family}"
