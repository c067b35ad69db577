"""The daemon's HTTP API, on two unix sockets: one for everything, one for reading.

Requests that change something are carried out one after the other in one thread, as each changes what the next one
starts from; questions (GET) in another one, so that they are answered meanwhile.  The loop stays free to accept
connections.

    curl --unix-socket /run/gangway/netns-COOKIE/gangway.sock http://localhost/mappings
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

import msgspec
from aiohttp import web

from gangway.daemon.messages import ErrorAnswer, ExplainAnswer, MappingAnswer
from gangway.daemon.openapi import openapi
from gangway.daemon.operations import OPERATIONS, Operation, Service
from gangway.errors import (
    Conflict,
    Forbidden,
    GangwayError,
    HostRefused,
    InvalidRequest,
    PortInUse,
    TimedOut,
    Unsupported,
)
from gangway.log import Log
from gangway.model import Source
from gangway.peers import peer_credentials
from gangway.runtime import API_SOCKET

_MAX_ERROR_CHARACTERS = 1000
_STATUS = {InvalidRequest: 400, Forbidden: 403, Conflict: 409, PortInUse: 409}
_STATUS |= {HostRefused: 500, Unsupported: 501, TimedOut: 503}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(
    service: Service,
    worker: Executor,
    reader: Executor,
    log: Log,
    done: Callable[[], None],
    is_for_reading: bool = False,
) -> web.Application:
    """Return the API, perhaps without what changes anything.  The worker carries out requests, and the reader answers
    questions.

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
                    raise Forbidden("only root may do this")
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

    app = web.Application(middlewares=[_refuse_in_json, *([_refuse_changes] if is_for_reading else [])])
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
async def _refuse_changes(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer questions only."""
    if request.method == "GET":
        return await handler(request)
    text = f"{request.method} {request.path}: this socket is for reading; send changes to {API_SOCKET}"
    return _refusal(Forbidden(text))


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
