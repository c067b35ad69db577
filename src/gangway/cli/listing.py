"""What `ls` and `network ls` print: which rows, in which order, and which fields of each.

A table has the columns that fit 80 characters, or with --wide all; -q and --format print a line of fields for each row.
A field is text, so that `{port:>5}` pads it.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import lru_cache
from ipaddress import ip_address
from string import Formatter
from typing import Any, NamedTuple

from gangway.cli.tables import print_table
from gangway.cli.views import ORIGINS
from gangway.inet import PROTOCOLS, format_host, pack_address

ROADS = "nat", "redirect", "relay", "routed", "blocked"
SOURCES = "api", "declared", "lease", "docker"
_SHORT = dict(zip(ORIGINS, ("lo", *ORIGINS[1:]), strict=True))

Answer = dict[str, Any]
Field = tuple[str, Callable[[Answer], str]]
"""What a field is, and how it is found in an answer of the API."""
Filter = tuple[str, Any]
Routes = tuple[tuple[str, str], ...]
"""Which origin's clients take which road."""
Test = tuple[str, Callable[[str], str], Callable[[Answer, Any], bool]]
"""What a filter's value is, how it is checked and normalized, and whether an answer has it."""


class Listing(NamedTuple):
    """A kind of listing."""

    fields: dict[str, Field]
    columns: tuple[str, ...]  # of the table, by the fields' names
    wide: tuple[str, ...]  # with --wide
    filters: dict[str, Test]
    order: Callable[[Answer], Any]  # the key by which answers are sorted


def parse_format(text: str, listing: Listing) -> str:
    """Return a format in which `\\t` and `\\n` are replaced.  ArgumentTypeError: it is invalid."""
    text = text.replace(r"\t", "\t").replace(r"\n", "\n")
    try:
        found = _fields(text)
        unknown = [name for name in found if name not in listing.fields]
        if unknown:
            raise ArgumentTypeError(f"unknown field {{{unknown[0]}}}: use {', '.join(listing.fields)}")
        text.format_map(dict.fromkeys(found, ""))
    except (ValueError, KeyError, IndexError) as error:
        raise ArgumentTypeError(f"invalid format {text!r}: {error}") from None
    return text


def parse_filter(text: str, listing: Listing) -> Filter:
    """Read KEY=VALUE.  ArgumentTypeError: there is no such key, or it has no such value."""
    key, equals, value = text.partition("=")
    if not equals or key not in listing.filters:
        raise ArgumentTypeError(f"invalid filter {text!r}: use KEY=VALUE; the keys are {', '.join(listing.filters)}")
    return key, listing.filters[key][1](value)


def select(listing: Listing, answers: Iterable[Answer], filters: Sequence[Filter]) -> list[Answer]:
    """Return the answers that have, for each key of the filters, one of its values; sorted."""
    wanted: dict[str, list[Any]] = {}
    for key, value in filters:
        wanted.setdefault(key, []).append(value)
    tests = [(listing.filters[key][2], values) for key, values in wanted.items()]
    found = (one for one in answers if all(any(test(one, value) for value in values) for test, values in tests))
    return sorted(found, key=listing.order)


def show(listing: Listing, answers: Sequence[Answer], wide: bool = False, template: str | None = None) -> None:
    """Print answers: as a line after the template each, or as a table."""
    if template is not None:
        fields = {name: listing.fields[name][1] for name in _fields(template)}
        lines = (template.format_map({name: text(one) for name, text in fields.items()}) for one in answers)
        return print("".join(f"{line}\n" for line in lines), end="")
    names = listing.wide if wide else listing.columns
    texts = [listing.fields[name][1] for name in names]
    return print_table([name.upper() for name in names], ([text(one) or "-" for text in texts] for one in answers))


def _fields(template: str) -> list[str]:
    """Return the names of a format's fields.  ValueError: it is not a format."""
    found = []
    for _, name, layout, conversion in Formatter().parse(template):
        if (layout and "{" in layout) or conversion:
            raise ValueError("a field has a name and a width only, as in {port:>5}")
        if name is not None:
            found.append(name)
    return found


def _routes(mapping: Answer) -> Routes:
    return tuple((route["origin"], route["road"]) for route in mapping["routes"])


@lru_cache(1024)  # most mappings have the routes of others
def roads(routes: Routes, origin: str) -> str:
    """Return the road of an origin's clients; two, if those on the container's own network take another one."""
    return ", ".join(dict.fromkeys(road for one, road in routes if one == origin))


@lru_cache(1024)
def roads_in_short(routes: Routes, is_restricted: bool) -> str:
    """Return the road of most kinds of clients, and then those of the others: `nat; lo redirect`."""
    found = {origin: roads(routes, origin).replace(", ", "/") for origin in ORIGINS}
    most = max(Counter(found.values()).items(), key=lambda item: (item[1], item[0] == found["remote"]))[0]
    others: dict[str, list[str]] = {}
    for origin, road in found.items():
        if road != most:
            others.setdefault(road, []).append(_SHORT[origin])
    said = [f"{','.join(origins)} {road}" for road, origins in others.items()]
    if most == "blocked" and said:
        said[-1] += " only"
    else:
        said = [most, *said]
    return "; ".join([*said, *(["restricted"] if is_restricted else [])])


def _short_roads(mapping: Answer) -> str:
    if not mapping["routes"]:
        return f"({mapping['note']})"
    return roads_in_short(_routes(mapping), bool(mapping["from"]))


def _published(mapping: Answer) -> str:
    return f"{format_host(mapping['host_address'])}:{mapping['host_ports'] or 'any'}/{mapping['protocol']}"


