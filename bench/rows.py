"""The rows: what is measured, and the bound and the aim of each.

Bounds and aims are ratios of gangway's figure to its reference in the same round: lower limits where more is better,
upper limits where less is better. How a row is measured is in measures.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

SUBJECT, DOCKER_PROXY, IPTABLES, DIRECT = "gangway", "docker-proxy", "iptables", "direct"  # contenders
DOCKERD_300 = "dockerd, 300 ports"
DOCKERD = "dockerd"
REMOTE, LOOPBACK, RELAY = "remote", "loopback", "relay"  # gangway, by the road of its clients

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
    """Format a ratio: with three digits below 0.2 and near 1, where bounds differ by hundredths."""
    return f"{ratio:.3f}" if ratio < 0.2 or 0.95 <= ratio < 1.05 else f"{ratio:.2f}"


@dataclass(frozen=True)
class Chapter:
    """A group of rows with its own table."""

    title: str
    direction: str
    """From where to where traffic flows; the heading of the table's first column."""
    note: str
    """What a reader of the figures needs to know."""


RELAYED = Chapter(
    "The relay in docker-proxy's place",
    "127.0.0.1 → container",
    """\
gangway has `redirect = false` here, because otherwise a client on the host would not use its relay. `direct` is a
client that connects to the container's own address. socat, haproxy and direct have at most three rounds; connections
for 30 s have at most two.""",
)
RELAYED_FROM_AFAR = Chapter(
    "The relay, for clients on another machine",
    "another machine → container",
    """\
No rules lead to the container, so the relay carries everything. The other machine is a namespace that is connected
directly to the host; the client and the container's server each have a core of their own. haproxy has as many threads
as cores. `direct` is the container's own address, routed. socat, haproxy and direct have at most three rounds.""",
)
IN_DOCKER = Chapter(
    "In docker-proxy's place",
    "under dockerd",
    """\
gangway is configured as its users have it: it redirects, and its daemon and relay run; both count in its memory. socat
and haproxy have at most three rounds, docker with 200 ports three, with 1,000 ports one.""",
)
REDIRECTED = Chapter(
    "Loopback: published ports",
    "127.0.0.1 → container",
    """\
gangway is its daemon, with nftables. `direct` connects to the container's own address on the same host, with the same
daemon, network, rules and tracked connections, so that only the redirect differs. The two alternate, 30 times in each
round, with bulk transfers for four times as long. The client and the container's server each have a core of their own.
docker-proxy has a separate host without any rules.""",
)
UNRELATED = Chapter(
    "Loopback: ports that are not published",
    "127.0.0.1 → the host itself",
    """\
gangway's eBPF programs run whenever a process on the machine connects. Only connect() is timed, in batches, each on a
new socket. A refused connect() is the shortest one, so the programs' part of the time is largest there: a program that
only returns costs 2 % of it. One process measures with the programs attached and without, in alternation; no other
process has programs attached meanwhile.""",
)
WITHOUT_DOCKER = Chapter(
    "Without Docker",
    "another machine → container",
    """\
The other machine is a namespace that is connected directly to the host, which routes between it and the container's
bridge; the client and the container's server each have a core of their own. gangway uses nftables. `iptables` is what
an administrator types: forwarding, MASQUERADE for the containers and one DNAT rule; nothing is filtered. `direct` is
the container's own address, routed, without any rules; it has at most three rounds. Publishing another port is timed at
the daemon's API, with two daemons in alternation; the command is timed from start to end, with the daemon running
already, in alternation with a Python that does nothing. Memory is compared with a limit; of a page that is shared with
other programs, PSS counts a share.""",
)

