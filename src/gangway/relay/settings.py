"""The relay's settings, which are the table `[relay]` of the settings file."""

import os
from typing import Any, NamedTuple

from gangway.errors import InvalidRequest

# The least and the greatest value of each number.  The other settings are booleans and text.
_BOUNDS = {
    "workers": (1, 64),
    "connect_timeout_s": (0.1, 3600),
    "keepalive_s": (1, 32767),  # include/net/tcp.h, MAX_TCP_KEEPIDLE
    "udp_timeout_s": (1, 86400),
    "udp_clients": (1, 1_000_000),
}


def _worker_count() -> int:
    """Return one for each core that this process may use, but at most four: the host has other work to do."""
    return min(4, len(os.sched_getaffinity(0)))


class Settings(NamedTuple):
    """The relay's settings and their defaults; times in seconds."""

    workers: int = _worker_count()
    """The most processes that carry TCP and SCTP when there is enough traffic; the first is the relay itself."""
    connect_timeout_s: float = 10.0
    """How long a container may take to answer a connection attempt."""
    keepalive_s: int = 15
    """How long a TCP connection is silent before the peer is probed, and the time between probes."""
    udp_timeout_s: float = 90.0
    """How long a UDP client and its container may both be silent before the client is forgotten."""
    udp_clients: int = 8192
    """How many UDP clients are remembered at once; the one that has been silent longest is forgotten first."""
    tcp_tw_reuse: bool = True
    """Set net.ipv4.tcp_tw_reuse=1 in the relay's network namespace while it runs."""
    redirect: bool = True
    """Redirect sockets that connect to a published loopback address straight to the container, where the kernel can."""
    log: str = "syslog"
    """`syslog`, or a file's path."""


def checked(given: dict[str, Any], where: str) -> Settings:
    """Return the settings in `given`, with the defaults of the others.

    InvalidRequest names `where` they are from, the key, and what is allowed.
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
