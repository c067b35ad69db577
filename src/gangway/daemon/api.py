"""The daemon's HTTP API, on a unix socket.

`OPERATIONS` defines it: handlers and OpenAPI document are generated from that.  Requests that change something are
carried out one after the other in one thread, as each changes what the next one starts from; questions (GET) in another
one, so that they are answered meanwhile.  The loop stays free to accept connections.

    curl --unix-socket /run/gangway/netns-COOKIE/gangway.sock http://localhost/mappings
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from aiohttp import web

from gangway.admission import parse_admitted
from gangway.daemon import messages
from gangway.daemon.docker_ports import DockerPorts
from gangway.daemon.messages import (
    AttachRequest,
    CheckAnswer,
    DockerChange,
    DockerCleanupRequest,
    DockerReport,
    DockerRequest,
    EndpointAnswer,
    ErrorAnswer,
    ExplainAnswer,
    MappingAnswer,
    NetworkAnswer,
    NetworkRequest,
    PublishRequest,
    RouteAnswer,
    StatusAnswer,
    UnpublishRequest,
)
from gangway.errors import Conflict, GangwayError, HostRefused, InvalidRequest, PortInUse, TimedOut, Unsupported
from gangway.facts import Firewall
from gangway.log import Log
from gangway.model import PortMapping, PortRange, Protocol, Source, parse_address
from gangway.peers import peer_credentials
from gangway.reconcile.changes import ANSWERS_ELSEWHERE
from gangway.state.requests import Requests

if TYPE_CHECKING:
    from gangway.daemon.handover import Handover

# The version of the API, not of gangway.
_VERSION = "1.0"
_MAX_ERROR_CHARACTERS = 1000
_STATUS = {InvalidRequest: 400, Conflict: 409, PortInUse: 409, HostRefused: 500, Unsupported: 501, TimedOut: 503}


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Service(NamedTuple):
    """What the API serves."""

    requests: Requests
    ports: DockerPorts
    checks: Callable[[], Iterable[CheckAnswer]]
    names: Callable[[], Awaitable[dict[str, str]]]  # return the names of Docker's containers, by address
    handover: Callable[[], "Handover"]
    status: Callable[[], StatusAnswer]
    reload: Callable[[], list[str]]
    stop: Callable[[], None]


class Operation(NamedTuple):
    """An operation.  `call(service, request, parameters of path and query)` returns the answer."""

    pattern: str  # `METHOD /PATH/{PARAMETER}?QUERY-PARAMETER&…`
    summary: str
    call: Callable[[Service, Any, dict[str, str]], Any]
    answer: Any = None
    request: type[msgspec.Struct] | None = None
    is_roots: bool = False  # refused to the group that may use the API

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
    Operation("POST /networks", "Create a network.", _create_network, NetworkAnswer, NetworkRequest),
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
    Operation("POST /endpoints", "Attach a container to a network.", _attach, EndpointAnswer, AttachRequest),
    Operation(
        "DELETE /endpoints/{container}",
        "Detach a container, and delete its mappings.  In the path, `/` is %2F.",
        lambda service, _, given: service.requests.detach(given["container"]),
    ),
    Operation("GET /mappings?container", "List all mappings, or a container's.", _list_mappings, list[MappingAnswer]),
    Operation("POST /mappings", "Publish ports.", _publish, list[MappingAnswer], PublishRequest),
    Operation(
        "POST /mappings/withdraw",
        "Delete mappings of a container: those that are named, or all.",
        _unpublish,
        list[MappingAnswer],
        UnpublishRequest,
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


def application(
    service: Service, worker: Executor, reader: Executor, log: Log, done: Callable[[], None]
) -> web.Application:
    """Return the API.  The worker carries out requests, and the reader answers questions.

    `done` is called in the loop after each request that may have changed something.
    """
    document = msgspec.json.encode(openapi())

    async def describe(_request: web.Request) -> web.Response:
        return web.json_response(body=document)

    def handler(operation: Operation) -> Callable[[web.Request], Awaitable[web.Response]]:
        decode = None if operation.request is None else msgspec.json.Decoder(operation.request).decode

        async def handle(request: web.Request) -> web.Response:
            given = {**request.query, **request.match_info}
            loop = asyncio.get_running_loop()
            is_question = request.method == "GET" and service.requests.is_ready
            executor = reader if is_question else worker
            try:
                if operation.is_roots and _client(request) != os.geteuid():
                    raise Unsupported("only root may do this")
                body = None if decode is None else decode(await request.read())
                answer = await loop.run_in_executor(executor, operation.call, service, body, given)
            except msgspec.MsgspecError as error:
                return _refusal(InvalidRequest(str(error)))
            except GangwayError as error:
                return _refusal(error)
            except web.HTTPException:
                raise
            except Exception as error:
                log.failure(error)
                return _refusal(HostRefused(_in_one_line(error)))
            if request.method != "GET":
                done()
            await _name_leases(answer, service.names)
            return web.json_response(body=msgspec.json.encode(answer))

        return handle

    app = web.Application(middlewares=[_refuse_in_json])
    for operation in OPERATIONS:
        app.router.add_route(*operation.route, handler(operation))
    app.router.add_get("/openapi.json", describe)
    return app


def _client(request: web.Request) -> int:
    """Return the user ID of a client; nobody's if it has closed the connection."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    return -1 if sock is None else peer_credentials(sock).uid


