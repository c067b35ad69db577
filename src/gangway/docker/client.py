"""A client of Docker's API on its Unix socket.

Paths have no version: dockerd 20.10 to 29 then answers as its own version does, and the fields used here are the same.
"""

import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlencode

import aiohttp
import msgspec

from gangway.docker.wanted import DockerContainer, DockerNetwork, ListedContainer
from gangway.errors import GangwayError, HostRefused

_TIMEOUT_S = 10.0
_NAMES_TIMEOUT_S = 1.0
_CONNECTIONS = 8  # how many containers are read at a time
_LONGEST_EVENT = 1 << 20  # bytes; a container's labels are in its events
_ACTIONS = ("start", "die", "destroy", "rename", "create", "connect", "disconnect")

_Answer = TypeVar("_Answer")


class AnswerRefused(HostRefused):
    """dockerd answered with an error, or with something that is not understood; others may still be answered."""


class _Actor(msgspec.Struct, rename="pascal"):
    id: str = msgspec.field(name="ID")
    attributes: dict[str, str] | None = None


class Event(msgspec.Struct, rename="pascal"):
    """What happened to a container or network."""

    type: str  # `container` or `network`
    action: str  # one of those of docker-events(1)
    actor: _Actor

    @property
    def container(self) -> str:
        """The container's id; empty if a network was created or destroyed."""
        return self.actor.id if self.type == "container" else self._attribute("container")

    @property
    def container_name(self) -> str:
        """The container's name, after the event; empty if the event is a network's."""
        return self._attribute("name") if self.type == "container" else ""

    def _attribute(self, name: str) -> str:
        return (self.actor.attributes or {}).get(name, "")


class _Swarm(msgspec.Struct):
    state: str = msgspec.field(name="LocalNodeState", default="inactive")


class Info(msgspec.Struct):
    """What `/info` says of dockerd."""

    version: str = msgspec.field(name="ServerVersion", default="")
    is_live_restoring: bool = msgspec.field(name="LiveRestoreEnabled", default=False)
    swarm: _Swarm = msgspec.field(name="Swarm", default_factory=_Swarm)

    @property
    def is_swarm(self) -> bool:
        """True if dockerd takes part in a swarm."""
        return self.swarm.state not in ("", "inactive")


class Events:
    """The stream of events about containers and networks, from the moment of its request on."""

    def __init__(self, path: str, answer: aiohttp.ClientResponse) -> None:
        self._path, self._content = path, answer.content
        self.engine = answer.headers.get("Server", "unknown engine").partition(" ")[0]  # `Docker/20.10.24`
        self._rest = b""

    async def read(self) -> list[Event]:
        """Wait for events, and return all that have come since the last call.  HostRefused: the stream has ended.

        A call that is cancelled loses none.
        """
        with _named_errors(self._path):
            data = await self._content.readany()
        if not data:
            raise HostRefused(f"Docker's API {self._path}: cannot be read (connection closed)")
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [_decode(self._path, "/events", line, Event) for line in lines if line.strip()]


class DockerClient:
    """A connection to dockerd, for an `async with` block.  Every method may raise HostRefused: it cannot be read."""

    def __init__(self, path: str, timeout_s: float = _TIMEOUT_S) -> None:
        self._path, self._timeout = path, aiohttp.ClientTimeout(total=timeout_s)

    async def __aenter__(self) -> Self:
        connector = aiohttp.UnixConnector(path=self._path, limit=_CONNECTIONS)
        self._session = aiohttp.ClientSession("http://docker", connector=connector, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def info(self) -> Info:
        return await self._get("/info", Info)

    async def networks(self) -> list[DockerNetwork]:
        return await self._get("/networks", list[DockerNetwork])

    async def containers(self) -> list[ListedContainer]:
        """Return all containers, also those that do not run."""
        return await self._get("/containers/json?all=1", list[ListedContainer])

    async def container(self, container_id: str) -> DockerContainer | None:
        """Return a container; None if there is none with this id.  AnswerRefused: only this one cannot be read."""
        return await self._get(f"/containers/{container_id}/json", DockerContainer | None)  # type: ignore[arg-type]

    @asynccontextmanager
    async def events(self) -> AsyncIterator[Events]:
        """Follow the events.

        dockerd answers just before it subscribes: so it is asked for those since the request, of which it keeps 256.
        """
        filters = json.dumps({"type": ["container", "network"], "event": _ACTIONS})
        query = urlencode({"since": f"{time.time():.9f}", "filters": filters})
        unlimited = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout.total)
        with _named_errors(self._path):
            answer = await self._session.get(f"/events?{query}", timeout=unlimited, read_bufsize=_LONGEST_EVENT)
        async with answer:
            if answer.status != 200:
                raise HostRefused(_refusal(self._path, "/events", answer.status, await answer.read()))
            yield Events(self._path, answer)

    async def _get(self, target: str, kind: type[_Answer]) -> _Answer:
        with _named_errors(self._path):
            async with self._session.get(target) as answer:
                body = await answer.read()
        if answer.status == 404:
            body = b"null"
        elif answer.status != 200:
            raise AnswerRefused(_refusal(self._path, target, answer.status, body))
        return _decode(self._path, target, body, kind)


async def names_by_address(path: str) -> dict[str, str]:
    """Return the name of each container by its addresses; nothing where Docker's API cannot be read."""
    with suppress(GangwayError):
        async with DockerClient(path, _NAMES_TIMEOUT_S) as client:
            return {address: one.name for one in await client.containers() for address in one.addresses()}
    return {}


def _decode(path: str, target: str, body: bytes, kind: type[_Answer]) -> _Answer:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise AnswerRefused(f"Docker's API {path}: the answer to {target} is not understood: {error}") from None


def _refusal(path: str, target: str, status: int, body: bytes) -> str:
    said: Any = body.decode(errors="replace").strip()
    with suppress(ValueError, LookupError, TypeError):
        said = json.loads(said)["message"]
    return f"Docker's API {path}: {target} failed with status {status}: {said}"


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        reason = "it does not answer"
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError):
        reason = "connection closed"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        cause = getattr(error, "os_error", error)
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    else:
        return
    raise HostRefused(f"Docker's API {path}: cannot be read ({reason})")
