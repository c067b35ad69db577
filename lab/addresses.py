"""Addresses as text."""


def host_port(address: str, port: int | str) -> str:
    """Return "ADDRESS:PORT", with an IPv6 address in brackets; `port` may be a range, or end with a protocol."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
