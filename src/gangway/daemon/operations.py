"""The operations of the daemon's API: what each is called, what it means, and what it answers.

`OPERATIONS` defines the API: its handlers (`api`) and its document (`openapi`) are generated from it.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from gangway.admission import parse_admitted
from gangway.daemon import audit, messages
from gangway.daemon.commands import Commands
from gangway.daemon.declared import Declared
from gangway.daemon.docker_ports import DockerPorts, Ports
from gangway.daemon.history import History
from gangway.daemon.messages import (
    ApplyAnswer,
    ApplyRequest,
    AttachRequest,
    CheckAnswer,
    CreateNetworkRequest,
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
    PublishRequest,
    ReloadAnswer,
    RouteAnswer,
    SettingAnswer,
    StatusAnswer,
    UnpublishRequest,
    VersionAnswer,
)
from gangway.errors import Conflict, InvalidRequest
from gangway.facts import Firewall
from gangway.model import PortMapping, PortRange, PortRequest, Protocol, parse_address
from gangway.reconcile.changes import ANSWERS_ELSEWHERE
from gangway.state.requests import Requests

if TYPE_CHECKING:
    from gangway.daemon.down import Down
    from gangway.daemon.handover import Handover


class Service(NamedTuple):
    """What the API serves."""

    requests: Requests
    ports: DockerPorts
    declared: Declared
    commands: Commands
    checks: Callable[[], Iterable[CheckAnswer]]
    names: Callable[[], Awaitable[dict[str, str]]]  # return the names of Docker's containers, by address
    handover: Callable[[], "Handover"]
    status: Callable[[], StatusAnswer]
    settings: Callable[[], list[SettingAnswer]]
    down: "Down"
    version: Callable[[], VersionAnswer]
    health: Callable[[], HealthAnswer]
    history: History
    reload: Callable[[], ReloadAnswer]
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

    def given(self, query: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Return the parameters of a query.  InvalidRequest: one is unknown, empty or there twice."""
        known, found = self.query, dict[str, str]()
        for name, value in query:
            if name not in known:
                raise InvalidRequest(f"unknown query parameter {name!r}: {', '.join(known) or 'there is none'}")
            if name in found or not value:
                raise InvalidRequest(f"query parameter {name}: give one value")
            found[name] = value
        return found

    @property
    def query(self) -> tuple[str, ...]:
        """The names of the query's parameters."""
        return tuple(filter(None, self.pattern.partition("?")[2].split("&")))


def _is_true(given: dict[str, str], name: str) -> bool:
    """Return a parameter that is `true` or `false`, which stands for a missing one, too."""
    value = given.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f"invalid {name} {value!r}: true or false")
    return value == "true"


def _network(service: Service, name: str) -> NetworkAnswer:
    return NetworkAnswer.of(service.requests.network(name), service.requests.endpoints(name))


def _list_networks(service: Service, _request: None, _given: dict[str, str]) -> list[NetworkAnswer]:
    return [_network(service, name) for name in sorted(network.name for network in service.requests.networks())]


def _create_network(service: Service, request: CreateNetworkRequest, _given: dict[str, str]) -> NetworkAnswer:
    return _network(service, service.commands.create_network(request, request.if_not_exists).name)


def _attach(service: Service, request: AttachRequest, _given: dict[str, str]) -> EndpointAnswer:
    endpoint = service.commands.attach(request)
    elsewhere = ANSWERS_ELSEWHERE if service.requests.answers_elsewhere(endpoint) else ""
    return EndpointAnswer.of(endpoint, "; ".join(filter(None, (service.requests.ipv4_only(endpoint), elsewhere))))


def _detach(service: Service, _request: None, given: dict[str, str]) -> None:
    service.commands.detach(given["container"], given.get("network", ""), _is_true(given, "if_exists"))


