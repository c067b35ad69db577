"""Publishes ports of Docker's containers by request.

Where Docker's networks and ports are served, the containers are known.  Elsewhere dockerd keeps its own rules and
proxies: gangway then looks a container up when its first port is published, and forgets it with its last port.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from gangway.errors import Conflict
from gangway.model import DOCKER_PREFIX, PortMapping, Source, Subnets, parse_port
from gangway.plan import MappingPlan
from gangway.state.adoption import Adoption
from gangway.state.requests import Requests


class Ports(NamedTuple):
    """Ports of containers: those that are published, and those that wait for a container of Docker's or for a port."""

    published: tuple[MappingPlan, ...]
    waiting: tuple[PortMapping, ...] = ()


class DockerPorts:
    """Requests about ports of any container.  `socket` returns the path of Docker's API, and `serves_docker` is true
    if Docker's networks and ports are served."""

    def __init__(self, socket: Callable[[], str], serves_docker: bool, requests: Requests, adoption: Adoption) -> None:
        self._socket, self._serves_docker = socket, serves_docker
        self._requests, self._adoption = requests, adoption

    def publish(
        self, container: str, texts: Sequence[str], admitted: Subnets, source: Source = Source.API
    ) -> tuple[MappingPlan, ...]:
        """Publish a container's ports, as `Requests.publish` does.

        Conflict, HostRefused: it is one of Docker's, and cannot be looked up.
        """
        try:
            if container.startswith(DOCKER_PREFIX) and not self._adoption.knows(container):
                self._look_up(container.removeprefix(DOCKER_PREFIX))
            published = self._requests.publish(container, texts, admitted, source)
            self._adoption.forget_waiting(one.mapping for one in published)
            return published
        finally:
            self._adoption.forget_unpublished()

    def mappings(self, container: str | None = None) -> Ports:
        """Return all ports, or those of a container.  Conflict: it is unknown."""
        waiting = self._adoption.waiting(container)
        if container is not None and waiting and not self._adoption.knows(container):
            return Ports((), waiting)
        return Ports(self._requests.mappings(container), waiting)

    def waiting(self, container: str) -> tuple[PortMapping, ...]:
        """Return the ports of a container of Docker's that are published when it runs, or when they are free."""
        return self._adoption.waiting(container)

    def why_waiting(self, mapping: PortMapping) -> str:
        """Return why a port that waits is not published."""
        is_running = self._adoption.knows(mapping.container)
        return "not published: see the log" if is_running else "container is stopped"

    def unpublish(self, container: str, texts: Sequence[str]) -> Ports:
        """Unpublish a container's ports, as `Requests.unpublish` does, and those that wait."""
        known = self._adoption.waiting(container)
        waiting = tuple(one for one in known if not texts or any(parse_port(text).names(one) for text in texts))
        published: tuple[MappingPlan, ...] = ()
        try:
            if container.startswith(DOCKER_PREFIX) and not self._adoption.knows(container):
                _require_named(container, texts, waiting)
            else:
                left = self._without_waiting(container, texts, waiting) if waiting else texts
                published = self._requests.unpublish(container, left) if left or not texts else ()
            self._adoption.forget_waiting((*waiting, *(one.mapping for one in published)))
        finally:
            self._adoption.forget_unpublished()
        return Ports(published, waiting)

    def unpublish_all(self, chosen: Collection[PortMapping]) -> Ports:
        """Unpublish these mappings, but for those of Docker and its launchers, and all ports that wait."""
        of_dockers, waiting = (Source.DOCKER, Source.LEASE), self._adoption.waiting()
        published = tuple(
            one for one in self._requests.mappings() if one.mapping in chosen and one.mapping.source not in of_dockers
        )
        try:
            self._requests.withdraw(published)
            self._adoption.forget_waiting((*waiting, *(one.mapping for one in published)))
        finally:
            self._adoption.forget_unpublished()
        return Ports(published, waiting)

    def _without_waiting(self, container: str, texts: Sequence[str], waiting: Sequence[PortMapping]) -> Sequence[str]:
        """Leave out the texts, each as after Docker's `-p`, that name only ports that wait."""
        published = [one.mapping for one in self._requests.mappings(container)]

        def is_left(text: str) -> bool:
            names = parse_port(text).names
            return any(map(names, published)) or not any(map(names, waiting))

        return list(filter(is_left, texts))

    def _look_up(self, name: str) -> None:
        from gangway.docker.lookup import find_container  # needs an HTTP client, as few daemons do

        self._requests.repair()
        found = find_container(self._socket(), name)
        if not self._serves_docker:
            self._adoption.add(found)


def _require_named(container: str, texts: Sequence[str], waiting: Sequence[PortMapping]) -> None:
    """Conflict: one of the texts, each as after Docker's `-p`, names no port that waits, or there is none at all."""
    name = container.removeprefix(DOCKER_PREFIX)
    for text in texts:
        if not any(map(parse_port(text).names, waiting)):
            raise Conflict(
                f"container {name} does not run, and has no mapping -p {text}: gangway ls lists its mappings"
            )
    if not waiting:
        raise Conflict(f"container {name} does not run, and gangway has published no ports of it")
