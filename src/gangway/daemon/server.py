"""The HTTP server of the daemon's API.  It takes a dozen megabytes, which a daemon with leases only does not need."""

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

from aiohttp import web

from gangway.daemon.api import Connection, application
from gangway.daemon.home import BACKLOG, Home
from gangway.daemon.operations import Service
from gangway.log import Log

# How long a daemon that ends waits for clients that do not read their answers, and then again for their requests, which
# are cancelled.  The default, 60 s, is longer than commands and service managers wait for its end.
_UNREAD_S = 1.0


async def serve(home: Home, service: Service, worker: Executor, log: Log, changed: Callable[[], None]) -> None:
    """Serve clients of both sockets until cancelled; answers that are on their way are sent to those that read."""
    with ThreadPoolExecutor(1, "reader") as reader:
        api = partial(application, service, worker, reader, log, changed)
        async with asyncio.TaskGroup() as servers:  # which waits for both
            for listener, is_for_reading in ((home.api, False), (home.reading, True)):
                servers.create_task(_serve(api(is_for_reading=is_for_reading), listener, log))


async def _serve(app: web.Application, listener: socket.socket, log: Log) -> None:
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_UNREAD_S)
    await runner.setup()
    try:
        loop = asyncio.get_running_loop()
        create = partial(Connection, log, runner.server, loop=loop, access_log=None)
        server = await loop.create_server(create, sock=listener, backlog=BACKLOG)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
    finally:
        await runner.cleanup()
