"""What an operator may set for the relay.  Plain values: reading a file is the keeper's affair."""

import os
from typing import NamedTuple


def _worker_count() -> int:
    """One process for each core that this one may run on, four at most: a relay is not what a host is bought for."""
    return min(4, len(os.sched_getaffinity(0)))


class Settings(NamedTuple):
    """The relay's settings and their defaults; times in seconds."""

    workers: int = _worker_count()
    """Processes that carry TCP and SCTP when there is traffic enough; the first is the relay itself."""
    connect_timeout_s: float = 10.0
    """How long the container may take to answer a connection attempt."""
    keepalive_s: int = 15
    """Silence on a TCP connection after which the peer is asked whether it is still there, and the time between
    questions."""
    udp_timeout_s: float = 90.0
    """Silence in both directions after which a UDP client is forgotten."""
    udp_clients: int = 8192
    """How many UDP clients are remembered at once; the one that was silent longest goes first."""
    tcp_tw_reuse: bool = True
    """Set net.ipv4.tcp_tw_reuse=1 in the relay's network namespace while it runs."""
    log: str = "syslog"
    """`syslog`, or a file's path."""