ALL_PORTS = Chapter(
    "All ports at once",
    "ports 1024 to 65000",
    """\
gangway is its daemon, with nftables. All ports are `-p 1024-65000:1024-65000/tcp -p 1024-65000:1024-65000/udp`: 127,954
ports. dockerd's 300 are TCP ports, with docker-proxy. Commands are timed from start to end. gangway's runs with the
daemon running, the container attached and nothing published yet, so that time and memory include the start of the
relay. Memory is the decrease of the machine's available memory (MemAvailable), compared with a limit. Traffic goes to
the last port of 1024-65000, in alternation with another host that has only this port; after half of the time two new
hosts replace them. `loopback` is redirected; `relay` connects to 127.0.0.1, too, with `redirect = false`. Another port
is published by the daemon's API, with two daemons in alternation. The restart is timed from the signal that stops the
daemon until the next one serves, and compared with a limit; meanwhile another machine and a process on the host keep
connecting to a published port, and no connection may fail.""",
)

DOCKER_FRONT = Chapter(
    "Docker's ports without dockerd's rules and proxies",
    "under dockerd",
    """\
gangway is a dockerd with `--iptables=false --ip6tables=false --userland-proxy=false` and gangway's daemon, which reads
dockerd's API; it is compared with the same dockerd as it comes. Times are those of the docker command until the last
port answers another machine, or is refused, less those of a container without ports on the same host. The first answer
is timed from the return of `docker run`, and compared with dockerd's time plus 20 ms. The containers of the loop have 3
ports each, and the loops alternate every 10 containers. Memory (PSS) is the growth of dockerd, and the proxies, or
gangway's daemon and relay. Traffic goes to one of 2,000 ports, in alternation; the client and the container's server
each have a core of their own. dockerd as it comes publishes 2,000 ports once in the whole run.""",
)


@dataclass(frozen=True)
class Row:
    """One row of the results.

    `bound` is the limit that gangway's ratio to the reference has to keep, `aim` the better value to reach. `format_as`
    formats a figure. `max_rounds` is for rows that take too long to repeat often. `reference` is a contender, or a name
    for what the measurement itself compares gangway with. `also_compared_with` is a contender to which the ratio is
    shown, too, without a bound. `road` selects gangway's setup in a chapter where its clients come by several roads.
    """

    key: str
    title: str
    format_as: Callable[[float], str]
    bound: float
    aim: float
    contenders: tuple[str, ...] = _ALL
    less_is_better: bool = False
    max_rounds: int | None = None
    chapter: Chapter = RELAYED
    reference: str = DOCKER_PROXY
    also_compared_with: str = ""
    road: str = ""

    def reaches(self, ratio: float, bound: float) -> bool:
        """True if a ratio is as good as a bound, or better."""
        return ratio <= bound if self.less_is_better else ratio >= bound

    def worst(self, ratios: list[float]) -> float:
        """Return the worst of some ratios."""
        return max(ratios) if self.less_is_better else min(ratios)


def _cost_row(
    key: str,
    title: str,
    format_as: Callable[[float], str],
    bound: float,
    aim: float,
    contenders: tuple[str, ...],
    max_rounds: int | None = None,
    chapter: Chapter = RELAYED,
) -> Row:
    return Row(key, title, format_as, bound, aim, contenders, True, max_rounds, chapter)


def _remote_relay_row(key: str, title: str, bound: float, aim: float) -> Row:
    return Row(f"relay-remote-{key}", title, per_second, bound, aim, chapter=RELAYED_FROM_AFAR)


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
    key: str, title: str, format_as: Callable[[float], str], bound: float, aim: float, reference: str
) -> Row:
    return Row(
        key,
        title,
        format_as,
        bound,
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
    bound: float,
    aim: float,
    reference: str,
    max_rounds: int | None = None,
    road: str = LOOPBACK,
) -> Row:
    contenders = (SUBJECT, DOCKERD_300) if reference == DOCKERD_300 else (SUBJECT,)
    return Row(key, title, format_as, bound, aim, contenders, True, max_rounds, ALL_PORTS, reference, road=road)


