"""What a measure has at hand during a contender's turn, and what several measures do with it.

What this file knows: setups, the client's settings.  What it must not know: what is measured.
"""

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
"""The contender's figure, and the reference's after it where that has no turn of its own; or why there is none."""


@dataclass(frozen=True)
class Turn:
    """What a measurement has at hand.  `quick` shortens what `seconds` does not rule; `curve` takes what is found
    beside a row's figures."""

    setup: Setup
    load: Load
    database: Callable[[], Database]
    curve: Curve
    seconds: float
    quick: bool


def widen_port_range(setup: Setup) -> None:
    """The client may open as many connections as it likes."""
    setup.client.space.sysctl("net.ipv4.ip_local_port_range", "10000 65535")
    setup.client.space.sysctl("net.ipv4.tcp_tw_reuse", 1)


def daemon_setup(setup: Setup) -> DaemonSetup:
    assert isinstance(setup, DaemonSetup)
    return setup


def check_road(setup: DaemonSetup) -> None:
    """CannotCarry: the client's sockets were redirected and are not to be, or the reverse.  Whoever carries them
    instead serves as well, at another speed."""
    expected = setup.redirects and setup.client.space is setup.host
    if any(mapping["redirected"] for mapping in setup.gangway.json("ls")) != expected:
        what = "no socket was redirected" if expected else "sockets were redirected"
        raise CannotCarry(f"{what}: see the daemon's log, or gangway explain")


def medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    firsts, seconds = zip(*pairs, strict=True)
    return median(firsts), median(seconds)
