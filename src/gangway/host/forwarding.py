"""The kernel's forwarding switches, and the settings that depend on them.

Facts that it leans on (ip-sysctl.rst; net/ipv4/devinet.c, inet_forward_change; net/ipv6/addrconf.c,
addrconf_fixup_forwarding):

* A change of ip_forward, or of IPv6's `all`, is copied to `default` and to each interface's own switch, and a change of
  ip_forward sets net.ipv4.conf.all.accept_redirects to the opposite.  So these are saved and restored, too.
* An interface that forwards IPv6 ignores router advertisements unless its accept_ra is 2: the host would lose a default
  route that it has from one.  An interface that has received an advertisement therefore keeps accepting them.
* Another program that was started later may rely on forwarding: dockerd leaves it alone if it is enabled already.  A
  new chain that filters forwarded traffic is the sign of one; forwarding then stays enabled.
"""

from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial

from gangway.errors import GangwayError
from gangway.host import probe, sysctl
from gangway.host.links import Links
from gangway.host.saved_settings import SavedSettings, Setting

_REDIRECTS = "net/ipv4/conf/all/accept_redirects"
_STAYS = "left enabled: {} now filters forwarded traffic"


class ForwardingSwitch:
    """Enables forwarding, and restores it.

    `forward_filters` returns the names of other programs' chains that filter a family's forwarded traffic.
    """

    def __init__(self, saved: SavedSettings, links: Links, forward_filters: Callable[[int], Collection[str]]) -> None:
        self._saved, self._links = saved, links
        for family, names in probe.FORWARDING.items():
            for name in names:
                read, write = partial(sysctl.read, name), partial(sysctl.write, name)
                filters = partial(forward_filters, family)
                saved.register(Setting(name, read, write, dependents=filters, reason_to_stay=_STAYS))

    @property
    def enabled_by_us(self) -> frozenset[int]:
        """The families that the host forwards because gangway has enabled it."""
        switches = probe.FORWARDING.items()
        return frozenset(family for family, names in switches if any(map(self._saved.is_changed, names)))

    def open_bridge(self, bridge: str) -> None:
        """Let one of gangway's bridges forward IPv4; the setting ends with it.  HostRefused: it was not changed."""
        sysctl.write(f"net/ipv4/conf/{bridge}/forwarding", "1")

    def switch(self, families: Collection[int]) -> None:
        """Enable forwarding for these families, and restore it for the others.  On failure all is as it was before."""
        before = self.enabled_by_us
        try:
            self._switch(families)
        except GangwayError:
            with suppress(GangwayError):
                self._switch(before)
            raise

    def _switch(self, families: Collection[int]) -> None:
        for family, names in probe.FORWARDING.items():
            if family in families:
                self._enable(family)
            else:
                for name in reversed(names):
                    self._saved.restore(name)

    def _enable(self, family: int) -> None:
        *others, main = probe.FORWARDING[family]
        if family == 6:
            for interface in self._links.interfaces_with_advertised_routes():
                name = f"net/ipv6/conf/{interface}/accept_ra"
                if sysctl.read(name) == "1":
                    self._saved.set(name, "2", restored_with=main)
        copies = [f"net/ipv{family}/conf/{name}/forwarding" for name in sysctl.interfaces(family)]
        self._saved.set(main, "1", side_effects=[*copies, *([_REDIRECTS] if family == 4 else [])])
        for name in others:
            self._saved.set(name, "1")
