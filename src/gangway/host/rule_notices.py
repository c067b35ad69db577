"""The kernel's notices of changed nftables rules: who else has changed ours, or a chain that filters what is forwarded.

Other programs may change their tables many times a second.  A notice is read only as far as the table and the chain
that it is about, and what is neither ours nor such a chain is dropped here.

Facts that it leans on (net/netfilter/nf_tables_api.c, nf_tables_commit and nft_notify_enqueue):

* A notice has the port of the netlink socket that made the change, so several sockets are told apart; a tool uses one.
* All notices of a transaction are queued before the call that made it returns.
* Each object's first attribute is its table's name.
"""

import errno
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from threading import RLock
from typing import NamedTuple

from gangway.host import netlink, probe

_NFTABLES_GROUP = 7  # NFNLGRP_NFTABLES
_SO_RCVBUFFORCE = 33
_CHAINS, _RULES, _ELEMENTS = (3, 5), (6, 8), (12, 14)  # NFT_MSG_NEWCHAIN, NFT_MSG_DELCHAIN; …RULE; …SETELEM
_GENERATION = 15  # NFT_MSG_NEWGEN: the end of a transaction
_GET_GENERATION = netlink.NFTABLES << 8 | 16  # NFT_MSG_GETGEN; the answer's first attribute is NFTA_GEN_ID
_CHAIN_NAME, _CHAIN_HOOK, _RULE_CHAIN, _HOOK_NUMBER = 3, 4, 2, 1  # NFTA_CHAIN_NAME, …
_FORWARD = 2  # NF_INET_FORWARD
_BUFFER_BYTES = 1 << 22  # some 30,000 elements
_FIRST_ATTRIBUTE = netlink.MESSAGE.size + netlink.NETFILTER_HEADER.size
_FIRST_VALUE = _FIRST_ATTRIBUTE + 4  # after the attribute's header


class Change(NamedTuple):
    """A changed object: its table, and its chain if it is a chain or a rule."""

    family: str
    table: str
    chain: str
    is_forward: bool  # a base chain for what is forwarded
    is_element: bool
    author: int  # the netlink port of who has changed it


class RuleNotices:
    """A socket that becomes readable when rules have changed; only root is notified.  Thread-safe.

    Until `follow` has said which rules are ours, none are.
    """

    def __init__(self) -> None:
        self.sock = netlink.connect(netlink.NETFILTER)
        self.sock.setblocking(False)
        with suppress(OSError):  # the default is enough for most transactions
            self.sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        netlink.subscribe(self.sock, *([_NFTABLES_GROUP] if probe.is_root() else []))
        self._lock = RLock()
        self._is_ours: Callable[[Change], bool] = lambda _: False
        self._filters: frozenset[str] = frozenset()
        self._authors: set[int] = set()  # who has changed our rules during a change of ours
        self._is_changing = False
        self._is_urgent = False  # more than elements of ours have changed
        self._ours_changed = self._filters_changed = True
        self._has_missed = False

    def close(self) -> None:
        self.sock.close()

    def follow(self, is_ours: Callable[[Change], bool]) -> None:
        """Say which changes are about our rules."""
        with self._lock:
            self._is_ours = is_ours
            self._ours_changed = True

    def follow_filters(self, chains: Collection[str]) -> None:
        """Name the chains that filter what is forwarded, as `FAMILY TABLE NAME`; they have just been read."""
        with self._lock:
            self._filters = frozenset(chains)

    def is_pending(self) -> bool:
        """True if anything has changed that has not been compared since."""
        self.drain()
        return self._ours_changed or self._filters_changed

    def is_urgent(self) -> bool:
        """True if rules of ours were changed or deleted, not elements only: an element may be replaced in two steps."""
        return self._is_urgent

    def have_ours_changed(self) -> bool:
        """True if another program may have changed our rules since they were written or compared."""
        self.drain()
        return self._ours_changed

    def have_filters_changed(self) -> bool:
        """True if chains that filter what is forwarded may have changed; True once for each change."""
        self.drain()
        with self._lock:
            found, self._filters_changed = self._filters_changed, False
        return found

    def forget(self) -> None:
        """Forget all changes of our rules: they are about to be compared or written."""
        self.drain()
        self._ours_changed = self._is_urgent = False

    def suspect(self) -> None:
        """Take our rules for changed."""
        self._ours_changed = True

    @contextmanager
    def own_change(self) -> Iterator[None]:
        """Take what one author changes in this block for our own change."""
        self.drain()
        generation_before = generation()
        with self._lock:
            self._is_changing, self._has_missed = True, False
            self._authors.clear()
        try:
            yield
        finally:
            self.drain()
            with self._lock:
                self._is_changing = False
                is_alone = len(self._authors) <= 1 and not self._has_missed
                if not is_alone and generation() - generation_before > 1:
                    self._ours_changed = self._filters_changed = True

    def drain(self) -> None:
        """Read all notices that wait."""
        with self._lock, suppress(BlockingIOError):
            while True:
                try:
                    data = self.sock.recv(netlink.BUFFER_BYTES)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    self._miss()
                else:
                    for change in _changes(data):
                        self._note(change)

    def _miss(self) -> None:
        self._has_missed = self._filters_changed = True
        if not self._is_changing:
            self._ours_changed = self._is_urgent = True

    def _note(self, change: Change) -> None:
        is_ours = self._is_ours(change)
        if is_ours and self._is_changing:
            self._authors.add(change.author)
        elif is_ours:
            self._ours_changed = True
            self._is_urgent = self._is_urgent or not change.is_element
        if change.is_forward or f"{change.family} {change.table} {change.chain}" in self._filters:
            self._filters_changed = self._filters_changed or not (is_ours and self._is_changing)


def _changes(data: bytes) -> Iterator[Change]:
    """Yield what a datagram is about; elements that one author has changed in a table are one change."""
    former = None
    for one in netlink.messages(data):
        subsystem, kind = divmod(one.kind, 1 << 8)
        if subsystem != netlink.NFTABLES or kind == _GENERATION:
            continue
        about = one.port, data[one.start + netlink.MESSAGE.size : data.index(b"\0", one.start + _FIRST_VALUE)]
        if kind not in _ELEMENTS or about != former:
            yield _change(data[one.start : one.end], kind, one.port)
        former = about if kind in _ELEMENTS else None


def _change(message: bytes, kind: int, author: int) -> Change:
    family = netlink.TABLE_FAMILIES.get(message[netlink.MESSAGE.size], "")
    table = message[_FIRST_VALUE : message.index(b"\0", _FIRST_VALUE)].decode(errors="replace")
    chain, is_forward = "", False
    if kind in _CHAINS or kind in _RULES:
        found = netlink.attributes(message, _FIRST_ATTRIBUTE)
        chain = netlink.text_of(found[_CHAIN_NAME if kind in _CHAINS else _RULE_CHAIN])
        if kind in _CHAINS and _CHAIN_HOOK in found:
            is_forward = int.from_bytes(netlink.attributes(found[_CHAIN_HOOK])[_HOOK_NUMBER]) == _FORWARD
    return Change(family, table, chain, is_forward, kind in _ELEMENTS, author)


def generation() -> int:
    """Return the generation of this namespace's nftables rules: each change increments it; 0 without nftables."""
    try:
        with netlink.connect(netlink.NETFILTER) as sock:
            sock.send(netlink.pack_message(_GET_GENERATION, netlink.REQUEST, bytes(4)))
            answer = sock.recv(netlink.BUFFER_BYTES)
    except OSError:
        return 0
    return int.from_bytes(answer[_FIRST_VALUE : _FIRST_VALUE + 4])
