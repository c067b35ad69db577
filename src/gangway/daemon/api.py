"""The daemon's HTTP API, on a unix socket.

`OPERATIONS` defines it: method, path, request and answer; handlers and OpenAPI document are generated from that.
Requests are carried out one after the other in one thread, as each changes what the next one starts from; the loop
stays free to accept connections.

    curl --unix-socket /run/gangway/netns-COOKIE/gangway.sock http://localhost/mappings
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from gangway.daemon import messages
from gangway.daemon.doctor import Check
from gangway.daemon.messages import (
    AttachRequest,
    CheckAnswer,
    EndpointAnswer,
    ErrorAnswer,
    ExplainAnswer,
    MappingAnswer,
    NetworkAnswer,
    NetworkRequest,
    PublishRequest,
    RouteAnswer,
)
from gangway.errors import Conflict, GangwayError, HostRefused, InvalidRequest, PortInUse, Unsupported
from gangway.log import Log
from gangway.model import PortRange, Protocol, Source, parse_address
from gangway.state.requests import Requests

# The version of the API, not of gangway.
_VERSION = "1.0"
_STATUS = {InvalidRequest: 400, Conflict: 409, PortInUse: 409, HostRefused: 500, Unsupported: 501}


class Service(NamedTuple):
    """What the API serves."""

    requests: Requests
    checks: Callable[[], Iterable[Check]]
    names: Callable[[], Awaitable[dict[str, str]]]
    """Return the names of Docker's containers, by address."""


class Operation(NamedTuple):
    """An operation.  `call(service, request, parameters of path and query)` returns the answer."""

    method: str
    path: str
    summary: str
    call: Callable[[Service, Any, dict[str, str]], Any]
    answer: Any
    request: type[msgspec.Struct] | None = None
    query: tuple[str, ...] = ()


def _network(service: Service, name: str) -> NetworkAnswer:
    return NetworkAnswer.of(service.requests.network(name), service.requests.endpoints(name))


def _list_networks(service: Service, _request: None, _given: dict[str, str]) -> list[NetworkAnswer]:
    return [_network(service, network.name) for network in service.requests.networks()]


def _inspect_network(service: Service, _request: None, given: dict[str, str]) -> NetworkAnswer:
    return _network(service, given["name"])


def _create_network(service: Service, request: NetworkRequest, _given: dict[str, str]) -> NetworkAnswer:
    return _network(service, service.requests.create_network(request.network()).name)


def _remove_network(service: Service, _request: None, given: dict[str, str]) -> None:
    service.requests.remove_network(given["name"])


def _list_endpoints(service: Service, _request: None, _given: dict[str, str]) -> list[EndpointAnswer]:
    return [EndpointAnswer.of(endpoint) for endpoint in service.requests.endpoints()]


def _attach(service: Service, request: AttachRequest, _given: dict[str, str]) -> EndpointAnswer:
    addresses = [parse_address(text) for text in request.addresses]
    endpoint = service.requests.attach(request.container, request.network or None, addresses, request.namespace or None)
    return EndpointAnswer.of(endpoint)


def _detach(service: Service, _request: None, given: dict[str, str]) -> None:
    service.requests.detach(given["container"])


def _list_mappings(service: Service, _request: None, given: dict[str, str]) -> list[MappingAnswer]:
    found = service.requests.mappings(given.get("container"))
    return [MappingAnswer.of(planned, service.requests.redirected(planned)) for planned in found]


def _publish(service: Service, request: PublishRequest, _given: dict[str, str]) -> list[MappingAnswer]:
    if not request.ports:
        raise InvalidRequest("nothing to publish: name ports with -p")
    return [MappingAnswer.of(planned) for planned in service.requests.publish(request.container, request.ports)]


def _unpublish(service: Service, request: PublishRequest, _given: dict[str, str]) -> list[MappingAnswer]:
    return [MappingAnswer.of(planned) for planned in service.requests.unpublish(request.container, request.ports)]


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
    network = found.network
    name, gateways = (network.name, list(map(str, network.gateways))) if network else ("", [])
    answer = MappingAnswer.of(found.planned, service.requests.redirected(found.planned), routes)
    return ExplainAnswer(str(address), ports.first, service.requests.facts.firewall.value, name, gateways, answer)


def _doctor(service: Service, _request: None, _given: dict[str, str]) -> list[CheckAnswer]:
    return [CheckAnswer(*check) for check in service.checks()]


