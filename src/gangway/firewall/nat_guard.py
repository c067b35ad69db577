"""Keeps established connections translated while the rules are missing.

`nft flush ruleset`, which a reload of Debian's nftables service begins with, deletes every table.  With the last chain
of the type `nat` the kernel stops translating (net/netfilter/nf_nat_core.c, nf_nat_unregister_fn), and with the last
rule that needs it, tracking: until the rules are written again, packets of translated connections arrive as they are,
and are answered by a reset.

A table with the flag `owner` can be changed by the netlink socket that created it only, and a flush leaves it out
(nf_tables_api.c, nft_flush; Linux 5.12).  It is deleted when that socket is closed.  So the guard is a table of its
own, with a chain of the type `nat` in which a rule looks at the connection's state, and does nothing else.  It ends
with the daemon, whose death still takes no rule away.
"""

import errno
import os
import socket

from gangway.host import netlink
from gangway.host.netlink import pack_attribute, pack_message, pack_nested

TABLE = "nat_guard_gangway"
_BEGIN, _END = 0x10, 0x11  # NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = (netlink.NFTABLES << 8 | number for number in (0, 3, 6))
_CREATE = 0x400  # NLM_F_CREATE
_INET = 1  # NFPROTO_INET
_OWNER = 2  # NFT_TABLE_F_OWNER
_PREROUTING, _LAST = 0, 1000  # NF_INET_PRE_ROUTING; after every other chain
_REGISTER, _STATE = 1, 0  # NFT_REG_1, NFT_CT_STATE


class NatGuard:
    """The guard of the calling thread's network namespace.  `unavailable` is why there can be none."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self.unavailable = ""

    def start(self) -> None:
        """Create the table, unless it is there or cannot be created."""
        if self._socket is None and not self.unavailable:
            sock = netlink.connect(netlink.NETFILTER)
            sock.send(_batch())
            error = next(netlink.errors(sock), 0)
            if error:
                sock.close()
                self.unavailable = _reason(error)
            else:
                self._socket = sock

    def stop(self) -> None:
        """Delete the table, if it is there."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _batch() -> bytes:
    """Return the transaction that creates the table."""
    name = pack_attribute(1, f"{TABLE}\0".encode())  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE
    chain = b"prerouting\0"
    hook = pack_nested(4, pack_attribute(1, _number(_PREROUTING)), pack_attribute(2, _number(_LAST)))  # NFTA_CHAIN_HOOK
    state = pack_nested(2, pack_attribute(1, _number(_REGISTER)), pack_attribute(2, _number(_STATE)))  # NFTA_CT_…
    expression = pack_nested(1, pack_attribute(1, b"ct\0"), state)  # NFTA_LIST_ELEM, NFTA_EXPR_…
    return b"".join(
        (
            pack_message(_BEGIN, netlink.REQUEST, netlink.NETFILTER_HEADER.pack(0, 0, netlink.NFTABLES)),
            _create(_NEW_TABLE, 0, name, pack_attribute(2, _number(_OWNER))),  # NFTA_TABLE_FLAGS
            # NFTA_CHAIN_NAME, NFTA_CHAIN_TYPE
            _create(_NEW_CHAIN, 0, name, pack_attribute(3, chain), hook, pack_attribute(7, b"nat\0")),
            # NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS
            _create(_NEW_RULE, netlink.ACK, name, pack_attribute(2, chain), pack_nested(4, expression)),
            pack_message(_END, netlink.REQUEST, netlink.NETFILTER_HEADER.pack(0, 0, netlink.NFTABLES)),
        )
    )


def _create(kind: int, flags: int, *attributes: bytes) -> bytes:
    return pack_message(
        kind, netlink.REQUEST | _CREATE | flags, netlink.NETFILTER_HEADER.pack(_INET, 0, 0) + b"".join(attributes)
    )


def _number(value: int) -> bytes:
    return value.to_bytes(4)


def _reason(error: int) -> str:
    if error in (errno.EOPNOTSUPP, errno.EINVAL):
        return "the kernel has no tables with an owner (Linux 5.12)"
    return f"the kernel refuses a table with an owner: {os.strerror(error)}"
