"""The addresses of the host at which nothing is published: the setting `exclude`."""

import re
from collections.abc import Iterable

from gangway.errors import InvalidRequest
from gangway.model import Address, is_interface_name, parse_address, without_zone

_NUMBERS = re.compile(r"[0-9]+(\.[0-9]+)+")


def parse_exclusion(text: str) -> Address | str:
    """Read what is excluded from publishing: an address of the host, or the name of an interface, as it is."""
    try:
        address = parse_address(text)
    except InvalidRequest:
        if is_interface_name(text) and _NUMBERS.fullmatch(text) is None:  # 10.0.0.256 is a mistyped address
            return text
    else:
        if not (address.is_unspecified or address.is_multicast or address != without_zone(address)):
            return address
    raise InvalidRequest(f"invalid exclude {text!r}: use an address of this host, without a zone, or an interface")


def excluded_addresses(exclude: Iterable[str], found: Iterable[tuple[str, Address]]) -> frozenset[Address]:
    """Return the addresses at which nothing is published; `found` are the host's, each with its interface's name.

    An address that is named is excluded even while it is not the host's.
    """
    named = frozenset(map(parse_exclusion, exclude))
    addresses = {one for one in named if not isinstance(one, str)}
    return frozenset(addresses | {without_zone(address) for interface, address in found if interface in named})
