"""Traffic to the last port of a range, compared with the same port when nothing else is published.

Two hosts are measured in short, alternating slices: one with the range published, one with that port only. After half
of the slices two new hosts replace them, created in the opposite order, so that the age of a host affects both figures
equally.
"""

from collections.abc import Iterator
from statistics import mean

from bench.daemon import DaemonSetup
from bench.publishing import FIRST, LAST
from bench.turn import WARM_UP_S, Turn, check_road, daemon_setup, widen_port_range

SLICES = 15  # with each pair of hosts
_PROTOCOLS = {"rr": "tcp", "crr": "tcp", "udp": "udp"}  # by mode


def last_port(mode: str, clients: int, turn: Turn) -> tuple[float, float]:
    """Return operations per second to the last port of the range, and to the only port."""
    set_up = turn.setup.contender.set_up
    with set_up() as second:
        pairs = list(_slices(mode, clients, turn, daemon_setup(turn.setup), daemon_setup(second)))
    with set_up() as first, set_up() as second:
        pairs += _slices(mode, clients, turn, daemon_setup(second), daemon_setup(first))
    wide, narrow = zip(*pairs, strict=True)
    return mean(wide), mean(narrow)


def _slices(
    mode: str, clients: int, turn: Turn, wide: DaemonSetup, narrow: DaemonSetup
) -> Iterator[tuple[float, float]]:
    """Yield the rates of each pair of slices."""
    protocol, slice_s = _PROTOCOLS[mode], turn.seconds / SLICES
    for setup, first in (wide, FIRST), (narrow, LAST):
        turn.load.serve(setup, LAST)
        setup.request_ports("/mappings", [f"{first}-{LAST}:{first}-{LAST}/{protocol}"])
        widen_port_range(setup)
        turn.load.run(setup, mode, clients, WARM_UP_S, LAST)
    for number in range(SLICES):
        order = (wide, narrow)[:: -1 if number % 2 else 1]
        rates = {setup: turn.load.run(setup, mode, clients, slice_s, LAST).rate for setup in order}
        yield rates[wide], rates[narrow]
    for setup in (wide, narrow):
        check_road(setup)