def _docker_row(
    key: str,
    title: str,
    format_as: Callable[[float], str],
    bound: float,
    aim: float,
    max_rounds: int = 1,
    reference: str = DOCKERD,
    less_is_better: bool = True,
) -> Row:
    key = f"docker-front-{key}"
    return Row(key, title, format_as, bound, aim, (SUBJECT,), less_is_better, max_rounds, DOCKER_FRONT, reference)


def _docker_traffic_row(key: str, title: str, bound: float, aim: float) -> Row:
    return _docker_row(key, title, per_second, bound, aim, less_is_better=False)


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
    Row("rr1", "request/response, 1 connection, 1 byte", per_second, 1.4, 1.6),
    Row("rr64", "request/response, 64 connections", per_second, 1.25, 1.5),
    Row("rr8-16k", "request/response, 8 connections, 16 KiB each way", per_second, 1.2, 1.4),
    Row("crr16", "connect + 1 byte + close, 16 at once", per_second, 1.3, 1.5),
    Row("crr-sustained", "the same for 30 s, default TIME_WAIT settings", per_second, 10, 30, max_rounds=2),
    Row("pgbench50", "pgbench -S, 50 clients (transactions)", per_second, 1.25, 1.4),
    Row("pgbench1", "pgbench -S, 1 client (transactions)", per_second, 1.5, 1.8),
    Row("up1", "bulk to the container, 1 connection", bytes_per_second, 1.1, 1.5),
    Row("up8", "bulk to the container, 8 connections", bytes_per_second, 1.1, 1.5),
    Row("down1", "bulk from the container, 1 connection", bytes_per_second, 1.1, 1.5),
    Row("down8", "bulk from the container, 8 connections", bytes_per_second, 1.1, 1.5),
    Row("udp1", "UDP request/response, 1 client", per_second, 1.5, 2, _DATAGRAMS),
    Row("udp64", "UDP request/response, 64 clients", per_second, 1.5, 1.8, _DATAGRAMS),
    _cost_row("bulk-cpu", "CPU time for the same bulk transfer, both ways", seconds_per_byte, 0.85, 0.7, _PROXIES),
    *(
        _remote_relay_row(*words)
        for words in (
            ("rr1", "request/response, 1 connection, 1 byte", 1.4, 1.6),
            ("rr64", "request/response, 64 connections", 1.25, 1.5),
            ("rr8-16k", "request/response, 8 connections, 16 KiB each way", 1.2, 1.4),
            ("crr16", "connect + 1 byte + close, 16 at once", 1.3, 1.5),
        )
    ),
    _cost_row("udp-memory", "memory (PSS) per UDP client, 2,000 clients", kibibytes, 0.1, 0.02, _DATAGRAMS[:3]),
    _cost_row("start", "launcher, exec to `0\\n`, daemon running", milliseconds, 0.6, 0.3, _PAIR, chapter=IN_DOCKER),
    _cost_row(
        "port-memory",
        "memory (PSS) per published port, 500 ports",
        kibibytes,
        0.15,
        0.08,
        _PROXIES,
        chapter=IN_DOCKER,
    ),
    _cost_row("docker", "`docker run -p` of 200 ports, and `docker rm -f`", seconds, 1.0, 0.9, _PAIR, 3, IN_DOCKER),
    _cost_row("docker-many-run", "`docker run -p` of 1,000 ports", seconds, 1.0, 0.9, _PAIR, 1, IN_DOCKER),
    _cost_row("docker-many-rm", "`docker rm -f` of it", seconds, 1.0, 0.9, _PAIR, 1, IN_DOCKER),
    _cost_row("docker-many-memory", "memory (PSS) of all its proxies", megabytes, 0.09, 0.05, _PAIR, 1, IN_DOCKER),
    _cost_row("docker-many-threads", "threads of all its proxies", number, 0.2, 0.1, _PAIR, 1, IN_DOCKER),
    _redirect_row("redirect-rr1", "request/response, 1 connection, 1 byte"),
    _redirect_row("redirect-rr64", "request/response, 64 connections"),
    _redirect_row("redirect-crr16", "connect + 1 byte + close, 16 at once"),
    _redirect_row("redirect-up1", "bulk to the container, 1 connection", bytes_per_second),
    _redirect_row("redirect-down1", "bulk from the container, 1 connection", bytes_per_second),
    _redirect_row("redirect-udp1", "UDP request/response, 1 client"),
    _redirect_row("redirect-udp64", "UDP request/response, 64 clients"),
    _unrelated_row("redirect-unpublished", "connect() to a server, with 10,000 other ports published"),
    _unrelated_row("redirect-refused", "connect() to a port without a server, the same"),
    _nat_row("nat-rr1", "request/response, 1 connection, 1 byte"),
    _nat_row("nat-rr64", "request/response, 64 connections"),
    _nat_row("nat-crr16", "connect + 1 byte + close, 16 at once"),
    _daemon_cost_row("publish-10000", "publishing another port, with 10,000", milliseconds, 2.0, 1.1, "with none"),
    _daemon_cost_row("publish-command", "the command `gangway publish`", milliseconds, 3.0, 2.5, "`python3 -c pass`"),
    _daemon_cost_row("idle-memory", "memory (PSS) of daemon and relay, idle", megabytes, 1.0, 1.0, "limit"),
    _all_ports_row("scale-publish", "`gangway publish` of all ports, tcp and udp", seconds, 0.2, 0.05, DOCKERD_300, 3),
    _all_ports_row("scale-unpublish", "`gangway unpublish` of them", seconds, 0.2, 0.05, DOCKERD_300, 3),
    _all_ports_row("scale-memory", "memory for all of it", megabytes, 1.0, 0.25, "limit", 3),
    _all_ports_row(
        "scale-one-more",
        "publishing another port, with 10,000 in 1,000 containers",
        milliseconds,
        1.5,
        1.1,
        "with none",
        2,
        REMOTE,
    ),
    _all_ports_row("scale-restart", "restart of the daemon with them", seconds, 1.0, 0.5, "limit", 2, REMOTE),
    _last_port_row(REMOTE, "rr64", "request/response, 64 connections"),
    _last_port_row(REMOTE, "crr16", "connect + 1 byte + close, 16 at once"),
    _last_port_row(LOOPBACK, "rr64", "request/response, 64 connections"),
    _last_port_row(LOOPBACK, "crr16", "connect + 1 byte + close, 16 at once"),
    _last_port_row(RELAY, "rr64", "request/response, 64 connections"),
    _last_port_row(RELAY, "crr16", "connect + 1 byte + close, 16 at once"),
    _last_port_row(RELAY, "udp64", "UDP request/response, 64 clients"),
    _docker_row("run-300", "`docker run -p` of 300 ports", seconds, 0.1, 0.03, 3),
    _docker_row("rm-300", "`docker rm -f` of it", seconds, 0.1, 0.03, 3),
    _docker_row("run-2000", "`docker run -p` of 2,000 ports", seconds, 0.05, 0.01),
    _docker_row("rm-2000", "`docker rm -f` of it", seconds, 0.05, 0.01),
    _docker_row("memory-2000", "memory (PSS) for 2,000 ports", megabytes, 0.02, 0.005),
    _docker_row("containers-100", "100 containers with 3 ports each, in a loop", seconds, 0.8, 0.6, 2),
    _docker_row(
        "first-answer",
        "from `docker run`'s return to the first answer",
        milliseconds,
        1.0,
        0.5,
        3,
        f"{DOCKERD} + 20 ms",
    ),
    _docker_traffic_row("remote-rr64", "request/response, 64 connections, another machine", 1.0, 1.1),
    _docker_traffic_row("remote-crr16", "connect + 1 byte + close, 16 at once, another machine", 1.0, 1.1),
    _docker_traffic_row("loopback-rr64", "request/response, 64 connections, 127.0.0.1", 1.8, 2.2),
    _docker_traffic_row("loopback-crr16", "connect + 1 byte + close, 16 at once, 127.0.0.1", 1.8, 2.2),
)
