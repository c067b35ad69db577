"""The operations of the daemon's API: what each is called, what it means, and what it answers.

`OPERATIONS` defines the API: its handlers (`api`) and its document (`openapi`) are generated from it.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from gangway.admission import parse_admitted
from gangway.daemon import audit, messages
from gangway.daemon.docker_ports import DockerPorts
from gangway.daemon.history import History
from gangway.daemon.messages import (
    AttachRequest,
    CheckAnswer,
    DockerChange,
    DockerCleanupRequest,
    DockerReport,
    DockerRequest,
    DownAnswer,
    EndpointAnswer,
    EventAnswer,
    ExplainAnswer,
    HealthAnswer,
    MappingAnswer,
    NetworkAnswer,
    NetworkRequest,
    PublishRequest,
    RouteAnswer,
    SettingAnswer,
    StatusAnswer,
    UnpublishRequest,
    VersionAnswer,
)
from gangway.errors import InvalidRequest
from gangway.facts import Firewall
from gangway.model import PortMapping, PortRange, Protocol, parse_address
from gangway.reconcile.changes import ANSWERS_ELSEWHERE
from gangway.state.requests import Requests

if TYPE_CHECKING:
    from gangway.daemon.down import Down
    from gangway.daemon.handover import Handover


class Service(NamedTuple):
    """What the API serves."""

    requests: Requests
    ports: DockerPorts
    checks: Callable[[], Iterable[CheckAnswer]]
    names: Callable[[], Awaitable[dict[str, str]]]  # return the names of Docker's containers, by address
    handover: Callable[[], "Handover"]
    status: Callable[[], StatusAnswer]
    settings: Callable[[], list[SettingAnswer]]
    down: "Down"
    version: Callable[[], VersionAnswer]
    health: Callable[[], HealthAnswer]
    history: History
    reload: Callable[[], list[str]]
    stop: Callable[[], None]
    take_down: Callable[[], list[str]]


class Operation(NamedTuple):
    """An operation.  `call(service, request, parameters of path and query)` returns the answer."""

    pattern: str  # `METHOD /PATH/{PARAMETER}?QUERY-PARAMETER&…`
    summary: str
    call: Callable[[Service, Any, dict[str, str]], Any]
    answer: Any = None
    request: type[msgspec.Struct] | None = None
    is_roots: bool = False  # refused to the group that may use the API
    is_instant: bool = False  # answered at once, in the loop
    is_stream: bool = False
    """`call` returns a history, whose events are sent as they happen; `answer` is one of them."""
    describe: Callable[[Mapping[str, Any], Any], audit.Described] | None = None
    """Says what was done, for the log, by the request's values and the answer."""

    @property
    def route(self) -> tuple[str, str]:
        """The method, and the path without the query."""
        method, _, path = self.pattern.partition("?")[0].partition(" ")
        return method, path


def _network(service: Service, name: str) -> NetworkAnswer:
    return NetworkAnswer.of(service.requests.network(name), service.requests.endpoints(name))


def _list_networks(service: Service, _request: None, _given: dict[str, str]) -> list[NetworkAnswer]:
    return [_network(service, network.name) for network in service.requests.networks()]


def _create_network(service: Service, request: NetworkRequest, _given: dict[str, str]) -> NetworkAnswer:
    network = request.network(service.requests.uplink_mtu())
    return _network(service, service.requests.create_network(network).name)


def _attach(service: Service, request: AttachRequest, _given: dict[str, str]) -> EndpointAnswer:
    addresses = [parse_address(text) for text in request.addresses]
    network, namespace = request.network or None, request.namespace or None
    endpoint = service.requests.attach(request.container, network, addresses, namespace, request.owner)
    elsewhere = ANSWERS_ELSEWHERE if service.requests.answers_elsewhere(endpoint) else ""
    return EndpointAnswer.of(endpoint, "; ".join(filter(None, (service.requests.ipv4_only(endpoint), elsewhere))))


def _list_mappings(service: Service, _request: None, given: dict[str, str]) -> list[MappingAnswer]:
    found, requests = service.ports.mappings(given.get("container")), service.requests
    counted = zip(
        found.published, map(requests.redirected, found.published), requests.relayed(found.published), strict=True
    )
    return [*starmap(MappingAnswer.of, counted), *(_waiting(service, mapping) for mapping in found.waiting)]


def _waiting(service: Service, mapping: PortMapping) -> MappingAnswer:
    return MappingAnswer.waiting(mapping, service.ports.why_waiting(mapping))


def _publish(service: Service, request: PublishRequest, _given: dict[str, str]) -> list[MappingAnswer]:
    if not request.ports:
        raise InvalidRequest("nothing to publish: name ports with -p")
    published = service.ports.publish(request.container, request.ports, parse_admitted(request.admitted))
    return list(map(MappingAnswer.of, published))


def _unpublish(service: Service, request: UnpublishRequest, _given: dict[str, str]) -> list[MappingAnswer]:
    found = service.ports.unpublish(request.container, request.ports)
    return [*map(MappingAnswer.of, found.published), *(_waiting(service, mapping) for mapping in found.waiting)]


