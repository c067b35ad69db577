"""The kernel's notifications that links, addresses, settings or rules have changed.

A notification is never parsed: after it the controller compares the host with the plan.  So a lost one (ENOBUFS: they
came too fast) does no harm.
"""

import errno
import socket
import struct
from contextlib import suppress

from gangway.host import probe
from gangway.host.links import attempting

_NETLINK_NETFILTER = 12  # include/uapi/linux/netlink.h
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
# include/uapi/linux/rtnetlink.h: RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR; RTNLGRP_IPV4_RULE,
# RTNLGRP_IPV6_RULE: policy rules; RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF: forwarding is enabled or disabled
# (devinet.c and addrconf.c notify).
_ROUTE_GROUPS = (1, 5, 9, 8, 19, 24, 25)
_NFTABLES_GROUP = 7  # include/uapi/linux/netfilter/nfnetlink.h: NFNLGRP_NFTABLES

# struct nlmsghdr and struct nfgenmsg; the answer's one attribute is NFTA_GEN_ID, in network byte order.
_HEADER = struct.Struct("=IHHIIBBH")
_GET_GENERATION, _REQUEST = (10 << 8) | 16, 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN; NLM_F_REQUEST


class Notices:
    """Two sockets that become readable when links, or rules, have changed; only root is notified of rules."""

    def __init__(self) -> None:
        with attempting("subscribe to changes by netlink"):
            self.links = _subscribe(socket.NETLINK_ROUTE, _ROUTE_GROUPS)
            try:
                self.rules = _subscribe(_NETLINK_NETFILTER, (_NFTABLES_GROUP,) if probe.is_root() else ())
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


def generation() -> int:
    """Return the generation of this namespace's nftables rules: each change increments it; 0 without nftables."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
            sock.send(_HEADER.pack(_HEADER.size, _GET_GENERATION, _REQUEST, 0, 0, 0, 0, 0))
            answer = sock.recv(4096)
    except OSError:
        return 0
    return int.from_bytes(answer[_HEADER.size + 4 : _HEADER.size + 8])


def _subscribe(protocol: int, groups: tuple[int, ...]) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    sock.bind((0, 0))
    for group in groups:
        sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    return sock
