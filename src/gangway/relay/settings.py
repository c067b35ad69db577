"""The relay's settings, which are the table `[relay]` of the settings file."""

import os
from typing import Any, NamedTuple

from gangway.errors import InvalidRequest

# The least and the greatest value of each number.  The other settings are booleans and text.
_BOUNDS = {
    "workers": (1, 16),
    "connect_timeout_s": (0.1, 3600),
    "keepalive_s": (1, 32767),  # include/net/tcp.h, MAX_TCP_KEEPIDLE
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
    udp_timeout_s: float = 90.0
    """How long a UDP client and its container may both be silent before the client is forgotten."""
    udp_clients: int = 8192
    """How many UDP clients are remembered at once; then one of the port with the most is forgotten (core/client.c)."""
    udp_clients_per_port: int = 4096
    """How many of them are clients of one port, or of ports that were published as one range."""
    tcp_tw_reuse: bool = True  # set net.ipv4.tcp_tw_reuse=1 in the relay's network namespace while it runs
    redirect: bool = True
    """Redirect sockets that connect to a published loopback address straight to the container, where the kernel can."""
    log: str = "syslog"  # `syslog`, or a file's path


def checked(given: dict[str, Any], where: str) -> Settings:
    """Return the settings in `given`, with the defaults of the others.  InvalidRequest names `where` they are from."""
    defaults = Settings()._asdict()
    for key, value in given.items():
        if key not in defaults:
            raise InvalidRequest(f"{where}: unknown key {key!r}; known are {', '.join(defaults)}")
        kind = type(defaults[key])
        if key in _BOUNDS:
            low, high = _BOUNDS[key]
            is_valid = type(value) in (int, kind) and low <= value <= high
            allowed = f"{'a number' if kind is float else 'a whole number'} from {low} to {high}"
        elif kind is bool:
            is_valid, allowed = isinstance(value, bool), "true or false"
        else:
            is_valid = value == "syslog" or (isinstance(value, str) and value.startswith("/"))
            allowed = '"syslog" or a file\'s absolute path'
        if not is_valid:
            raise InvalidRequest(f"{where}: {key} must be {allowed}, not {value!r}")
    return Settings(**given)
