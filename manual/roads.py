"""The picture of the roads: which client reaches a container by which road, as a daemon explains it.

The container has IPv4 only, so that its IPv6 clients show the third road.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lab.gangwayd import Gangway
from lab.netns import Namespace, Neighbour
from manual import svg

_PORT = 8000
_CONTAINER = "172.30.0.2:80"
_ROADS = {
    "redirect": ("#1b6e5a", "eBPF aims the socket at the", "container when it connects"),
    "nat": ("#2f6db3", "netfilter translates the", "address: one map for all ports"),
    "relay": ("#b3622f", "a process without privileges", "copies, in C"),
}
_WIDTH, _ROW, _TOP = 860, 46, 58
_CLIENTS, _STATION, _STATION_WIDTH, _END = 22, 356, 230, 706


class Client(NamedTuple):
    """A kind of client, the address that it connects to, its road, and whose address the container sees."""

    who: str
    at: str
    road: str
    seen: str


def explained() -> list[Client]:
    """Return the clients of a port that a daemon in a lab publishes, by road.  Needs root."""
    with Namespace("host") as host, Neighbour(host) as other, Namespace("web") as web, Gangway(host) as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        gangway("attach", web.name, "--network", "web")
        gangway("publish", web.name, "-p", f"0.0.0.0:{_PORT}:80", "-p", f"[::]:{_PORT}:80")
        found = []
        for address in ("127.0.0.1", "::1", other.host4, other.host6):
            at = f"[{address}]:{_PORT}" if ":" in address else f"{address}:{_PORT}"
            for route in gangway.json("explain", at)[0]["mapping"]["routes"]:
                found.append(Client(_name(route), at, route["road"], route["seen_as"]))
    order = list(_ROADS)
    return sorted((one for one in found if one.road in order), key=lambda one: order.index(one.road))


def draw(clients: Sequence[Client]) -> str:
    """Return the picture."""
    height = _TOP + _ROW * len(clients) + 16
    middle = _TOP + _ROW * len(clients) / 2
    parts = [
        svg.text(_CLIENTS, 30, "client, and the address that it connects to", colour=svg.FAINT),
        svg.box(_STATION - 24, 12, _STATION_WIDTH + 48, height - 24, "#f6f8f9", "#c9d1d7", 10),
        svg.text(_STATION + _STATION_WIDTH / 2, 34, "the host: the road", colour=svg.FAINT, anchor="middle"),
        svg.box(_END, middle - 34, 132, 68, "#eef1f4", "#8d98a1"),
        svg.text(_END + 66, middle - 4, "container", anchor="middle", bold=True),
        svg.text(_END + 66, middle + 16, _CONTAINER, anchor="middle"),
    ]
    for road, (colour, *what) in _ROADS.items():
        rows = [row for row, one in enumerate(clients) if one.road == road]
        if not rows:
            continue
        y = _TOP + _ROW * (rows[0] + rows[-1] + 1) / 2
        parts += [svg.curve(_CLIENTS + 250, _TOP + _ROW * (row + 0.5), _STATION, y, colour) for row in rows]
        parts += [
            svg.curve(_STATION + _STATION_WIDTH, y, _END, middle, colour, 1 + 1.5 * len(rows) ** 0.5),
            svg.box(_STATION, y - 33, _STATION_WIDTH, 66, svg.PAPER, colour),
            svg.text(_STATION + 14, y - 12, road, colour=colour, size=15, bold=True),
            svg.text(_STATION + 14, y + 7, what[0], size=12),
            svg.text(_STATION + 14, y + 23, what[1], size=12),
        ]
    for row, one in enumerate(clients):
        y = _TOP + _ROW * row
        parts.append(svg.text(_CLIENTS, y + 20, one.who, bold=True))
        parts.append(svg.text(_CLIENTS, y + 36, f"{one.at}, seen as {_seen(one)}", colour=svg.FAINT, size=12))
    return svg.page(_WIDTH, height, "the road of each kind of client to a container's port", parts)


def _name(route: dict[str, object]) -> str:
    if route["origin"] == "container":
        return f"a container on {'the same' if route['neighbour'] else 'another'} network"
    return "another machine" if route["origin"] == "remote" else "a process on the host"


def _seen(client: Client) -> str:
    if client.seen == "gateway":
        return "the gateway"
    return "the host" if client.who == "a process on the host" else "itself"