async def _name_leases(answer: Any, names: Callable[[], Awaitable[dict[str, str]]]) -> None:
    """Fill in the names of Docker's containers, where its API can be read."""
    mappings = [answer.mapping] if isinstance(answer, ExplainAnswer) else answer if isinstance(answer, list) else []
    leases = [one for one in mappings if isinstance(one, MappingAnswer) and one.source == Source.LEASE]
    known = await names() if leases else {}
    for lease in leases:
        name = known.get(lease.container_address)
        lease.container = f"docker:{name}" if name else ""


@web.middleware
async def _refuse_in_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer what the HTTP server refuses, such as an unknown path, as every other error."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        text = f"{request.method} {request.path}: {error.reason}; GET /openapi.json describes the API"
        refused = _refusal(InvalidRequest(text), error.status)
        if "Allow" in error.headers:
            refused.headers["Allow"] = error.headers["Allow"]
        return refused


class Connection(web.RequestHandler):
    """A client's connection: a request that is not valid HTTP is answered as every other error."""

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was sent already")
        if status < 500:
            refused = _refusal(InvalidRequest(f"invalid HTTP request: {message or exc}"), status)
        else:
            self.log_exception("internal error", exc_info=exc)
            refused = _refusal(HostRefused(f"internal error: {exc!r}; the daemon's log has the details"), status)
        refused.force_close()
        return refused


def _refusal(error: GangwayError, status: int | None = None) -> web.Response:
    """Return the answer to a request that failed: one line, however long the request's values are."""
    text = " ".join(str(error).splitlines())
    if len(text) > _MAX_ERROR_CHARACTERS:
        half = _MAX_ERROR_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    body = msgspec.json.encode(ErrorAnswer(type(error).__name__, text))
    return web.json_response(body=body, status=status or _STATUS[type(error)])


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ExceptionGroup):
        first, *rest = map(str, error.exceptions)
        return f"{first} ({error.message}: {'; '.join(rest)})"
    return f"internal error: {error!r}; the daemon's log has the details"


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document (spec.openapis.org/oas/v3.1.0)."""
    types = [kind for operation in OPERATIONS for kind in (operation.answer, operation.request) if kind is not None]
    types.append(ErrorAnswer)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        method, path = operation.route
        paths.setdefault(path, {})[method.lower()] = _described(operation, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gangway", "version": _VERSION},
        "paths": paths,
        "components": {"schemas": components},
    }


def _described(operation: Operation, schema: dict[str, Any]) -> dict[str, Any]:
    def body(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": {"type": "null"} if kind is None else schema[repr(kind)]}}

    path, _, query = operation.pattern.partition("?")
    in_path, in_query = re.findall(r"{(\w+)}", path), re.findall(r"\w+", query)
    text = {"schema": {"type": "string"}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [
            *({"name": name, "in": "path", "required": True, **text} for name in in_path),
            *({"name": name, "in": "query", **text} for name in in_query),
        ],
        "responses": {
            "200": {"description": "OK", "content": body(operation.answer)},
            "default": {"description": "Request failed; no changes were made", "content": body(ErrorAnswer)},
        },
    }
    if operation.request is not None:
        described["requestBody"] = {"required": True, "content": body(operation.request)}
    return described
