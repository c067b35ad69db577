"""How values are written for a person, wherever that is done."""


def in_brackets(address: object) -> str:
    """Return an address as it is written before a colon and a port: IPv6 in brackets."""
    text = str(address)
    return f"[{text}]" if ":" in text else text
