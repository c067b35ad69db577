"""The daemon's redirect, if this host can have one.

What this file knows: which of the host's sockets are to be redirected, and that the relay keeps the redirect going when
the daemon ends.  What it must not know: which ports are published, how the kernel is told.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address

from gangway.ebpf.keys import key_at, sixteen
from gangway.ebpf.redirect import Redirect
from gangway.ebpf.redirect_entries import led_to
from gangway.errors import GangwayError, HostRefused, Unsupported
from gangway.inet import format_host
from gangway.model import Address
from gangway.plan import MappingPlan
from gangway.reconcile.diff import redirects_of
from gangway.relay.client import Relay

_NAME = "redirect"  # what the relay holds the links under
SWITCHED_OFF = "it is switched off (redirect = false)"


class Redirects:
    """The redirect of a network namespace; `lacking` says why there is none, if there is none.

    It takes over from a daemon that was here before.  `of_host`: sockets that ask the host's own addresses, too.
    `lent_fd` gives the map of ports that are lent to somebody, if there is one.
    """

    def __init__(self, relay: Relay, wanted: bool, of_host: bool, lent_fd: Callable[[], int | None]) -> None:
        self._relay = relay
        self._lent_fd = lent_fd
        self._of_host = of_host
        self._redirect: Redirect | None = None
        self._addresses: frozenset[bytes] = frozenset()
        self.lacking = "" if wanted else SWITCHED_OFF
        former = relay.held(_NAME)
        try:
            if wanted:
                self._load(former)
        except Unsupported as error:
            self.lacking = str(error)
        finally:
            for fd in former:
                os.close(fd)
        if self._redirect is None:
            self._have_held(())

    def close(self) -> None:
        """Lets go of it; while a relay lives it goes on."""
        if self._redirect is not None:
            self._redirect.close()

    def is_intact(self) -> bool:
        """Nobody else has ended it."""
        return self._redirect is None or self._redirect.is_attached()

    def mend(self) -> None:
        """Attaches it anew if somebody else has ended it.  Unsupported: that cannot be done any more."""
        before = self._redirect
        if before is None or before.is_attached():
            return
        self._redirect = None
        try:
            self._load(before.links)
        except Unsupported as error:
            self.lacking = str(error)
            self._have_held(())
            raise
        finally:
            before.close()

    def found(self) -> Mapping[bytes, bytes]:
        """The entries that there are."""
        return dict(self._redirect.entries()) if self._redirect is not None else {}

    def enter(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Some more: all or none."""
        if self._redirect is None:
            raise Unsupported(f"sockets cannot be redirected: {self.lacking}")
        done: list[tuple[bytes, bytes]] = []
        try:
            for key, value in entries:
                self._redirect.enter(key, value)
                done.append((key, value))
        except GangwayError:
            self.erase(done)
            raise

    def erase(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Some less."""
        if self._redirect is not None:
            for key, _ in entries:
                self._redirect.erase(key)

    def learn_addresses(self, addresses: Callable[[], Collection[str]]) -> None:
        """The host's own addresses may be others now."""
        if self._redirect is None or not self._of_host:
            return
        own = frozenset(sixteen(one.packed) for one in map(ip_address, addresses()) if _can_be_redirected(one))
        if own != self._addresses:
            self._redirect.set_own_addresses(own)
            self._addresses = own

    def met(self, planned: MappingPlan, port: int) -> str:
        """The entry that a socket meets which asks for a port of a mapping, as the kernel has it."""
        mapping = planned.mapping
        key = key_at(mapping.protocol.value, mapping.host_address.packed, port)
        value = None if self._redirect is None else self._redirect.look_up(key)
        if value is None:
            return "no entry in the redirect's map"
        led = led_to(value, port)
        asked = f"{format_host(mapping.host_address)}:{port}"
        to = f"{format_host(ip_address(led.address))}:{led.port}"
        used = f"the mapping was used {self.count(planned)} times so far"
        return f"redirect map: {mapping.protocol} {asked} -> {to}; {used}"

    def count(self, planned: MappingPlan) -> int:
        """How often sockets were redirected to a mapping: connections, and peers of sockets that are not connected."""
        if self._redirect is None or not planned.is_redirected:
            return 0
        values = (self._redirect.look_up(key) for key, _ in redirects_of(planned))
        return sum(led_to(value, 0).redirected for value in values if value is not None)

    def _load(self, former: Sequence[int]) -> None:
        self._redirect = Redirect(self._of_host, former, self._lent_fd())
        self._addresses = frozenset()
        self._have_held(self._redirect.links)

    def _have_held(self, links: Sequence[int]) -> None:
        with suppress(HostRefused):  # then it ends when the daemon does
            self._relay.hold(_NAME, links)


def _can_be_redirected(address: Address) -> bool:
    """Loopback addresses are known, and for IPv6's link-local ones there is the relay."""
    return not (address.is_loopback or (address.version == 6 and address.is_link_local))
