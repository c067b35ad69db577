"""What is measured, and what is promised: the issues' tables as data.

What this file knows: the rows and their bounds.  What it must not know: how a row is measured, or what came out.

A bound is a ratio to what the row is compared with, in the same round.  Where more is better it must be reached, where
less is better it must not be exceeded.
"""

from collections.abc import Callable
from dataclasses import dataclass

SUBJECT, DOCKER_PROXY, IPTABLES, DIRECT = "gangway", "docker-proxy", "iptables", "direct"
DOCKERD_300 = "dockerd, 300 ports"
REMOTE, LOOPBACK, RELAY = "remote", "loopback", "relay"  # gangway, by the road of who asks

_PAIR = (SUBJECT, DOCKER_PROXY)
_PROXIES = (*_PAIR, "socat", "haproxy")
_DATAGRAMS = (*_PAIR, "socat", DIRECT)  # haproxy carries no UDP
_ALL = (*_PROXIES, DIRECT)


def per_second(figure: float) -> str:
    return f"{figure:,.0f}/s"


def bytes_per_second(figure: float) -> str:
    return f"{figure / 1e9:.2f} GB/s"


def seconds_per_byte(figure: float) -> str:
    return f"{figure * 1e9:.3f} s/GB"


def milliseconds(figure: float) -> str:
    return f"{figure * 1e3:.2f} ms"


def microseconds(figure: float) -> str:
    return f"{figure * 1e6:.3f} µs"


def seconds(figure: float) -> str:
    return f"{figure:.2f} s"


def number(figure: float) -> str:
    return f"{figure:,.0f}"


def kibibytes(figure: float) -> str:
    return f"{figure / 1024:,.1f} KiB"


def megabytes(figure: float) -> str:
    return f"{figure / 1e6:.1f} MB"


def times(ratio: float) -> str:
    """A ratio; with three digits where some bounds differ from 1 by hundredths."""
    return f"{ratio:.3f}" if ratio < 0.2 or 0.95 <= ratio < 1.05 else f"{ratio:.2f}"


@dataclass(frozen=True)
class Chapter:
    """A table of its own."""

    title: str
    direction: str
    """From where to where."""
    note: str
    """What a reader of its figures should know."""


