"""What is measured, and what is promised: the issues' tables as data.

What this file knows: the rows and their bounds.  What it must not know: how a row is measured, or what came out.

A bound is a ratio to what the row is compared with, in the same round.  Where more is better it must be reached, where
less is better it must not be exceeded.
"""

from collections.abc import Callable
from dataclasses import dataclass

SUBJECT, DOCKER_PROXY, IPTABLES = "gangway", "docker-proxy", "iptables"

_PAIR = (SUBJECT, DOCKER_PROXY)
_PROXIES = (*_PAIR, "socat", "haproxy")
_DATAGRAMS = (*_PAIR, "socat", "direct")  # haproxy carries no UDP
_ALL = (*_PROXIES, "direct")


def per_second(figure: float) -> str:
    return f"{figure:,.0f}/s"


def bytes_per_second(figure: float) -> str:
    return f"{figure / 1e9:.2f} GB/s"


def seconds_per_byte(figure: float) -> str:
    return f"{figure * 1e9:.3f} s/GB"


def milliseconds(figure: float) -> str:
    return f"{figure * 1e3:.2f} ms"


def seconds(figure: float) -> str:
    return f"{figure:.2f} s"


def kibibytes(figure: float) -> str:
    return f"{figure / 1024:,.1f} KiB"


def megabytes(figure: float) -> str:
    return f"{figure / 1e6:.1f} MB"


@dataclass(frozen=True)
class Chapter:
    """A table of its own."""

    title: str
    way: str
    """From where to where."""
    note: str
    """What a reader of its figures should know."""


IN_DOCKER = Chapter(
    "In docker-proxy's place",
    "127.0.0.1 → container",
    """\
`direct` is a client of the container's own address. socat, haproxy and direct have three rounds at most, connections
for 30 s two, docker three.""",
)
WITHOUT_DOCKER = Chapter(
    "Without Docker",
    "another machine → container",
    """\
The other machine is a namespace on a cable of its own to the host, which routes between it and the container's bridge;
its client and the container's server have a core each. gangway has nftables. `iptables` is what an administrator types:
forwarding, MASQUERADE for the containers, one DNAT rule; nothing is filtered. `direct` is the container's own address,
routed, without any rule; it has three rounds at most. A publication is timed at the daemon's API, with two daemons in
turns; the command from its start to its end, the daemon running already, in turns with a Python that has nothing to do.
Memory is compared with a limit; of pages that the two share with other programs, PSS counts their part.""",
)


@dataclass(frozen=True)
class Row:
    """One row.  `shown` prints its figure; `most_rounds` is for rows that are too long to repeat often.

    `reference` is a contender's name; or that of what the measure itself sets beside gangway.
    """

    key: str
    title: str
    shown: Callable[[float], str]
    at_least: float
    aim: float
    contenders: tuple[str, ...] = _ALL
    less_is_better: bool = False
    most_rounds: int | None = None
    chapter: Chapter = IN_DOCKER
    reference: str = DOCKER_PROXY

    def reaches(self, ratio: float, bound: float) -> bool:
        """Whether a ratio is as good as a bound, or better."""
        return ratio <= bound if self.less_is_better else ratio >= bound

    def worst(self, ratios: list[float]) -> float:
        return max(ratios) if self.less_is_better else min(ratios)


def _cost(
    key: str,
    title: str,
    shown: Callable[[float], str],
    at_least: float,
    aim: float,
    contenders: tuple[str, ...],
    most_rounds: int | None = None,
) -> Row:
    return Row(key, title, shown, at_least, aim, contenders, less_is_better=True, most_rounds=most_rounds)


def _nat(key: str, title: str) -> Row:
    contenders = (SUBJECT, IPTABLES, "direct")
    return Row(key, title, per_second, 0.97, 1.0, contenders, chapter=WITHOUT_DOCKER, reference=IPTABLES)


def _beside(key: str, title: str, shown: Callable[[float], str], at_most: float, aim: float, reference: str) -> Row:
    return Row(
        key, title, shown, at_most, aim, (SUBJECT,), less_is_better=True, chapter=WITHOUT_DOCKER, reference=reference
    )


ROWS = (
    Row("rr1", "request/response, 1 connection, 1 byte", per_second, 1.10, 1.3),
    Row("rr64", "request/response, 64 connections", per_second, 1.0, 1.3),
    Row("crr16", "connect + 1 byte + close, 16 at once", per_second, 1.05, 1.3),
    Row("crr-sustained", "the same for 30 s, ordinary TIME_WAIT settings", per_second, 5, 15, most_rounds=2),
    Row("pgbench50", "pgbench -S, 50 clients (transactions)", per_second, 1.10, 1.3),
    Row("pgbench1", "pgbench -S, 1 client (transactions)", per_second, 1.15, 1.3),
    Row("up1", "bulk to the container, 1 connection", bytes_per_second, 1.0, 1.3),
    Row("up8", "bulk to the container, 8 connections", bytes_per_second, 1.0, 1.3),
    Row("down1", "bulk from the container, 1 connection", bytes_per_second, 1.0, 1.3),
    Row("down8", "bulk from the container, 8 connections", bytes_per_second, 1.0, 1.3),
    Row("udp1", "UDP request/response, 1 client", per_second, 1.1, 1.5, _DATAGRAMS),
    Row("udp64", "UDP request/response, 64 clients", per_second, 1.1, 1.5, _DATAGRAMS),
    _cost("bulk-cpu", "CPU time for the same bulk transfer, both ways", seconds_per_byte, 1.0, 0.8, _PROXIES),
    _cost("start", "launcher, exec to `0\\n`, relay up", milliseconds, 1.0, 0.6, _PAIR),
    _cost("port-memory", "memory (PSS) for each published port, 500 ports", kibibytes, 0.2, 0.08, _PROXIES),
    _cost("udp-memory", "memory (PSS) for each UDP client, 2,000 clients", kibibytes, 0.1, 0.02, _DATAGRAMS[:3]),
    _cost("docker", "`docker run -p` of 200 ports, and `docker rm -f`", seconds, 1.0, 0.9, _PAIR, most_rounds=3),
    _nat("nat-rr1", "request/response, 1 connection, 1 byte"),
    _nat("nat-rr64", "request/response, 64 connections"),
    _nat("nat-crr16", "connect + 1 byte + close, 16 at once"),
    _beside("publish-10000", "one more port published, with 10,000", milliseconds, 2.0, 1.1, "with none"),
    _beside("publish-command", "the command `gangway publish`", milliseconds, 3.0, 2.5, "`python3 -c pass`"),
    _beside("idle-memory", "memory (PSS) of daemon and relay, idle", megabytes, 1.0, 1.0, "limit"),
)
