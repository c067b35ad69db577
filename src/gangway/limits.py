"""The kernel's limits that gangway depends on: how much of each is in use, and what to say about it.

What this file knows: when a limit is nearly reached, and what follows.  What it must not know: where the numbers come
from (`host/usage.py`).  The log, `doctor` and the relay name the same settings.
"""

import errno
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from gangway.inet import PROTOCOLS

CONNTRACK_MAX = "net.netfilter.nf_conntrack_max (sysctl, in the machine's own network namespace)"
WATCHES = "fs.epoll.max_user_watches (sysctl)"
OPEN_FILES = "the limit of open files (LimitNOFILE= of the daemon's service, or ulimit -n where it is started)"
ALL_OPEN_FILES = "fs.file-max (sysctl)"
LOCAL_PORTS = "net.ipv4.ip_local_port_range (sysctl)"
SOURCE_PORTS = "the kernel: 1024 to 65535 of one address towards one destination"
FREE_SOURCE_PORTS = (
    "keep fewer connections, or forget ended ones earlier: lower net.netfilter.nf_conntrack_tcp_timeout_time_wait or "
    "nf_conntrack_udp_timeout_stream (sysctl)"
)

_NEARLY = 0.9  # the share in use that is nearly all
_PAST = 0.8  # below this share it is over: a number that goes up and down around one share is logged once

_NO_PORT = {PROTOCOLS["tcp"]: errno.EADDRNOTAVAIL, PROTOCOLS["udp"]: errno.EAGAIN, PROTOCOLS["sctp"]: errno.EADDRINUSE}
"""The errno if no local port is free: net/ipv4/inet_hashtables.c, __inet_hash_connect; net/ipv4/af_inet.c,
inet_autobind; net/sctp/socket.c, sctp_do_bind."""


class Usage(NamedTuple):
    """How much of something limited is in use."""

    what: str
    used: int
    limit: int  # > 0
    setting: str  # what raises the limit
    consequence: str  # if all is in use
    is_bound: bool = False  # `used` is an upper bound: the kernel does not tell the number itself
    remedy: str = ""  # if not to raise the setting


class Level(IntEnum):
    """How near to its limit something is."""

    FREE = 0
    NEARLY = 1
    REACHED = 2


def level(usage: Usage) -> Level:
    """Return how near to its limit a usage is."""
    if usage.used >= usage.limit:
        return Level.REACHED
    return Level.NEARLY if usage.used >= _NEARLY * usage.limit else Level.FREE


def describe(usage: Usage) -> str:
    """Return the numbers and the setting; near the limit also the consequence, and what to do."""
    remedy = usage.remedy or f"raise {usage.setting}"
    numbers = f"{'at most ' * usage.is_bound}{usage.used} of {usage.limit} in use"
    match level(usage):
        case Level.FREE:
            return f"{numbers}; set by {usage.setting}"
        case Level.NEARLY:
            return f"{numbers}, nearly all; then {usage.consequence}: {remedy}"
        case Level.REACHED:
            return f"{numbers}: {usage.consequence}: {remedy}"


class LimitWatch:
    """Finds what to log: when a limit is nearly reached, when it is, and when that is over."""

    def __init__(self) -> None:
        self._levels: dict[str, Level] = {}
        """The highest level of each thing since it was last over; FREE is left out."""

    def update(self, usages: Iterable[Usage]) -> Iterator[str]:
        """Yield a line for each change.  What is not among the usages any more is over without a word."""
        former, self._levels = self._levels, {}
        for usage in usages:
            before, now = former.get(usage.what, Level.FREE), level(usage)
            if now > before:
                yield f"{usage.what}: {describe(usage)}"
            elif before and usage.used < _PAST * usage.limit:
                yield f"{usage.what}: {usage.used} of {usage.limit} in use: no longer nearly all"
                continue
            if now or before:
                self._levels[usage.what] = max(now, before)


def exhausted(error: OSError) -> str:
    """Return the limit that a refused descriptor or epoll watch means, and its setting; empty: another error."""
    match error.errno:
        case errno.EMFILE:
            return f"out of file descriptors: raise {OPEN_FILES}"
        case errno.ENFILE:
            return f"out of file descriptors, all processes together: raise {ALL_OPEN_FILES}"
        case errno.ENOSPC:
            return f"out of epoll watches: raise {WATCHES}"
        case errno.ENOBUFS | errno.ENOMEM:
            return "out of kernel memory"
    return ""


def out_of_ports(error: int, protocol: int, is_ipv6: bool) -> str:
    """Return what connect() of a socket without a local port was refused for; empty: for another reason.

    `error` is the errno, `protocol` the IP protocol's number.
    """
    if error != _NO_PORT[protocol]:
        return ""
    # An IPv6 host without an address to connect from gets the same error (net/ipv6/ip6_output.c).
    return f"no local port {'or IPv6 address ' * is_ipv6}is free: widen {LOCAL_PORTS}"