RELAYED = Chapter(
    "The relay in docker-proxy's place",
    "127.0.0.1 → container",
    """\
gangway has `redirect = false` here: a client on the host would not meet its relay otherwise. `direct` is
a client of the container's own address. socat, haproxy and direct have three rounds at most, connections for 30 s
two.""",
)
IN_DOCKER = Chapter(
    "In docker-proxy's place",
    "under dockerd",
    """\
gangway is as its users have it: it redirects, and has its relay ready. socat and haproxy have three rounds at most,
docker three, that with 1,000 ports one.""",
)
REDIRECTED = Chapter(
    "Loopback, redirected",
    "127.0.0.1 → container",
    """\
gangway is its daemon, with nftables. `direct` asks the container's own address, on the very same host: with the same
daemon, network, rules and tracked connections, so that what differs is the redirect; the two take turns, 30 times in
each round, with bulk for four times as long. The client and the container's server have a core each. docker-proxy has a
host of its own, without any rule.""",
)
UNRELATED = Chapter(
    "Loopback, not published",
    "127.0.0.1 → the host itself",
    """\
The programs run whenever a process on the machine connects. Only connect() is timed, in batches, each on a new socket.
To be refused is the soonest end of one, so nowhere does their part of the time weigh more: a program that does nothing
but return costs 2 % of it. One process measures with them and without, in turns; nobody else's programs are attached
meanwhile.""",
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

ALL_PORTS = Chapter(
    "Every port at once",
    "ports 1024 to 65000",
    """\
gangway is its daemon, with nftables. Every port is `-p 1024-65000:1024-65000/tcp -p 1024-65000:1024-65000/udp`,
127,954 ports; dockerd's 300 are of tcp, and docker-proxy is behind them. Both are timed as commands, from start to
end, gangway's with the daemon running, the container attached and nothing published yet: the start of the relay is in
the time, and in the memory. That is what the machine has less of for whoever asks (MemAvailable), compared with a
limit. Traffic asks the last port of 1024-65000, in turns with another host that has this port only; half-way two
others take their place. By loopback it is redirected; by relay it asks 127.0.0.1, too, where `redirect = false`. One
more port is published by the daemon's API, with two daemons in turns. The daemon starts anew from the signal that
ends it until the next one serves, compared with a limit, too; meanwhile a neighbour and a process on the host connect
to a published port, and none may fail.""",
)


@dataclass(frozen=True)
class Row:
    """One row.  `format_as` prints its figure; `max_rounds` is for rows that are too long to repeat often.

    `reference` is a contender's name; or that of what the measure itself sets beside gangway.  `also` names a contender
    to which there is a ratio, too, without a promise.  `road` names whose setup gangway has in a chapter where its
    clients come by several.
    """

    key: str
    title: str
    format_as: Callable[[float], str]
    at_least: float
    aim: float
    contenders: tuple[str, ...] = _ALL
    less_is_better: bool = False
    max_rounds: int | None = None
    chapter: Chapter = RELAYED
    reference: str = DOCKER_PROXY
    also_compared_with: str = ""
    road: str = ""

    def reaches(self, ratio: float, bound: float) -> bool:
        """Whether a ratio is as good as a bound, or better."""
        return ratio <= bound if self.less_is_better else ratio >= bound

    def worst(self, ratios: list[float]) -> float:
        return max(ratios) if self.less_is_better else min(ratios)


def _cost_row(
    key: str,
    title: str,
    format_as: Callable[[float], str],
    at_least: float,
    aim: float,
    contenders: tuple[str, ...],
    max_rounds: int | None = None,
    chapter: Chapter = RELAYED,
) -> Row:
    return Row(key, title, format_as, at_least, aim, contenders, True, max_rounds, chapter)


def _nat_row(key: str, title: str) -> Row:
    contenders = (SUBJECT, IPTABLES, DIRECT)
    return Row(key, title, per_second, 0.97, 1.0, contenders, chapter=WITHOUT_DOCKER, reference=IPTABLES)


def _redirect_row(key: str, title: str, format_as: Callable[[float], str] = per_second) -> Row:
    return Row(
        key, title, format_as, 0.97, 1.0, _PAIR, chapter=REDIRECTED, reference=DIRECT, also_compared_with=DOCKER_PROXY
    )


def _unrelated_row(key: str, title: str) -> Row:
    reference = "no program attached"
    return Row(key, title, microseconds, 1.02, 1.01, (SUBJECT,), True, chapter=UNRELATED, reference=reference)


def _daemon_cost_row(
    key: str, title: str, format_as: Callable[[float], str], at_most: float, aim: float, reference: str
) -> Row:
    return Row(
        key,
        title,
        format_as,
        at_most,
        aim,
        (SUBJECT,),
        less_is_better=True,
        chapter=WITHOUT_DOCKER,
        reference=reference,
    )


def _all_ports_row(
    key: str,
    title: str,
    format_as: Callable[[float], str],
    at_most: float,
    aim: float,
    reference: str,
    max_rounds: int | None = None,
    road: str = LOOPBACK,
) -> Row:
    contenders = (SUBJECT, DOCKERD_300) if reference == DOCKERD_300 else (SUBJECT,)
    return Row(key, title, format_as, at_most, aim, contenders, True, max_rounds, ALL_PORTS, reference, road=road)


def _last_port_row(road: str, key: str, title: str) -> Row:
    title = f"{title}, {road}"
    return Row(
        f"scale-{road}-{key}",
        title,
        per_second,
        0.95,
        1.0,
        (SUBJECT,),
        False,
        None,
        ALL_PORTS,
        "only that port",
        road=road,
    )


ROWS = (
    Row("rr1", "request/response, 1 connection, 1 byte", per_second, 1.10, 1.3),
    Row("rr64", "request/response, 64 connections", per_second, 1.0, 1.3),
    Row("crr16", "connect + 1 byte + close, 16 at once", per_second, 1.05, 1.3),
    Row("crr-sustained", "the same for 30 s, ordinary TIME_WAIT settings", per_second, 5, 15, max_rounds=2),
    Row("pgbench50", "pgbench -S, 50 clients (transactions)", per_second, 1.10, 1.3),
    Row("pgbench1", "pgbench -S, 1 client (transactions)", per_second, 1.15, 1.3),
    Row("up1", "bulk to the container, 1 connection", bytes_per_second, 1.0, 1.3),
    Row("up8", "bulk to the container, 8 connections", bytes_per_second, 1.0, 1.3),
    Row("down1", "bulk from the container, 1 connection", bytes_per_second, 1.0, 1.3),
    Row("down8", "bulk from the container, 8 connections", bytes_per_second, 1.0, 1.3),
    Row("udp1", "UDP request/response, 1 client", per_second, 1.1, 1.5, _DATAGRAMS),
    Row("udp64", "UDP request/response, 64 clients", per_second, 1.1, 1.5, _DATAGRAMS),
    _cost_row("bulk-cpu", "CPU time for the same bulk transfer, both ways", seconds_per_byte, 1.0, 0.8, _PROXIES),
    _cost_row("udp-memory", "memory (PSS) for each UDP client, 2,000 clients", kibibytes, 0.1, 0.02, _DATAGRAMS[:3]),
    _cost_row("start", "launcher, exec to `0\\n`, relay up", milliseconds, 1.0, 0.6, _PAIR, chapter=IN_DOCKER),
    _cost_row(
        "port-memory",
        "memory (PSS) for each published port, 500 ports",
        kibibytes,
        0.2,
        0.08,
        _PROXIES,
        chapter=IN_DOCKER,
    ),
    _cost_row("docker", "`docker run -p` of 200 ports, and `docker rm -f`", seconds, 1.0, 0.9, _PAIR, 3, IN_DOCKER),
    _cost_row("docker-many-run", "`docker run -p` of 1,000 ports", seconds, 1.0, 0.9, _PAIR, 1, IN_DOCKER),
    _cost_row("docker-many-rm", "`docker rm -f` of it", seconds, 1.0, 0.9, _PAIR, 1, IN_DOCKER),
    _cost_row("docker-many-memory", "memory (PSS) of all its proxies", megabytes, 0.1, 0.08, _PAIR, 1, IN_DOCKER),
    _cost_row("docker-many-threads", "threads of all its proxies", number, 0.2, 0.1, _PAIR, 1, IN_DOCKER),
    _redirect_row("redirect-rr1", "request/response, 1 connection, 1 byte"),
    _redirect_row("redirect-rr64", "request/response, 64 connections"),
    _redirect_row("redirect-crr16", "connect + 1 byte + close, 16 at once"),
    _redirect_row("redirect-up1", "bulk to the container, 1 connection", bytes_per_second),
    _redirect_row("redirect-down1", "bulk from the container, 1 connection", bytes_per_second),
    _redirect_row("redirect-udp1", "UDP request/response, 1 client"),
    _redirect_row("redirect-udp64", "UDP request/response, 64 clients"),
    _unrelated_row("redirect-unpublished", "connect() to a server, with 10,000 other ports published"),
    _unrelated_row("redirect-refused", "connect() where nobody listens, the same"),
    _nat_row("nat-rr1", "request/response, 1 connection, 1 byte"),
    _nat_row("nat-rr64", "request/response, 64 connections"),
    _nat_row("nat-crr16", "connect + 1 byte + close, 16 at once"),
    _daemon_cost_row("publish-10000", "one more port published, with 10,000", milliseconds, 2.0, 1.1, "with none"),
    _daemon_cost_row("publish-command", "the command `gangway publish`", milliseconds, 3.0, 2.5, "`python3 -c pass`"),
    _daemon_cost_row("idle-memory", "memory (PSS) of daemon and relay, idle", megabytes, 1.0, 1.0, "limit"),
    _all_ports_row("scale-publish", "`gangway publish` of every port, tcp and udp", seconds, 0.2, 0.05, DOCKERD_300, 3),
    _all_ports_row("scale-unpublish", "`gangway unpublish` of them", seconds, 0.2, 0.05, DOCKERD_300, 3),
    _all_ports_row("scale-memory", "memory for it, everything", megabytes, 1.0, 0.25, "limit", 3),
    _all_ports_row(
        "scale-one-more",
        "one more port, with 10,000 in 1,000 containers",
        milliseconds,
        1.5,
        1.1,
        "with none",
        2,
        REMOTE,
    ),
    _all_ports_row("scale-restart", "the daemon starts anew with them", seconds, 1.0, 0.5, "limit", 2, REMOTE),
    _last_port_row(REMOTE, "rr64", "request/response, 64 connections"),
    _last_port_row(REMOTE, "crr16", "connect + 1 byte + close, 16 at once"),
    _last_port_row(LOOPBACK, "rr64", "request/response, 64 connections"),
    _last_port_row(LOOPBACK, "crr16", "connect + 1 byte + close, 16 at once"),
    _last_port_row(RELAY, "rr64", "request/response, 64 connections"),
    _last_port_row(RELAY, "crr16", "connect + 1 byte + close, 16 at once"),
    _last_port_row(RELAY, "udp64", "UDP request/response, 64 clients"),
)