def _explain(service: Service, _request: None, given: dict[str, str]) -> ExplainAnswer:
    host, _, rest = given.get("at", "").rpartition(":")
    port, _, protocol = rest.partition("/")
    if not host:
        raise InvalidRequest(f"invalid address {given.get('at', '')!r}: write HOST-IP:PORT[/PROTO]")
    address = parse_address(host)
    ports = PortRange.parse(port)
    if ports.count != 1:
        raise InvalidRequest(f"invalid port {port!r}: ask for one port, not for a range")
    origin = messages.origin(given["from"]) if "from" in given else None
    found = service.requests.explain(Protocol.parse(protocol or "tcp"), address, ports.first, origin)
    routes = [RouteAnswer.of(route, rules) for route, rules in found.routes]
    name, gateways = (found.network.name, found.network.gateways) if found.network else ("", ())
    (relayed,) = service.requests.relayed([found.planned])
    answer = MappingAnswer.of(found.planned, service.requests.redirected(found.planned), relayed, routes)
    firewall = service.requests.facts.firewall if found.planned.has_rules else Firewall.NONE
    return ExplainAnswer(str(address), ports.first, firewall.value, name, list(map(str, gateways)), answer)


OPERATIONS = (
    Operation("GET /networks", "List networks.", _list_networks, list[NetworkAnswer]),
    Operation(
        "POST /networks",
        "Create a network.",
        _create_network,
        NetworkAnswer,
        NetworkRequest,
        describe=audit.network_created,
    ),
    Operation(
        "GET /networks/{name}",
        "Show a network.",
        lambda service, _, given: _network(service, given["name"]),
        NetworkAnswer,
    ),
    Operation(
        "DELETE /networks/{name}",
        "Remove a network that has no containers.",
        lambda service, _, given: service.requests.remove_network(given["name"]),
        describe=audit.network_removed,
    ),
    Operation(
        "GET /endpoints",
        "List endpoints.",
        lambda service, *_: list(map(EndpointAnswer.of, service.requests.endpoints())),
        list[EndpointAnswer],
    ),
    Operation(
        "POST /cleanup",
        "Delete the links of daemons whose database is lost, their rules and ports; the answer is the links' names.",
        lambda service, *_: service.requests.clean_up(),
        list[str],
    ),
    Operation(
        "POST /endpoints",
        "Attach a container to a network.",
        _attach,
        EndpointAnswer,
        AttachRequest,
        describe=audit.attached,
    ),
    Operation(
        "DELETE /endpoints/{container}",
        "Detach a container, and delete its mappings.  In the path, `/` is %2F.",
        lambda service, _, given: service.requests.detach(given["container"]),
        describe=audit.detached,
    ),
    Operation("GET /mappings?container", "List all mappings, or a container's.", _list_mappings, list[MappingAnswer]),
    Operation(
        "POST /mappings", "Publish ports.", _publish, list[MappingAnswer], PublishRequest, describe=audit.published
    ),
    Operation(
        "POST /mappings/withdraw",
        "Delete mappings of a container: those that are named, or all.",
        _unpublish,
        list[MappingAnswer],
        UnpublishRequest,
        describe=audit.unpublished,
    ),
    Operation(
        "GET /explain?at&from",
        "Explain how clients of HOST-IP:PORT[/PROTO] reach the container.",
        _explain,
        ExplainAnswer,
    ),
    Operation(
        "GET /doctor",
        "Show what this host supports, and the consequences of what it does not.",
        lambda service, *_: list(service.checks()),
        list[CheckAnswer],
    ),
    Operation(
        "GET /status",
        "Show the daemon and its relay: versions, processes, and how much they manage.",
        lambda service, *_: service.status(),
        StatusAnswer,
    ),
    Operation(
        "GET /config",
        "Show the settings in force, and where each comes from.",
        lambda service, *_: service.settings(),
        list[SettingAnswer],
    ),
    Operation(
        "GET /version",
        "Show the versions of the daemon and its relay.",
        lambda service, *_: service.version(),
        VersionAnswer,
        is_instant=True,
    ),
    Operation(
        "GET /health",
        "Check whether everything that is wanted is applied: the status is 200 if it is, else 503.",
        lambda service, *_: service.health(),
        HealthAnswer,
        is_instant=True,
    ),
    Operation(
        "GET /events",
        "Follow the daemon's events, the last 1000 first, as server-sent events; `missed` says that some were lost.",
        lambda service, *_: service.history,
        EventAnswer,
        is_stream=True,
    ),
    Operation(
        "POST /reload",
        "Read the settings again, and open the log files again; the answer is warnings.",
        lambda service, *_: service.reload(),
        list[str],
        is_roots=True,
    ),
    Operation(
        "POST /stop",
        "End the daemon; ports stay published.",
        lambda service, *_: service.stop(),
        is_roots=True,
    ),
    Operation(
        "GET /down",
        "Show what POST /down would remove.",
        lambda service, *_: DownAnswer(service.down.planned(), service.down.advice()),
        DownAnswer,
    ),
    Operation(
        "POST /down",
        "Remove everything of gangway's in this network namespace, and end the daemon.",
        lambda service, *_: DownAnswer(service.take_down(), service.down.advice()),
        DownAnswer,
        is_roots=True,
    ),
    Operation(
        "GET /docker?config_file",
        "Check whether Docker's ports are gangway's, and say what to change.",
        lambda service, _, given: service.handover().check(given.get("config_file", "")),
        DockerReport,
        is_roots=True,
    ),
    Operation(
        "POST /docker/enable",
        "Switch dockerd's rules and proxy off in its settings.",
        lambda service, body, _: service.handover().enable(body.config_file),
        DockerChange,
        DockerRequest,
        is_roots=True,
    ),
    Operation(
        "POST /docker/disable",
        "Restore dockerd's settings.",
        lambda service, body, _: service.handover().disable(body.config_file),
        DockerChange,
        DockerRequest,
        is_roots=True,
    ),
    Operation(
        "POST /docker/cleanup",
        "Remove the rules that dockerd has left.",
        lambda service, body, _: service.handover().clean_up(body.forward_accept),
        DockerChange,
        DockerCleanupRequest,
        is_roots=True,
    ),
)
