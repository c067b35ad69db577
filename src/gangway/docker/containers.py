"""The names of Docker's containers, by their addresses."""

import asyncio
from contextlib import suppress
from typing import Any

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=1.0)


async def names_by_address(socket_path: str) -> dict[str, str]:
    """Return the name of each running container by its addresses; nothing where Docker's API cannot be read."""
    connector = aiohttp.UnixConnector(path=socket_path)
    with suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
        async with (
            aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session,
            session.get("http://docker/containers/json") as answer,
        ):
            answer.raise_for_status()
            return dict(pair for container in await answer.json() for pair in _pairs(container))
    return {}


def _pairs(container: dict[str, Any]) -> list[tuple[str, str]]:
    with suppress(LookupError, TypeError, AttributeError):  # an entry without a name, or without networks
        name = container["Names"][0].removeprefix("/")
        networks = container["NetworkSettings"]["Networks"].values()
        addresses = (network.get(key) for network in networks for key in ("IPAddress", "GlobalIPv6Address"))
        return [(address, name) for address in addresses if address]
    return []
