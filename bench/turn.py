"""What a measurement uses in a contender's turn, and functions that several measurements share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.curve import Curve
from bench.daemon import DaemonSetup
from bench.database import Database
from bench.errors import CannotCarry
from bench.setup import Setup
from bench.traffic import Load

WARM_UP_S = 1.0

Outcome = tuple[float, ...] | CannotCarry
"""The contender's figure, followed by the reference's if that has no turn of its own; or why there is no figure."""


@dataclass(frozen=True)
class Turn:
    """What a measurement uses. `quick` shortens what does not depend on `seconds`; points are added to `curve`."""

    setup: Setup
    load: Load
    database: Callable[[], Database]
    curve: Curve
    seconds: float
    quick: bool


def widen_port_range(setup: Setup) -> None:
    """Give the client enough local ports for any number of connections."""
    setup.client.space.sysctl("net.ipv4.ip_local_port_range", "10000 65535")
    setup.client.space.sysctl("net.ipv4.tcp_tw_reuse", 1)


def daemon_setup(setup: Setup) -> DaemonSetup:
    """Return the setup of a contender that is gangway's daemon."""
    assert isinstance(setup, DaemonSetup)
    return setup


def check_road(setup: DaemonSetup) -> None:
    """Check that the client's sockets were redirected exactly if they should be: another road has another speed.

    CannotCarry: it was another road.
    """
    expected = setup.redirects and setup.client.space is setup.host
    if any(mapping["redirected"] for mapping in setup.gangway.json("ls")) != expected:
        problem = "no socket was redirected" if expected else "sockets were redirected"
        raise CannotCarry(f"{problem}: see the daemon's log, or `gangway explain`")


def medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the median of the first figures and that of the second ones."""
    firsts, seconds = zip(*pairs, strict=True)
    return median(firsts), median(seconds)
