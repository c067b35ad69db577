"""The kernel's notifications that links, addresses, settings or rules have changed.

One about links is never parsed: after it the controller compares the host with the plan.  So a lost one (ENOBUFS: they
came too fast) does no harm.

Containers' namespaces notify us, too: each that has a number in ours, which it gets when a veth leads there.  The
number comes with the notice (netlink(7), NETLINK_LISTEN_ALL_NSID; it takes CAP_NET_BROADCAST).
"""

import errno
import socket
import sys
from contextlib import ExitStack, suppress
from threading import Lock

from gangway.host import netlink
from gangway.host.links import attempting
from gangway.host.rule_notices import RuleNotices

_ALL_NSID = 8  # NETLINK_LISTEN_ALL_NSID
_ANCILLARY_BYTES = socket.CMSG_SPACE(4)
# include/uapi/linux/rtnetlink.h: RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR; RTNLGRP_IPV4_RULE,
# RTNLGRP_IPV6_RULE: policy rules; RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF: forwarding is enabled or disabled
# (devinet.c and addrconf.c notify).
_LINK_GROUPS = (1, 5, 9, 8, 19, 24, 25)
_ROUTE_GROUPS = (7, 11)  # RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE


class Notices:
    """Sockets that become readable when links or routes have changed, and the notices of changed rules."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._watched: frozenset[int] = frozenset()
        self._changed: set[int] = set()
        self._has_missed = True  # whatever has changed until now
        with attempting("subscribe to changes by netlink"), ExitStack() as undo:
            self.links = undo.enter_context(_subscribed(_LINK_GROUPS))
            self.routes = undo.enter_context(_subscribed(_ROUTE_GROUPS))
            self.rules = RuleNotices()
            undo.callback(self.rules.close)
            self._scope = undo.pop_all()
        _listen_everywhere(self.links)
        _listen_everywhere(self.routes)

    def drain(self, sock: socket.socket) -> bool:
        """Discard all notices that wait at one of the sockets; True if one is of this namespace or a watched one."""
        is_ours = False
        with suppress(BlockingIOError):
            while True:
                try:
                    _, more, _, _ = sock.recvmsg(1, _ANCILLARY_BYTES)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    is_ours = self._has_missed = True
                    continue
                numbers = {int.from_bytes(data, sys.byteorder) for _, kind, data in more if kind == _ALL_NSID}
                with self._lock:
                    is_ours = is_ours or not numbers or not numbers.isdisjoint(self._watched)
                    self._changed |= numbers
        return is_ours

    def changed_among(self, namespaces: frozenset[int]) -> frozenset[int]:
        """Return the namespaces where something has changed since the last call; watch all of them from now on.

        They are given by their numbers in ours.  If the kernel refuses notices from others, none has changed.
        """
        with self._lock:
            missed, self._has_missed = self._has_missed, False
            found = namespaces if missed else namespaces & self._changed | namespaces - self._watched
            self._watched, self._changed = namespaces, set()
        return found

    def close(self) -> None:
        self._scope.close()


def _subscribed(groups: tuple[int, ...]) -> socket.socket:
    sock = netlink.connect(socket.NETLINK_ROUTE)
    sock.setblocking(False)
    netlink.subscribe(sock, *groups)
    return sock


def _listen_everywhere(sock: socket.socket) -> None:
    """Receive notices of other namespaces, too, unless the kernel refuses."""
    with suppress(OSError):
        sock.setsockopt(netlink.SOL_NETLINK, _ALL_NSID, 1)
