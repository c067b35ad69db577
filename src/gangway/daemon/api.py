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
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from gangway.daemon import audit
from gangway.daemon.audit import NOBODY, Client, Described, client_of
from gangway.daemon.messages import ErrorAnswer, ExplainAnswer, HealthAnswer, MappingAnswer
from gangway.daemon.openapi import openapi
from gangway.daemon.operations import OPERATIONS, Operation, Service
from gangway.daemon.streams import Streams
from gangway.errors import (
    Busy,
    Conflict,
    Forbidden,
    GangwayError,
    HostRefused,
    InvalidRequest,
    PortInUse,
    TimedOut,
    Unsupported,
)
from gangway.log import LEVELS, Log
from gangway.model import Source
from gangway.runtime import API_SOCKET

_MAX_ERROR_CHARACTERS = 1000
_CARRY_OUT_S = 30.0  # how long a daemon that ends waits for requests that are being carried out
_STATUS: dict[type, int] = {InvalidRequest: 400, Forbidden: 403, Conflict: 409, PortInUse: 409}
_STATUS |= {HostRefused: 500, Unsupported: 501, TimedOut: 503, Busy: 503}
_INTERNAL = "internal error: {!r}; the daemon's log has the details"

_Decode = Callable[[bytes], Any]


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
    handlers = Handlers(service, worker, reader, log, done, is_for_reading)

    async def describe(_request: web.Request) -> web.Response:
        return web.json_response(body=document)

    app = web.Application()
    for operation in OPERATIONS:
        app.router.add_route(*operation.route, partial(handlers.handle, operation, _decoder(operation)))
    app.router.add_get("/openapi.json", describe)
    app.on_shutdown.append(handlers.end)
    return app


class Handlers:
    """Has requests carried out, and answers and logs them."""

    def __init__(
        self,
        service: Service,
        worker: Executor,
        reader: Executor,
        log: Log,
        done: Callable[[], None],
        is_for_reading: bool,
    ) -> None:
        self._service, self._worker, self._reader, self._log, self._done = service, worker, reader, log, done
        self._is_for_reading = is_for_reading
        self._streams = Streams()
        self._running: set[asyncio.Future[Any]] = set()  # what the executors carry out, or will

    async def end(self, _app: web.Application) -> None:
        """End the streams, and wait for what is being carried out, so that its clients get an answer."""
        self._streams.end()
        if self._running:
            await asyncio.wait(self._running, timeout=_CARRY_OUT_S)

    async def handle(self, operation: Operation, decode: _Decode | None, request: web.Request) -> web.StreamResponse:
        client, is_change = _client(request), request.method != "GET"
        try:
            self._check_allowed(operation, client, is_change)
            body = None if decode is None else decode(await request.read())
            given = operation.given(request.query.items()) | request.match_info
            answer = await self._call(operation, body, given)
        except web.HTTPException:
            raise
        except Exception as error:
            return _refuse(request, client, _in_one_line(error, self._log), self._log)
        if operation.is_stream:
            return await self._streams.send(request, answer)
        if is_change:
            self._log.write(audit.carried_out(_described(operation, given, body, answer), client))
            self._done()
        await _name_leases(answer, self._service.names)
        status = 503 if isinstance(answer, HealthAnswer) and not answer.is_healthy else 200
        return web.json_response(body=msgspec.json.encode(answer), status=status)

    def _check_allowed(self, operation: Operation, client: Client, is_change: bool) -> None:
        if is_change and self._is_for_reading:
            raise Forbidden(f"this socket is for reading; send changes to {API_SOCKET}")
        if operation.is_roots and client.uid != os.geteuid():
            raise Forbidden("only root may do this")
        if operation.is_stream:
            self._streams.check_room()

    async def _call(self, operation: Operation, body: Any, given: dict[str, str]) -> Any:
        if operation.is_instant or operation.is_stream:
            return operation.call(self._service, body, given)
        is_question = operation.route[0] == "GET" and self._service.requests.is_ready
        executor = self._reader if is_question else self._worker
        call = partial(operation.call, self._service, body, given)
        running = asyncio.get_running_loop().run_in_executor(executor, call)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await running


