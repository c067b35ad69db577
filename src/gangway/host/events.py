"""The kernel's notifications that links, addresses, settings or rules have changed.

One about links is never parsed: after it the controller compares the host with the plan.  So a lost one (ENOBUFS: they
came too fast) does no harm.
"""

import errno
import socket
from contextlib import suppress

from gangway.host.links import attempting
from gangway.host.rule_notices import RuleNotices

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
# include/uapi/linux/rtnetlink.h: RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR; RTNLGRP_IPV4_RULE,
# RTNLGRP_IPV6_RULE: policy rules; RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF: forwarding is enabled or disabled
# (devinet.c and addrconf.c notify).
_ROUTE_GROUPS = (1, 5, 9, 8, 19, 24, 25)


class Notices:
    """A socket that becomes readable when links have changed, and the notices of changed rules."""

    def __init__(self) -> None:
        with attempting("subscribe to changes by netlink"):
            self.links = _subscribe(socket.NETLINK_ROUTE, _ROUTE_GROUPS)
            try:
                self.rules = RuleNotices()
            except OSError:
                self.links.close()
                raise

    def drain(self, sock: socket.socket) -> None:
        """Discard all notices that wait at one of the sockets."""
        with suppress(BlockingIOError):
            while True:
                try:
                    sock.recv(65536)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise

    def close(self) -> None:
        self.links.close()
        self.rules.close()


def _subscribe(protocol: int, groups: tuple[int, ...]) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    sock.bind((0, 0))
    for group in groups:
        sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    return sock
