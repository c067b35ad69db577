"""Numbers of protocols and families; addresses as 16 bytes, and as text before a port.  Every part may import this."""

from functools import lru_cache
from ipaddress import ip_address

IPPROTO_SCTP = 132
"""Python's socket module may lack it: IANA, Assigned Internet Protocol Numbers."""
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": IPPROTO_SCTP}
"""The numbers of the protocols that have ports, by name."""
FAMILIES = {4: 2, 6: 10}
"""AF_INET and AF_INET6, by IP version (include/linux/socket.h)."""
IPV4_MAPPED = bytes(10) + b"\xff\xff"
"""What an IPv4 address is preceded by as an IPv6 address (RFC 4291, 2.5.5.2)."""


@lru_cache(1024)
def pack_address(text: str) -> bytes:
    """Return the 16 bytes of an address, in network byte order; an IPv4 address is mapped."""
    packed = ip_address(text).packed
    return IPV4_MAPPED + packed if len(packed) == 4 else packed


def format_host(address: object) -> str:
    """Return an address, or its text, as it stands before a colon and a port: an IPv6 address in brackets."""
    text = str(address)
    return f"[{text}]" if ":" in text else text
