"""What an operator may set for the relay.  Plain values: reading a file is the keeper's affair."""

import os
from typing import Any, NamedTuple

from gangway.errors import InvalidRequest

# What a number may be; what is not here is a truth value or a text.
_BOUNDS = {
    "workers": (1, 64),
    "connect_timeout_s": (0.1, 3600),
    "keepalive_s": (1, 32767),  # include/net/tcp.h, MAX_TCP_KEEPIDLE
    "udp_timeout_s": (1, 86400),
    "udp_clients": (1, 1_000_000),
}


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
    redirect: bool = True
    """Aim sockets that ask for a port at a loopback address straight at the container, where the kernel can."""
    log: str = "syslog"
    """`syslog`, or a file's path."""


def checked(given: dict[str, Any], where: str) -> Settings:
    """The settings in `given`, and the defaults of the others.

    InvalidRequest names the key that is wrong, and `where` it is.
    """
    defaults = Settings()._asdict()
    for key, value in given.items():
        if key not in defaults:
            raise InvalidRequest(f"{where}: unknown key {key!r}; known are {', '.join(defaults)}")
        _check(where, key, value, defaults[key])
    return Settings(**given)


def _check(where: str, key: str, value: Any, default: Any) -> None:
    if key in _BOUNDS:
        low, high = _BOUNDS[key]
        kinds = (int, float) if isinstance(default, float) else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            kind = "a number" if isinstance(default, float) else "a whole number"
            raise InvalidRequest(f"{where}: {key} must be {kind} from {low} to {high}, not {value!r}")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise InvalidRequest(f"{where}: {key} must be true or false, not {value!r}")
    elif not isinstance(value, str) or (value != "syslog" and not value.startswith("/")):
        raise InvalidRequest(f'{where}: {key} must be "syslog" or a file\'s absolute path, not {value!r}')
