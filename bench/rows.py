"""The rows: what is measured, and the bound and the aim of each.

Bounds and aims are ratios of gangway's figure to its reference in the same round: lower limits where more is better,
upper limits where less is better. How a row is measured is in measures.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench.chapters import (
    ALL_PORTS,
    DOCKER_FRONT,
    IN_DOCKER,
    MANY_IN_DOCKER,
    REDIRECTED,
    RELAYED,
    RELAYED_FROM_AFAR,
    RELAYED_IPV6,
    UNRELATED,
    WITHOUT_DOCKER,
    Chapter,
)

SUBJECT, DOCKER_PROXY, HAPROXY = "gangway", "docker-proxy", "haproxy"  # contenders
IPTABLES, DIRECT = "iptables", "direct"
DOCKERD_300 = "dockerd, 300 ports"
DOCKERD = "dockerd"
REMOTE, LOOPBACK, RELAY = "remote", "loopback", "relay"  # gangway, by the road of its clients

_PAIR = (SUBJECT, DOCKER_PROXY)
_THREE = (*_PAIR, HAPROXY)
_PROXIES = (*_PAIR, "socat", HAPROXY)
_DATAGRAMS = (*_PAIR, "socat", DIRECT)  # haproxy carries no UDP
_ALL = (*_PROXIES, DIRECT)
_ALTERNATING_ROUNDS = 2  # of a row whose turn compares two things many times, in alternation


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
class Row:
    """One row of the results.

    `bound` is the limit that gangway's ratio to the reference has to keep, `aim` the better value to reach. `format_as`
    formats a figure. `max_rounds` is for rows that take too long to repeat often. `reference` is a contender, or a name
    for what the measurement itself compares gangway with. `also_compared_with` is a contender to which the ratio is
    shown, too, and `also_bound` the limit for that ratio, if there is one. `road` selects gangway's setup in a chapter
    where its clients come by several roads.
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
    also_bound: float | None = None
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


def _relay_row(
    key: str,
    title: str,
    format_as: Callable[[float], str],
    bound: float,
    aim: float,
    haproxy_bound: float,
    contenders: tuple[str, ...] = _ALL,
    less_is_better: bool = False,
    chapter: Chapter = RELAYED,
) -> Row:
    """Return a row that has a bound for haproxy, too."""
    return Row(
        key,
        title,
        format_as,
        bound,
        aim,
        contenders,
        less_is_better,
        chapter=chapter,
        also_compared_with=HAPROXY,
        also_bound=haproxy_bound,
    )


def _request_rows(chapter: Chapter, prefix: str = "") -> tuple[Row, ...]:
    """Return the rows of short messages and short connections, which exist for clients here and elsewhere."""
    return tuple(
        _relay_row(prefix + key, title, per_second, bound, aim, haproxy_bound, chapter=chapter)
        for key, title, bound, aim, haproxy_bound in (
            ("rr1", "request/response, 1 connection, 1 byte", 1.4, 1.6, 1.1),
            ("rr64", "request/response, 64 connections", 1.25, 1.5, 1.0),
            ("rr8-16k", "request/response, 8 connections, 16 KiB each way", 1.2, 1.4, 1.0),
            ("crr16", "connect + 1 byte + close, 16 at once", 1.3, 1.5, 1.0),
        )
    )


def _request_cost_rows(chapter: Chapter, prefix: str = "") -> tuple[Row, ...]:
    """Return what else is measured in the turns of the request/response rows."""
    latency, cpu = "99th percentile of the latency, 64 connections", "CPU time for 100,000 request/responses"
    return (
        _relay_row(f"{prefix}rr64-p99", latency, milliseconds, 0.8, 0.6, 1.0, _ALL, True, chapter),
        *(
            _cost_row(f"{prefix}{key}-cpu", f"{cpu}, {title}", seconds, 0.85, 0.7, _PROXIES, chapter=chapter)
            for key, title in (("rr1", "1 connection"), ("rr64", "64 connections"))
        ),
    )


def _nat_row(key: str, title: str) -> Row:
    contenders = (SUBJECT, IPTABLES, DIRECT)
    return Row(key, title, per_second, 0.97, 1.0, contenders, chapter=WITHOUT_DOCKER, reference=IPTABLES)


def _redirect_row(key: str, title: str, format_as: Callable[[float], str] = per_second) -> Row:
    return Row(
        key,
        title,
        format_as,
        0.97,
        1.0,
        _PAIR,
        max_rounds=_ALTERNATING_ROUNDS,
        chapter=REDIRECTED,
        reference=DIRECT,
        also_compared_with=DOCKER_PROXY,
    )


def _unrelated_row(key: str, title: str) -> Row:
    reference = "no program attached"
    return Row(key, title, microseconds, 1.02, 1.01, (SUBJECT,), True, _ALTERNATING_ROUNDS, UNRELATED, reference)


def _daemon_cost_row(
    key: str, title: str, format_as: Callable[[float], str], bound: float, aim: float, reference: str
) -> Row:
    return Row(key, title, format_as, bound, aim, (SUBJECT,), True, _ALTERNATING_ROUNDS, WITHOUT_DOCKER, reference)


def _all_ports_row(
    key: str,
    title: str,
    format_as: Callable[[float], str],
    bound: float,
    aim: float,
    reference: str,
    road: str = LOOPBACK,
) -> Row:
    contenders = (SUBJECT, DOCKERD_300) if reference == DOCKERD_300 else (SUBJECT,)
    return Row(key, title, format_as, bound, aim, contenders, True, 1, ALL_PORTS, reference, road=road)


