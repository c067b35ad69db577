"""The relay's settings: the table `[relay]` of the settings file, and those of the log, which is the daemon's, too."""

import os
from typing import Any, NamedTuple

from gangway.errors import InvalidRequest

# The least and the greatest value of each number.  The other settings are booleans.
_BOUNDS = {
    "workers": (1, 16),
    "connect_timeout_s": (0.1, 3600),
    "keepalive_s": (1, 32767),  # include/net/tcp.h, MAX_TCP_KEEPIDLE
    "drain_timeout_s": (1, 604_800),
    "udp_timeout_s": (1, 86400),
    "udp_clients": (1, 1_000_000),
    "udp_clients_per_port": (1, 1_000_000),
}


class Settings(NamedTuple):
    """The relay's settings and their defaults; times in seconds."""

    workers: int = min(4, len(os.sched_getaffinity(0)))  # at most four: the host has other work to do
    """How many threads carry the traffic; a UDP port has one of them."""
    connect_timeout_s: float = 10.0  # how long a container may take to answer a connection attempt
    keepalive_s: int = 15
    """How long a TCP connection is silent before the peer is probed, and the time between probes."""
    drain_timeout_s: int = 3600
    """How long connections may last after another relay has replaced the one that carries them."""
    udp_timeout_s: float = 90.0
    """How long a UDP client and its container may both be silent before the client is forgotten."""
    udp_clients: int = 8192
    """How many UDP clients are remembered at once; then one of the port with the most is forgotten (core/client.c)."""
    udp_clients_per_port: int = 4096
    """How many of them are clients of one port, or of ports that were published as one range."""
    tcp_tw_reuse: bool = True  # set net.ipv4.tcp_tw_reuse=1 in the relay's network namespace while it runs
    redirect: bool = True
    """Redirect sockets that connect to a published loopback address straight to the container, where the kernel can."""
    log: str = "auto"  # where the log goes: `gangway.log_targets`
    log_level: str = "info"
    log_format: str = "text"

    def table(self) -> dict[str, Any]:
        """Return the keys of the table `[relay]`, with their values."""
        return {name: value for name, value in self._asdict().items() if name in TABLE}


_OF_THE_LOG = ("log", "log_level", "log_format")
TABLE = tuple(name for name in Settings._fields if name not in _OF_THE_LOG)
"""The keys of the table."""


def checked(given: dict[str, Any], where: str) -> Settings:
    """Return the settings in `given`, with the defaults of the others.  InvalidRequest names `where` they are from."""
    defaults = Settings()._asdict()
    for key, value in given.items():
        if key not in TABLE:
            raise InvalidRequest(f"{where}: unknown key {key!r}; known are {', '.join(TABLE)}")
        kind = type(defaults[key])
        if key in _BOUNDS:
            low, high = _BOUNDS[key]
            is_valid = type(value) in (int, kind) and low <= value <= high
            allowed = f"{'a number' if kind is float else 'a whole number'} from {low} to {high}"
        else:
            is_valid, allowed = isinstance(value, bool), "true or false"
        if not is_valid:
            raise InvalidRequest(f"{where}: {key} must be {allowed}, not {value!r}")
    return Settings(**given)