def _decoder(operation: Operation) -> _Decode | None:
    return None if operation.request is None else msgspec.json.Decoder(operation.request).decode


def _client(request: web.BaseRequest) -> Client:
    sock = request.transport.get_extra_info("socket") if request.transport else None
    return NOBODY if sock is None else client_of(sock)


def _described(operation: Operation, given: dict[str, str], body: Any, answer: Any) -> Described:
    """Say what a request has done."""
    if operation.describe is None:
        return audit.requested(operation.pattern)
    values = msgspec.structs.asdict(body) if body else {}
    return operation.describe(values | given, answer)


async def _name_leases(answer: Any, names: Callable[[], Awaitable[dict[str, str]]]) -> None:
    """Fill in the names of Docker's containers, where its API can be read."""
    mappings = [answer.mapping] if isinstance(answer, ExplainAnswer) else answer if isinstance(answer, list) else []
    leases = [one for one in mappings if isinstance(one, MappingAnswer) and one.source == Source.LEASE]
    known = await names() if leases else {}
    for lease in leases:
        name = known.get(lease.container_address)
        lease.container = f"docker:{name}" if name else ""


class Connection(web.RequestHandler):
    """A client's connection: what the HTTP server refuses is answered as every other error."""

    def __init__(self, log: Log, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._log = log

    def log_exception(self, *args: Any, **named: Any) -> None:
        """Log what the HTTP server did not expect."""
        if isinstance(error := named.get("exc_info"), BaseException):
            self._log.failure(error)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):  # an unknown path, for example
            text = f"{request.method} {request.path}: {resp.reason}; GET /openapi.json describes the API"
            refused = _refuse(request, _client(request), InvalidRequest(text), self._log, resp.status)
            refused.headers.update({name: resp.headers[name] for name in ("Allow",) if name in resp.headers})
            resp = refused
        if self._log.level >= LEVELS["debug"]:
            self._log.write(audit.answered(request.method, request.path, resp.status, _client(request)))
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0 or isinstance(exc, ConnectionError):
            raise ConnectionError("an answer was sent already, or the client has closed the connection")
        if status < 500:
            error = InvalidRequest(f"invalid HTTP request: {message or exc}")
            refused = _refuse(request, _client(request), error, self._log, status)
        else:
            if exc is not None:
                self._log.failure(exc)
            refused = _refuse(request, _client(request), HostRefused(_INTERNAL.format(exc)), self._log)
        refused.force_close()
        return refused


def _refuse(
    request: web.BaseRequest, client: Client, error: GangwayError, log: Log, status: int | None = None
) -> web.Response:
    """Log a request that failed, and return its answer: one line, however long the request's values are.

    A client that is refused again and again neither fills the log nor displaces the events that are kept.
    """
    text = " ".join(str(error).splitlines())
    if len(text) > _MAX_ERROR_CHARACTERS:
        half = _MAX_ERROR_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    kind = next(
        one for one in type(error).__mro__ if one in _STATUS
    )  # a part of the daemon may have a more precise one
    answer, status = ErrorAnswer(kind.__name__, text), status or _STATUS[kind]
    refused = audit.refused(request.method, request.path, status, answer, client)
    log.write_limited(refused, f"{refused.name} {answer.kind} {client.uid}")
    return web.json_response(body=msgspec.json.encode(answer), status=status)


def _in_one_line(error: Exception, log: Log) -> GangwayError:
    """Return the error that a client is told of; what is unexpected is logged with its traceback."""
    if isinstance(error, GangwayError):
        return error
    if isinstance(error, msgspec.MsgspecError):
        return InvalidRequest(str(error))
    log.failure(error)
    if isinstance(error, ExceptionGroup):
        first, *rest = map(str, error.exceptions)
        return HostRefused(f"{first} ({error.message}: {'; '.join(rest)})")
    return HostRefused(_INTERNAL.format(error))