OPERATIONS = (
    Operation("GET", "/networks", "List networks.", _list_networks, list[NetworkAnswer]),
    Operation("POST", "/networks", "Create a network.", _create_network, NetworkAnswer, NetworkRequest),
    Operation("GET", "/networks/{name}", "Show a network.", _inspect_network, NetworkAnswer),
    Operation("DELETE", "/networks/{name}", "Remove a network that has no containers.", _remove_network, None),
    Operation("GET", "/endpoints", "List endpoints.", _list_endpoints, list[EndpointAnswer]),
    Operation("POST", "/endpoints", "Attach a container to a network.", _attach, EndpointAnswer, AttachRequest),
    Operation(
        "DELETE",
        "/endpoints/{container}",
        "Detach a container, and delete its mappings.  In the path, `/` is %2F.",
        _detach,
        None,
    ),
    Operation(
        "GET",
        "/mappings",
        "List all mappings, or a container's.",
        _list_mappings,
        list[MappingAnswer],
        query=("container",),
    ),
    Operation("POST", "/mappings", "Publish ports.", _publish, list[MappingAnswer], PublishRequest),
    Operation(
        "POST",
        "/mappings/withdraw",
        "Delete mappings of a container: those that are named, or all.",
        _unpublish,
        list[MappingAnswer],
        PublishRequest,
    ),
    Operation(
        "GET",
        "/explain",
        "Explain how clients of HOST-IP:PORT[/PROTO] reach the container.",
        _explain,
        ExplainAnswer,
        query=("at", "from"),
    ),
    Operation(
        "GET",
        "/doctor",
        "Show what this host supports, and the consequences of what it does not.",
        _doctor,
        list[CheckAnswer],
    ),
)


def application(service: Service, executor: Executor, log: Log, done: Callable[[], None]) -> web.Application:
    """Return the API.  `done` is called in the loop after each request that may have changed something."""
    app = web.Application()
    for operation in OPERATIONS:
        app.router.add_route(operation.method, operation.path, _handler(operation, service, executor, log, done))
    document = msgspec.json.encode(openapi())

    async def describe(_request: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/json")

    app.router.add_get("/openapi.json", describe)
    return app


def _handler(
    operation: Operation, service: Service, executor: Executor, log: Log, done: Callable[[], None]
) -> Callable[[web.Request], Awaitable[web.Response]]:
    decode = None if operation.request is None else msgspec.json.Decoder(operation.request).decode

    async def handle(request: web.Request) -> web.Response:
        given = {**request.query, **request.match_info}
        try:
            body = None if decode is None else decode(await request.read())
            answer = await asyncio.get_running_loop().run_in_executor(executor, operation.call, service, body, given)
        except msgspec.MsgspecError as error:
            return _refusal(400, ErrorAnswer("InvalidRequest", str(error)))
        except GangwayError as error:
            return _refusal(_STATUS[type(error)], ErrorAnswer(type(error).__name__, str(error)))
        except Exception as error:
            log.failure(error)
            return _refusal(500, ErrorAnswer("HostRefused", _in_one_line(error)))
        if operation.method != "GET":
            done()
        await _name_leases(answer, service.names)
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    return handle


async def _name_leases(answer: Any, names: Callable[[], Awaitable[dict[str, str]]]) -> None:
    """Fill in the names of Docker's containers, where its API can be read."""
    mappings = [answer.mapping] if isinstance(answer, ExplainAnswer) else answer if isinstance(answer, list) else []
    leases = [one for one in mappings if isinstance(one, MappingAnswer) and one.source == Source.LEASE]
    known = await names() if leases else {}
    for lease in leases:
        name = known.get(lease.container_address)
        lease.container = f"docker:{name}" if name else ""


def _refusal(status: int, answer: ErrorAnswer) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(answer), content_type="application/json")


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ExceptionGroup):
        first, *rest = map(str, error.exceptions)
        return f"{first} ({error.message}: {'; '.join(rest)})"
    return f"internal error: {error!r}; the daemon's log has the details"


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document (spec.openapis.org/oas/v3.1.0)."""
    types = [operation.answer for operation in OPERATIONS if operation.answer is not None]
    types += [operation.request for operation in OPERATIONS if operation.request is not None]
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorAnswer], ref_template="#/components/schemas/{name}"
    )
    schema = dict(zip(map(repr, [*types, ErrorAnswer]), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gangway", "version": _VERSION},
        "paths": paths,
        "components": {"schemas": components},
    }


def _described(operation: Operation, schema: dict[str, Any]) -> dict[str, Any]:
    def body(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": {"type": "null"} if kind is None else schema[repr(kind)]}}

    in_path = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    text = {"schema": {"type": "string"}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [
            *({"name": name, "in": "path", "required": True, **text} for name in in_path),
            *({"name": name, "in": "query", **text} for name in operation.query),
        ],
        "responses": {
            "200": {"description": "OK", "content": body(operation.answer)},
            "default": {"description": "Request failed; no changes were made", "content": body(ErrorAnswer)},
        },
    }
    if operation.request is not None:
        described["requestBody"] = {"required": True, "content": body(operation.request)}
    return described