def _list_mappings(service: Service, _request: None, given: dict[str, str]) -> list[MappingAnswer]:
    requests, container = service.requests, given.get("container")
    declared = service.declared.waiting(container)
    try:
        found = service.ports.mappings(container)
    except Conflict:
        if not declared:
            raise
        found = Ports(())
    counted = zip(
        found.published, map(requests.redirected, found.published), requests.relayed(found.published), strict=True
    )
    absent = (answer for port in declared for answer in MappingAnswer.waiting(*port))
    return [*starmap(MappingAnswer.of, counted), *_waiting(service, found.waiting), *absent]


def _waiting(service: Service, mappings: Iterable[PortMapping]) -> Iterator[MappingAnswer]:
    for one in mappings:
        ports = one.host_ports, one.container_ports, one.admitted, one.source
        request = PortRequest(one.protocol, (one.host_address,), *ports)
        yield from MappingAnswer.waiting(one.container, request, service.ports.why_waiting(one))


def _publish(service: Service, request: PublishRequest, _given: dict[str, str]) -> list[MappingAnswer]:
    if not request.ports:
        raise InvalidRequest("nothing to publish: name ports with -p")
    admitted, flags = parse_admitted(request.admitted), (request.keep, request.if_not_exists)
    published = service.commands.publish(request.container, request.ports, admitted, *flags)
    return list(map(MappingAnswer.of, published))


def _unpublish(service: Service, request: UnpublishRequest, _given: dict[str, str]) -> list[MappingAnswer]:
    if request.all == bool(request.container) or (request.all and request.ports):
        raise InvalidRequest("nothing to unpublish: name a container, or all of them, without ports, by --all")
    if request.all:
        found = service.commands.unpublish_all()
    else:
        found = service.commands.unpublish(request.container, request.ports, request.if_exists)
    return [*map(MappingAnswer.of, found.published), *_waiting(service, found.waiting)]


def _apply(service: Service, request: ApplyRequest, _given: dict[str, str]) -> ApplyAnswer:
    return ApplyAnswer(*service.declared.apply(request.name, request.text, request.dry_run))


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
    of_network = name, list(map(str, gateways))
    return ExplainAnswer(str(address), ports.first, firewall.value, *of_network, answer, list(found.further))


OPERATIONS = (
    Operation("GET /networks", "List networks.", _list_networks, list[NetworkAnswer]),
    Operation(
        "POST /networks",
        "Create a network.",
        _create_network,
        NetworkAnswer,
        CreateNetworkRequest,
        describe=audit.network_created,
    ),
    Operation(
        "GET /networks/{name}",
        "Show a network.",
        lambda service, _, given: _network(service, given["name"]),
        NetworkAnswer,
    ),
    Operation(
        "DELETE /networks/{name}?if_exists",
        "Remove a network that has no containers.",
        lambda service, _, given: service.commands.remove_network(given["name"], _is_true(given, "if_exists")),
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
        "Attach a container to a network; it may be on others already.",
        _attach,
        EndpointAnswer,
        AttachRequest,
        describe=audit.attached,
    ),
    Operation(
        "DELETE /endpoints/{container}?network&if_exists",
        "Detach a container from a network, or from all, and delete its mappings.  In the path, `/` is %2F.",
        _detach,
        describe=audit.detached,
    ),
    Operation("GET /mappings?container", "List all mappings, or a container's.", _list_mappings, list[MappingAnswer]),
    Operation(
        "POST /mappings", "Publish ports.", _publish, list[MappingAnswer], PublishRequest, describe=audit.published
    ),
    Operation(
        "POST /mappings/withdraw",
        "Delete mappings of a container: those that are named, or all; or those of all containers.",
        _unpublish,
        list[MappingAnswer],
        UnpublishRequest,
        describe=audit.unpublished,
    ),
    Operation(
        "POST /apply",
        "Declare networks and ports: what the file does not say any more is removed.",
        _apply,
        ApplyAnswer,
        ApplyRequest,
        is_roots=True,
        describe=audit.applied,
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
        "Read the settings and conf.d again, and open the log files again.",
        lambda service, *_: service.reload(),
        ReloadAnswer,
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
