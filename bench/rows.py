"""What is measured, and what is promised: the issue's table as data.

What this file knows: the rows and their bounds.  What it must not know: how a row is measured, or what came out.

A bound is a ratio to docker-proxy in the same round.  Where more is better it must be reached, where less is better it
must not be exceeded.
"""

from collections.abc import Callable
from dataclasses import dataclass

SUBJECT, REFERENCE = "gangway", "docker-proxy"
ALL = (SUBJECT, REFERENCE, "socat", "haproxy", "direct")

_PAIR = (SUBJECT, REFERENCE)
_PROXIES = (SUBJECT, REFERENCE, "socat", "haproxy")
_DATAGRAMS = (SUBJECT, REFERENCE, "socat", "direct")  # haproxy carries no UDP


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


@dataclass(frozen=True)
class Row:
    """One row.  `shown` prints its figure; `most_rounds` is for rows that are too long to repeat often."""

    key: str
    title: str
    shown: Callable[[float], str]
    at_least: float
    aim: float
    contenders: tuple[str, ...] = ALL
    less_is_better: bool = False
    most_rounds: int | None = None

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
)