def _many_row(
    key: str, title: str, format_as: Callable[[float], str], bound: float, aim: float, max_rounds: int = 1
) -> Row:
    return _cost_row(key, title, format_as, bound, aim, _PAIR, max_rounds, MANY_IN_DOCKER)


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
        1,
        ALL_PORTS,
        "only that port",
        road=road,
    )


ROWS = (
    *_request_rows(RELAYED),
    Row("crr-sustained", "the same for 30 s, default TIME_WAIT settings", per_second, 10, 30, _THREE, max_rounds=1),
    _relay_row("pgbench50", "pgbench -S, 50 clients (transactions)", per_second, 1.25, 1.4, 1.0),
    _relay_row("pgbench1", "pgbench -S, 1 client (transactions)", per_second, 1.5, 1.8, 1.0),
    _relay_row("up1", "bulk to the container, 1 connection", bytes_per_second, 1.1, 1.5, 1.1),
    _relay_row("up8", "bulk to the container, 8 connections", bytes_per_second, 1.1, 1.5, 1.1),
    _relay_row("down1", "bulk from the container, 1 connection", bytes_per_second, 1.1, 1.5, 1.1),
    _relay_row("down8", "bulk from the container, 8 connections", bytes_per_second, 1.1, 1.5, 1.1),
    Row("udp1", "UDP request/response, 1 client", per_second, 1.5, 2, _DATAGRAMS),
    Row("udp64", "UDP request/response, 64 clients", per_second, 1.5, 1.8, _DATAGRAMS),
    *_request_cost_rows(RELAYED),
    _cost_row("bulk-cpu", "CPU time for the same bulk transfer, both ways", seconds_per_byte, 0.85, 0.7, _PROXIES),
    _cost_row("udp-memory", "memory (PSS) per UDP client, 2,000 clients", kibibytes, 0.1, 0.02, _DATAGRAMS[:3], 1),
    _cost_row("idle-connections", "memory (PSS) per idle connection, 9,500 of them", kibibytes, 0.1, 0.03, _THREE, 1),
    *_request_rows(RELAYED_FROM_AFAR, "relay-remote-"),
    *_request_cost_rows(RELAYED_FROM_AFAR, "relay-remote-"),
    _relay_row(
        "relay-ipv6-rr64",
        "request/response, 64 connections",
        per_second,
        1.25,
        1.5,
        1.0,
        _THREE,
        chapter=RELAYED_IPV6,
    ),
    _relay_row(
        "relay-ipv6-crr16",
        "connect + 1 byte + close, 16 at once",
        per_second,
        1.3,
        1.5,
        1.0,
        _THREE,
        chapter=RELAYED_IPV6,
    ),
    _cost_row("start", "launcher, exec to `0\\n`, daemon running", milliseconds, 0.6, 0.3, _PAIR, chapter=IN_DOCKER),
    _cost_row(
        "port-memory",
        "memory (PSS) per published port, 500 ports",
        kibibytes,
        0.15,
        0.08,
        _PROXIES,
        1,
        IN_DOCKER,
    ),
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
    _daemon_cost_row("idle-relay-memory", "memory (PSS) of the relay alone, idle", megabytes, 1.0, 1.0, "limit"),
    _all_ports_row("scale-publish", "`gangway publish` of all ports, tcp and udp", seconds, 0.2, 0.05, DOCKERD_300),
    _all_ports_row("scale-unpublish", "`gangway unpublish` of them", seconds, 0.2, 0.05, DOCKERD_300),
    _all_ports_row("scale-memory", "memory for all of it", megabytes, 1.0, 0.25, "limit"),
    _all_ports_row(
        "scale-one-more",
        "publishing another port, with 10,000 in 1,000 containers",
        milliseconds,
        1.5,
        1.1,
        "with none",
        REMOTE,
    ),
    _all_ports_row("scale-restart", "restart of the daemon with them", seconds, 1.0, 0.5, "limit", REMOTE),
    _last_port_row(REMOTE, "rr64", "request/response, 64 connections"),
    _last_port_row(REMOTE, "crr16", "connect + 1 byte + close, 16 at once"),
    _last_port_row(LOOPBACK, "rr64", "request/response, 64 connections"),
    _last_port_row(LOOPBACK, "crr16", "connect + 1 byte + close, 16 at once"),
    _last_port_row(RELAY, "rr64", "request/response, 64 connections"),
    _last_port_row(RELAY, "crr16", "connect + 1 byte + close, 16 at once"),
    _last_port_row(RELAY, "udp64", "UDP request/response, 64 clients"),
    _many_row("docker", "`docker run -p` of 200 ports, and `docker rm -f`", seconds, 1.0, 0.9, 2),
    _many_row("docker-many-run", "`docker run -p` of 1,000 ports", seconds, 1.0, 0.9),
    _many_row("docker-many-rm", "`docker rm -f` of it", seconds, 1.0, 0.9),
    _many_row("docker-many-memory", "memory (PSS) of all its proxies", megabytes, 0.09, 0.05),
    _many_row("docker-many-threads", "threads of all its proxies", number, 0.2, 0.1),
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

DOCKER_ROWS = tuple(row for row in ROWS if row.chapter in (MANY_IN_DOCKER, DOCKER_FRONT))
"""Those that have a run of their own: they need real dockerds, and take as long as all others."""
