"""Publishes ports of Docker's containers by request.

Where Docker's networks and ports are served, the containers are known.  Elsewhere dockerd keeps its own rules and
proxies: gangway then looks a container up when its first port is published, and forgets it with its last port.
"""

from collections.abc import Callable, Sequence

from gangway.errors import Conflict
from gangway.model import DOCKER_PREFIX, Subnets
from gangway.plan import MappingPlan
from gangway.state.adoption import Adoption
from gangway.state.requests import Requests


class DockerPorts:
    """Requests about ports of any container.  `socket` returns the path of Docker's API, and `serves_docker` is true
    if Docker's networks and ports are served."""

    def __init__(self, socket: Callable[[], str], serves_docker: bool, requests: Requests, adoption: Adoption) -> None:
        self._socket, self._serves_docker = socket, serves_docker
        self._requests, self._adoption = requests, adoption

    def publish(self, container: str, texts: Sequence[str], admitted: Subnets) -> tuple[MappingPlan, ...]:
        """Publish a container's ports, as `Requests.publish` does.

        Conflict, HostRefused: it is one of Docker's, and cannot be looked up.
        """
        try:
            if container.startswith(DOCKER_PREFIX) and not self._adoption.knows(container):
                self._look_up(container.removeprefix(DOCKER_PREFIX))
            return self._requests.publish(container, texts, admitted)
        finally:
            self._adoption.forget_unpublished()

    def unpublish(self, container: str, texts: Sequence[str]) -> tuple[MappingPlan, ...]:
        """Unpublish a container's ports, as `Requests.unpublish` does.  Conflict: it is Docker's, and is stopped."""
        if container.startswith(DOCKER_PREFIX) and not self._adoption.knows(container):
            name = container.removeprefix(DOCKER_PREFIX)
            raise Conflict(
                f"container {name} has no published ports, or does not run: then they can be unpublished after docker "
                f"start {name}, and end with docker rm {name}"
            )
        try:
            return self._requests.unpublish(container, texts)
        finally:
            self._adoption.forget_unpublished()

    def _look_up(self, name: str) -> None:
        from gangway.docker.lookup import find_container  # needs an HTTP client, as few daemons do

        self._requests.repair()
        found = find_container(self._socket(), name)
        if not self._serves_docker:
            self._adoption.add(found)
