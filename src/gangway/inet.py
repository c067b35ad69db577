"""Numbers of protocols and families, and how an address is written before a port.  Every part may import this."""

IPPROTO_SCTP = 132
"""Python's socket module may lack it: IANA, Assigned Internet Protocol Numbers."""
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": IPPROTO_SCTP}
"""The numbers of the protocols that have ports, by name."""
FAMILIES = {4: 2, 6: 10}
"""AF_INET and AF_INET6, by IP version (include/linux/socket.h)."""


def format_host(address: object) -> str:
    """Return an address, or its text, as it stands before a colon and a port: an IPv6 address in brackets."""
    text = str(address)
    return f"[{text}]" if ":" in text else text
