"""What commands ask of networks, containers and ports, some of which files may declare, or already be there.

What a file declares is left to it: a command says which file.  The kept file is the exception: `publish --keep` writes
it, and what unpublishes its ports removes them there, too.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from gangway.daemon.declaration import DeclaredPort, Document
from gangway.daemon.declared import create_network, has_ipv6
from gangway.daemon.declared_files import DeclaredFiles
from gangway.daemon.difference import match
from gangway.daemon.docker_ports import DockerPorts, Ports
from gangway.daemon.kept import names, with_ports, without_network, without_ports
from gangway.daemon.messages import AttachRequest, NetworkRequest
from gangway.errors import Conflict, GangwayError, InvalidRequest
from gangway.host import netns
from gangway.model import (
    DOCKER_PREFIX,
    ON_DEMAND,
    Endpoint,
    Network,
    PortMapping,
    PortRequest,
    Source,
    Subnets,
    parse_address,
    parse_port,
)
from gangway.plan import MappingPlan
from gangway.state.requests import Requests


class Commands:
    """The requests of commands."""

    def __init__(self, files: DeclaredFiles, requests: Requests, ports: DockerPorts) -> None:
        self._files, self._requests, self._ports = files, requests, ports

    # Networks and endpoints

    def create_network(self, request: NetworkRequest, if_not_exists: bool = False) -> Network:
        """Create a network, or return the one that is as requested already, `if_not_exists`."""
        known = {one.name: one for one in self._requests.networks()} if if_not_exists else {}
        existing = known.get(request.name)
        if existing is None:
            return create_network(self._requests, request)
        if not request.describes(existing):
            raise Conflict(f"network {request.name} exists with other settings: gangway network inspect {request.name}")
        return existing

    def remove_network(self, name: str, if_exists: bool = False) -> None:
        """Remove a network, `if_exists`.  Conflict: it has containers, or a file declares it."""
        declared = self._files.declaration.networks.get(name)
        if declared is not None and declared.file == self._files.kept_path:
            using = [one for one in self._files.declaration.containers.values() if name in one.networks]
            of_ports = [f"gangway unpublish {one.name}" for one in using if one.networks[0] == name]
            further = [f"gangway detach {one.name} --network {name}" for one in using if one.networks[0] != name]
            raise Conflict(f"network {name} is used by ports that are kept: {'; '.join((*of_ports, *further))}")
        if declared is not None:
            raise Conflict(_declared(f"network {name}", declared.file))
        if not if_exists or any(one.name == name for one in self._requests.networks()):
            self._requests.remove_network(name)

    def attach(self, request: AttachRequest) -> Endpoint:
        """Attach a container to a network, or return its endpoint there if that is as requested, `if_not_exists`."""
        container, addresses = request.container, [parse_address(text) for text in request.addresses]
        if request.if_not_exists:
            self._requests.repair(container)
            name = request.network or ON_DEMAND
            found = next((one for one in self._requests.endpoints(name) if one.container == container), None)
            if found is not None and set(addresses) <= set(found.addresses):
                return found
        network, namespace = request.network or None, request.namespace or None
        return self._requests.attach(container, network, addresses, namespace, request.owner)

    def detach(self, container: str, network: str = "", if_exists: bool = False) -> None:
        """Detach a container from a network, or from all, and remove that, or its ports, from the kept file.

        Conflict: another file declares it; it is not attached, unless `if_exists`.
        """
        if if_exists and self._requests.has_endpoint(container):
            self._requests.repair(container)  # removes the endpoints of a namespace that was deleted
        attached = [one.network for one in self._requests.endpoints() if one.container == container]
        wanted = self._files.declaration.containers.get(container)
        declared = [] if wanted is None else list(wanted.networks)
        is_whole = not network or (attached or declared) == [network]
        files = list[str]()
        if wanted is not None and (is_whole or network in declared):
            files = [wanted.file, *(port.file for port in wanted.ports)]
        for file in (one for one in files if one != self._files.kept_path):
            raise Conflict(_declared(f"container {container}", file))
        is_detached = if_exists and not (network in attached if network else attached)
        if is_detached and not files:
            return
        kept = self._files.kept()
        left = without_ports(kept, container, ()) if is_whole else without_network(kept, container, network)
        with self._files.keeping(left):
            if not is_detached:
                self._requests.detach(container, network or None)

    # Ports

    def publish(
        self,
        container: str,
        texts: Sequence[str],
        admitted: Subnets = (),
        keep: bool = False,
        if_not_exists: bool = False,
    ) -> tuple[MappingPlan, ...]:
        """Publish a container's ports: `if_not_exists`, those that are not; `keep` writes all to the kept file, too."""
        requests = [one for text in texts for one in parse_port(text, admitted).split_ports()]
        existing, missing = self._existing(container, requests) if if_not_exists else ((), texts)
        document = self._keepable(container) if keep else None
        source = Source.DECLARED if keep else Source.API
        added = self._ports.publish(container, missing, admitted, source) if missing else ()
        published = (*existing, *added)
        if document is None:
            return published
        try:
            is_named = container.startswith(DOCKER_PREFIX) or self._files.names_networks(container)
            names = [] if is_named else [one.network for one in self._requests.endpoints_of(container)]
            created = list(self._created(map(self._requests.network, names)))
            chosen = list(_as_published(requests, [one.mapping for one in published]))
            with self._files.keeping(with_ports(document, container, names, chosen, created)):
                return published
        except GangwayError:
            self._ports.unpublish(container, [str(one.mapping) for one in added])
            raise

    def unpublish(self, container: str, texts: Sequence[str], if_exists: bool = False) -> Ports:
        """Unpublish a container's ports, all or those that texts name, and remove them from the kept file.

        Conflict: another file declares one of them; a text names none, unless `if_exists`.
        """
        kept, others = self._declared_ports(container)
        if not (kept or others or if_exists):
            return self._ports.unpublish(container, texts)
        named = list(map(parse_port, texts))
        for port in (port for port in others if any(names(one, port.request) for one in named)):
            raise Conflict(_declared(f"-p {port.request} of {container}", port.file))
        left = match([port.request for port in others], self._known(container), has_ipv6()).unclaimed
        if not (texts or left or kept or if_exists):
            raise Conflict(_declared(f"everything that is published of {container}", others[0].file))

        def is_needless(one: PortRequest) -> bool:
            return not any(map(one.names, left)) and (if_exists or any(names(one, port) for port in kept))

        chosen = [text for text, one in zip(texts, named, strict=True) if not is_needless(one)]
        if not texts:
            chosen = list(map(str, left))
        with self._files.keeping(without_ports(self._files.kept(), container, named)):
            return self._ports.unpublish(container, chosen) if chosen else Ports(())

    def unpublish_all(self) -> Ports:
        """Unpublish the ports of all containers that commands have published, and remove all from the kept file."""
        kept = self._files.kept()
        for container in {one.container for one in kept.publish}:
            kept = without_ports(kept, container, ())
        published = defaultdict[str, list[PortMapping]](list)
        for one in self._requests.mappings():
            published[one.mapping.container].append(one.mapping)
        left = set[PortMapping]()
        for container, mappings in published.items():
            _, others = self._declared_ports(container)
            left.update(match([port.request for port in others], mappings, has_ipv6()).unclaimed)
        with self._files.keeping(kept):
            return self._ports.unpublish_all(left)

    # Details

    def _existing(
        self, container: str, requests: Sequence[PortRequest]
    ) -> tuple[tuple[MappingPlan, ...], Sequence[str]]:
        """Return the mappings that requests have led to already, and the requests that have not, as after `-p`."""
        self._requests.repair(container)
        known = self._requests.mappings(container) if self._requests.has_endpoint(container) else ()
        missing, unclaimed = match(requests, [one.mapping for one in known], has_ipv6())
        others = set(unclaimed)
        return tuple(one for one in known if one.mapping not in others), list(map(str, missing))

    def _keepable(self, container: str) -> Document:
        """Return what the kept file says.

        InvalidRequest: the container has no name that a later one may have.  Conflict: it does not exist.
        """
        path = netns.path_of(container)
        is_of_process = netns.is_of_process(path)
        if container.startswith(DOCKER_PREFIX) or (netns.exists(path) and not is_of_process):
            return self._files.kept()
        if not is_of_process:
            self._requests.repair(container)  # removes the endpoints of a namespace that was deleted
            self._requests.endpoints_of(container)
        raise InvalidRequest(
            f"ports of {container} cannot be kept: it has no name that outlives it; name it with ip netns attach"
        )

    def _declared_ports(self, container: str) -> tuple[list[PortRequest], list[DeclaredPort]]:
        """Return the ports of a container that are kept, and those that other files declare."""
        wanted = self._files.declaration.containers.get(container)
        ports = () if wanted is None else wanted.ports
        kept = [port.request for port in ports if port.file == self._files.kept_path]
        return kept, [port for port in ports if port.file != self._files.kept_path]

    def _known(self, container: str) -> list[PortMapping]:
        """Return what gangway has published of a container, or will when it runs."""
        planned = self._requests.mappings(container) if self._requests.has_endpoint(container) else ()
        published = (one.mapping for one in planned if one.mapping.source is not Source.DOCKER)
        return [*published, *self._ports.waiting(container)]

    def _created(self, networks: Iterable[Network]) -> Iterator[NetworkRequest]:
        """Yield what creates networks again, but for those that are made on demand, or declared."""
        for network in (one for one in networks if one.name != ON_DEMAND):
            declared = self._files.declaration.networks.get(network.name)
            if declared is None or declared.file == self._files.kept_path:
                yield NetworkRequest.of(network)


def _as_published(requests: Sequence[PortRequest], mappings: Sequence[PortMapping]) -> Iterator[PortRequest]:
    """Yield the requests with the host ports that were chosen, of which no two have the same."""
    left = list(mappings)
    for request in requests:
        ports = next(filter(request.names, left)).host_ports
        left = [one for one in left if not (request.names(one) and one.host_ports == ports)]
        yield replace(request, host_ports=ports)


def _declared(what: str, file: str) -> str:
    return f"{what} is declared in {file}: remove it there, then gangway daemon reload"
