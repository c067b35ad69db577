"""A port mapping, as the daemon answers it, on one line."""

from gangway.inet import format_host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def published(mapping: "dict[str, Any]") -> str:
    """Return the host's side: `0.0.0.0:8000`."""
    return f"{format_host(mapping['host_address'])}:{mapping['host_ports']}"


def target(mapping: "dict[str, Any]") -> str:
    """Return the container's side: `172.30.0.2:80/tcp`."""
    return f"{format_host(mapping['container_address'])}:{mapping['container_ports']}/{mapping['protocol']}"


def mapping_line(mapping: "dict[str, Any]") -> str:
    """Return both: `0.0.0.0:8000 -> 172.30.0.2:80/tcp`."""
    return f"{published(mapping)} -> {target(mapping)}"
