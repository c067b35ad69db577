"""Looks up one of Docker's containers, whose ports are about to be published."""

import asyncio
from urllib.parse import quote

from gangway.docker.activation import would_start_dockerd
from gangway.docker.client import AnswerRefused, DockerClient
from gangway.docker.wanted import DockerContainer, View
from gangway.errors import Conflict, HostRefused
from gangway.state.adopted import Adopted

_LIMIT_S = 5.0


def find_container(path: str, name: str) -> Adopted:
    """Return a running container and its network, in a thread that has no event loop; its own ports are dockerd's.

    Conflict: it has no port that gangway could publish.  HostRefused: Docker's API cannot be read.
    """
    try:
        if would_start_dockerd(path):
            raise HostRefused(f"Docker's API {path}: cannot be read (dockerd is stopped)")
        return asyncio.run(_find(path, name))
    except AnswerRefused:
        raise
    except HostRefused as error:
        hint = "start dockerd, or set socket in table [docker] of gangway.toml if its socket is another one"
        raise HostRefused(f"container {name} cannot be looked up: {error}; {hint}") from None


async def _find(path: str, name: str) -> Adopted:
    view = View(has_rules=False)
    async with DockerClient(path, _LIMIT_S) as client:
        found = await client.container(quote(name, safe=""))
        if found is None:
            raise Conflict(f"Docker has no container named {name!r}: docker ps lists those that run")
        view.use_networks(await client.networks())
    view.use_container(found)
    if found.name.removeprefix("/") != name:  # it is the beginning of its id
        raise Conflict(f"container {name} is named {found.name.removeprefix('/')}: use its name")
    if not view.adopted.containers:
        raise Conflict(f"container {name} {'; '.join((_why_unreachable(found, name), *view.problems))}")
    return view.adopted


def _why_unreachable(container: DockerContainer, name: str) -> str:
    mode = container.host_config.network_mode
    if not (container.state.running and container.state.pid):
        return f"does not run: docker start {name}"
    if mode == "host":
        return "is on the host's network: its ports are the host's own"
    if mode.startswith("container:"):
        return f"shares the network of another container ({mode.partition(':')[2][:12]}): publish the ports of that one"
    return "is on no bridge network" + f": docker network connect bridge {name}" * (mode != "none")