def _target(mapping: Answer) -> str:
    address = mapping["container_address"]
    ports = str(mapping["container_ports"])
    return f"{format_host(address)}:{ports}" if address else f"{ports} ({mapping['note']})"


def _as_option(mapping: Answer) -> str:
    """Return a mapping as it is written after -p."""
    host = f"{format_host(mapping['host_address'])}:{mapping['host_ports']}"
    return f"{host}:{mapping['container_ports']}/{mapping['protocol']}"


def _key(name: str) -> Callable[[Answer], str]:
    return lambda answer: str(answer[name])


def _joined(name: str) -> Callable[[Answer], str]:
    return lambda answer: ", ".join(answer[name])


def _roads_of(origin: str) -> Callable[[Answer], str]:
    return lambda mapping: roads(_routes(mapping), origin)


def _mapping_order(mapping: Answer) -> Any:
    address, port = mapping["host_address"], mapping["host_ports"].partition("-")[0]
    return ":" in address, pack_address(address), int(port or 0), mapping["protocol"]


def _policy(network: Answer) -> Iterator[str]:
    if network["internal"]:
        yield "internal"
    elif not network["masquerade"]:
        yield "no masquerade"
    yield from (f"IPv{family} routed" for family in network["routed"])
    if not network["icc"]:
        yield "no icc"
    if network["mtu"] != 1500:
        yield f"mtu {network['mtu']}"


def _any_text(value: str) -> str:
    if not value:
        raise ArgumentTypeError("the value of a filter cannot be empty")
    return value


def _one_of(*values: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in values:
            raise ArgumentTypeError(f"invalid value {value!r}: use {', '.join(values)}")
        return value

    return check


def _address(value: str) -> str:
    try:
        return str(ip_address(value.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise ArgumentTypeError(f"{value!r} is not an IP address") from None


def _port(value: str) -> str:
    if not (value.isascii() and value.isdecimal() and 1 <= int(value) <= 65535):
        raise ArgumentTypeError(f"{value!r} is not a port (1 to 65535)")
    return value


def _has_port(mapping: Answer, port: str) -> bool:
    first, _, last = mapping["host_ports"].partition("-")
    return bool(first) and int(first) <= int(port) <= int(last or first)


def _is_member(mapping: Answer, members: Container[tuple[str, str]]) -> bool:
    """True if a mapping's container and address are among a network's."""
    return (mapping["container"], mapping["container_address"]) in members


MAPPINGS = Listing(
    fields={
        "published": ("host address, host port or range, and protocol", _published),
        "container": ("the container's name", _key("container")),
        "port": ("the container's port or range", _key("container_ports")),
        "source": (f"who publishes it: {', '.join(SOURCES)}", _key("source")),
        "roads": (
            "the road of most clients, then of others, by origin (lo: loopback); restricted: see the field from",
            _short_roads,
        ),
        "target": ("the container's address, and its port or range", _target),
        **{origin: (f"the road of {origin} clients", _roads_of(origin)) for origin in ORIGINS[:-1]},
        "containers": ("the road of clients in containers", _roads_of("container")),
        "from": ("the subnets of admitted clients; empty: all", _joined("from")),
        "relayed": (
            "connections that the relay has carried; of UDP, clients",
            lambda mapping: "{connections} ({active} now)".format_map(mapping["relayed"]),
        ),
        "protocol": ("tcp, udp or sctp", _key("protocol")),
        "host_address": ("the host address", _key("host_address")),
        "host_ports": ("the host port or range", _key("host_ports")),
        "container_address": ("the container's address", _key("container_address")),
        "ports": ("the mapping as it is written after -p", _as_option),
    },
    columns=("published", "container", "port", "source", "roads"),
    wide=("published", "container", "target", "source", *ORIGINS[:-1], "containers", "from", "relayed"),
    filters={
        "address": ("the host address", _address, lambda mapping, value: mapping["host_address"] == value),
        "container": ("the container's name", _any_text, lambda mapping, value: mapping["container"] == value),
        "network": ("the container's network", _any_text, _is_member),
        "port": ("a host port, also one of a range", _port, _has_port),
        "protocol": ("tcp, udp or sctp", _one_of(*PROTOCOLS), lambda mapping, value: mapping["protocol"] == value),
        "road": (
            f"the road of some clients: {', '.join(ROADS)}",
            _one_of(*ROADS),
            lambda mapping, value: any(route["road"] == value for route in mapping["routes"]),
        ),
        "source": (", ".join(SOURCES), _one_of(*SOURCES), lambda mapping, value: mapping["source"] == value),
    },
    order=_mapping_order,
)
NETWORKS = Listing(
    fields={
        "name": ("the network's name", _key("name")),
        "bridge": ("the bridge's name", _key("bridge")),
        "subnets": ("the subnets", _joined("subnets")),
        "containers": ("how many containers are attached", lambda network: str(len(network["endpoints"]))),
        "policy": ("what is unusual about it", lambda network: ", ".join(_policy(network))),
        "gateways": ("the host's addresses", _joined("gateways")),
        "mtu": ("in bytes", _key("mtu")),
    },
    columns=("name", "bridge", "subnets", "containers", "policy"),
    wide=("name", "bridge", "subnets", "gateways", "mtu", "containers", "policy"),
    filters={
        "container": (
            "the name of a container that is attached",
            _any_text,
            lambda network, value: any(one["container"] == value for one in network["endpoints"]),
        ),
        "name": ("the network's name", _any_text, lambda network, value: network["name"] == value),
    },
    order=_key("name"),
)
