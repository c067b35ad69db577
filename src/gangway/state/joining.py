"""Attaches containers to networks, and detaches them.

A container's first network has its default route and its published ports, so that one is left last.  A further one
has rules for its clients (`gangway.neighbours`).  A failure, in whatever part of it, leaves what was there.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from gangway.errors import Conflict
from gangway.host import netns
from gangway.model import Endpoint
from gangway.reconcile.controller import Controller
from gangway.reconcile.state import State
from gangway.state.checks import check_same_process
from gangway.state.database import Place
from gangway.state.registry import Registry


def place_of(container: str, namespace: str | None, owner: int | None) -> Place:
    """Return where a container is that is to be attached; `namespace` and `owner` as in `Requests.attach`."""
    path = namespace or netns.path_of(container)
    owned_by = "" if owner is None else netns.process_identity(owner)
    return Place(path, netns.inode_at(path), netns.cookie_at(path), owned_by)


def check_may_join(
    endpoints: Sequence[Endpoint], network: str | None, place: Place, namespace: str | None, owner: int | None
) -> None:
    """Conflict: an attached container cannot be attached to a network, too, or its place is another one."""
    container, networks = endpoints[0].container, [one.network for one in endpoints]
    if network in networks:
        raise Conflict(f"container {container} is attached to network {network} already: detach it first")
    if network is None:
        raise Conflict(
            f"container {container} is attached to network {', '.join(networks)} already: detach it first, or name "
            "another network that it is to be on, too"
        )
    check_same_process(container, place)
    if namespace is not None and netns.inode_at(namespace) != place.inode:
        raise Conflict(f"container {container} is attached already, and {namespace} is another network namespace")
    if owner is not None and netns.process_identity(owner) != place.owner:
        raise Conflict(f"container {container} is attached already, and process {owner} does not own it")


def join(controller: Controller, registry: Registry, endpoint: Endpoint, place: Place) -> None:
    """Add an endpoint, and make its link: all of it or nothing."""
    with ExitStack() as undo:
        registry.add_endpoint(endpoint, place)
        undo.callback(_remove, registry, [endpoint])
        controller.carry_out(State(), registry.state_of_endpoints([endpoint]))
        undo.pop_all()


def leaving(endpoints: Sequence[Endpoint], network: str | None) -> list[Endpoint]:
    """Return those of a container's endpoints that it loses when it leaves a network, or all of them: the first last.

    Conflict: it is not on that network, or on others that have to be left before.
    """
    first, container = endpoints[0], endpoints[0].container
    if network is None or (network == first.network and len(endpoints) == 1):
        return [*reversed(endpoints)]
    networks = [one.network for one in endpoints]
    if network not in networks:
        raise Conflict(f"container {container} is not attached to network {network}; it is on {', '.join(networks)}")
    if network == first.network:
        others = ", ".join(networks[1:])
        raise Conflict(
            f"container {container} has its default route and its ports on network {network}: detach it from {others} "
            f"first, or from all networks: gangway detach {container}"
        )
    return [one for one in endpoints if one.network == network]


def leave(controller: Controller, registry: Registry, endpoints: Sequence[Endpoint]) -> None:
    """Delete the links of a container's endpoints, in this order; with the first one its ports are unpublished."""
    controller.remove(partial(registry.state_of_endpoints, endpoints))
    with controller.restoring():
        _remove(registry, endpoints)


def _remove(registry: Registry, endpoints: Sequence[Endpoint]) -> None:
    """Remove endpoints of a container, the first one only with all others."""
    if endpoints[-1].is_first:
        return registry.remove_container(endpoints[-1].container)
    for one in endpoints:
        registry.remove_endpoint(one)
