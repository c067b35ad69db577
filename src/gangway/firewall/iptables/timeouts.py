"""Timeouts of tracked connections, as policies of the kernel's that rules name: `-j CT --timeout NAME`.

A connection by nat that one end has closed is forgotten after 60 s of silence, and then the answer to a long request is
lost.  Rules in the table `raw` give connections to published ports an hour.

Messages and attributes: include/uapi/linux/netfilter/nfnetlink_cttimeout.h.  The timeouts of states that a policy does
not name are those that the namespace has when the policy is created (net/netfilter/nf_conntrack_proto_tcp.c).  A policy
is for one family, and cannot be deleted while a rule names it.
"""

import errno
import os
import socket
from collections.abc import Iterable

from gangway.errors import HostRefused, TimedOut, Unsupported
from gangway.firewall.iptables.render import TIMEOUT_POLICIES
from gangway.firewall.iptables.tool import Iptables
from gangway.host import netlink
from gangway.inet import FAMILIES, PROTOCOLS

PROBE = "GANGWAY-PROBE"
"""A chain in the table `raw`, for a moment."""

_HALF_CLOSED_S = 3600
_NEW, _GET, _DELETE = (8 << 8 | kind for kind in range(3))  # NFNL_SUBSYS_CTNETLINK_TIMEOUT, IPCTNL_MSG_TIMEOUT_…
_SET = 0x400 | 0x100  # NLM_F_CREATE, NLM_F_REPLACE: one that exists gets these timeouts
_NAME, _L3_PROTOCOL, _L4_PROTOCOL, _DATA = 1, 2, 3, 4  # CTA_TIMEOUT_…
_FIN_WAIT, _CLOSE_WAIT = 4, 5  # CTA_TIMEOUT_TCP_…
_UNKNOWN = (errno.EINVAL, errno.EPROTONOSUPPORT)  # the subsystem, the timeouts of TCP


def create() -> None:
    """Create the policies, or set their timeouts again.  Unsupported: this kernel has none.  HostRefused: it failed."""
    limit = _HALF_CLOSED_S.to_bytes(4, "big")
    data = (netlink.pack_attribute(state, limit) for state in (_FIN_WAIT, _CLOSE_WAIT))
    protocol = netlink.pack_attribute(_L4_PROTOCOL, bytes([PROTOCOLS["tcp"]]))
    timeouts = netlink.pack_nested(_DATA, *data)
    for version in TIMEOUT_POLICIES:
        family = netlink.pack_attribute(_L3_PROTOCOL, FAMILIES[version].to_bytes(2, "big"))
        if code := _request(_NEW, _SET, version, family, protocol, timeouts):
            what = f"cannot create the timeout policy {TIMEOUT_POLICIES[version]}"
            if code in _UNKNOWN:
                raise Unsupported(f"{what}: this kernel has none (CONFIG_NF_CT_NETLINK_TIMEOUT)")
            raise HostRefused(f"{what}: {os.strerror(code)}")


def delete() -> None:
    """Delete the policies that no rule names."""
    for version in TIMEOUT_POLICIES:
        _request(_DELETE, 0, version)


def existing() -> list[str]:
    """Return the names of the policies that there are."""
    return [name for version, name in TIMEOUT_POLICIES.items() if not _request(_GET, 0, version)]


def unavailable(tools: Iterable[Iptables]) -> str:
    """Return why rules of these tools cannot set timeouts; empty if they can.  The policies exist then.

    TimedOut: another program holds the tools' lock.
    """
    try:
        create()
        for tool in tools:
            _try_rule(tool)
    except TimedOut:
        raise
    except (Unsupported, HostRefused) as error:
        return str(error)
    return ""


def _try_rule(tool: Iptables) -> None:
    """Write a rule that sets timeouts in a chain that nothing jumps to, and remove both.

    HostRefused: it is refused, and nothing is left.  TimedOut: a chain may be left, which the next attempt removes.
    """
    rule = f"-A {PROBE} -p tcp -j CT --timeout {TIMEOUT_POLICIES[tool.family]}"
    tool.apply(f"*raw\n:{PROBE} - [0:0]\n{rule}\nCOMMIT\n")
    tool.apply(f"*raw\n-F {PROBE}\n-X {PROBE}\nCOMMIT\n")


def _request(kind: int, flags: int, version: int, *attributes: bytes) -> int:
    """Send a request about a family's policy; return its errno, 0 if it succeeded."""
    name = netlink.pack_attribute(_NAME, f"{TIMEOUT_POLICIES[version]}\0".encode())
    body = netlink.NETFILTER_HEADER.pack(socket.AF_UNSPEC, 0, 0) + b"".join((name, *attributes))
    try:
        with netlink.connect(netlink.NETFILTER) as sock:
            sock.send(netlink.pack_message(kind, netlink.REQUEST | netlink.ACK | flags, body))
            return next(iter([*netlink.errors(sock)]), 0)
    except OSError as error:
        return error.errno or errno.EIO
