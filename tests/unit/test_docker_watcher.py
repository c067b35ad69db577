"""How Docker's API is read, and what is stated when it changes: with an API whose answers are set here."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gangway.docker.activation import listens_at, would_start_dockerd
from gangway.docker.client import AnswerRefused, DockerClient, names_by_address
from gangway.docker.lookup import find_container
from gangway.docker.watcher import Watcher
from gangway.errors import Conflict, HostRefused
from gangway.log import Log
from gangway.state.adopted import Adopted
from tests.unit.fake_docker import FakeDocker

NETWORK = {"Id": "net1", "Name": "web", "Driver": "bridge", "IPAM": {"Config": [{"Subnet": "10.5.0.0/24"}]}}


def container(name: str, address: str) -> dict[str, Any]:
    """Return a running container, as it is in the list and by itself."""
    networks = {"Networks": {"web": {"NetworkID": "net1", "IPAddress": address}}}
    said = {"Id": name, "Name": f"/{name}", "Names": [f"/{name}"], "State": {"Running": True, "Pid": 17}}
    return said | {"Config": {}, "HostConfig": {}, "NetworkSettings": networks}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "docker.sock"


class Stated:
    """What a watcher states and logs; it waits for `may_adopt` before each statement."""

    def __init__(self) -> None:
        self.all: list[Adopted] = []
        self.lines: list[str] = []
        self.may_adopt = asyncio.Event()
        self.may_adopt.set()
        self._changed = asyncio.Condition()

    async def adopt(self, adopted: Adopted) -> None:
        await self.may_adopt.wait()
        async with self._changed:
            self.all.append(adopted)
            self._changed.notify_all()

    async def names(self, count: int) -> list[str]:
        """Wait for the statement with this number, and return its containers' names."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.all) >= count)
        return [one.endpoint.container.removeprefix("docker:") for one in self.all[count - 1].containers]


@asynccontextmanager
async def watching(path: Path, has_rules: bool = True) -> AsyncIterator[tuple[Watcher, Stated]]:
    stated = Stated()
    watcher = Watcher(str(path), stated.adopt, Log(lambda event: stated.lines.append(event.text)), has_rules)
    task = asyncio.create_task(watcher.run())
    try:
        yield watcher, stated
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert "internal error" not in "".join(stated.lines)


def in_loop(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """Run an asynchronous test."""

    def run(path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(path), 20))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_loop
async def test_errors_name_the_socket_and_the_reason(path: Path) -> None:
    async with DockerClient(str(path)) as client:
        with pytest.raises(HostRefused, match=rf"Docker's API {path}: cannot be read \(No such file or directory\)$"):
            await client.networks()
        with socket.socket(socket.AF_UNIX) as unused:
            unused.bind(str(path))
            with pytest.raises(HostRefused, match=r"cannot be read \(Connection refused\)$"):
                await client.networks()
            with pytest.raises(HostRefused, match=r"cannot be read \(Connection refused\)$"):
                async with client.events():
                    pass
            unused.listen()
            async with DockerClient(str(path), timeout_s=0.05) as hasty:
                with pytest.raises(HostRefused, match=r"cannot be read \(it does not answer\)$"):
                    await hasty.networks()
    async with FakeDocker(path) as docker, DockerClient(str(path)) as client:
        docker.status["/networks"] = 500
        with pytest.raises(AnswerRefused, match="/networks failed with status 500: it broke"):
            await client.networks()
        docker.containers["odd"] = {"Id": 5}
        with pytest.raises(AnswerRefused, match="the answer to /containers/odd/json is not understood: "):
            await client.container("odd")
        assert await client.container("none") is None


@in_loop
async def test_names_of_running_containers_by_address(path: Path) -> None:
    assert await names_by_address(str(path)) == {}
    async with FakeDocker(path) as docker:
        docker.containers = {"one": container("one", "10.5.0.2"), "two": {"Names": None}}
        assert await names_by_address(str(path)) == {"10.5.0.2": "one"}


@in_loop
async def test_events_are_read_as_they_come(path: Path) -> None:
    async with FakeDocker(path) as docker, DockerClient(str(path)) as client, client.events() as events:
        assert events.engine == "Docker/99.1"
        assert float(docker.query["since"]) > 1e9
        assert "start" in json.loads(docker.query["filters"])["event"]
        docker.happen("container", "start", "one")
        first = await events.read()
        docker.send(b'{"Type": "network", "Action": "connect", "Actor": ')
        assert await events.read() == []  # half an event
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(events.read(), 0.01)  # which is cancelled then
        docker.send(b'{"ID": "net1", "Attributes": {"container": "two"}}}\n{"Type": "network", "Action": "destroy"')
        docker.send(b', "Actor": {"ID": "net1", "Attributes": null}}\n')
        found = [*first]
        while len(found) < 3:
            found += await events.read()
        assert [(one.action, one.container) for one in found] == [("start", "one"), ("connect", "two"), ("destroy", "")]
        docker.end_stream()
        with pytest.raises(HostRefused, match="connection closed"):
            await events.read()


@in_loop
async def test_only_what_an_event_concerns_is_read(path: Path) -> None:
    async with FakeDocker(path) as docker:
        docker.networks = [NETWORK]
        docker.containers = {"one": container("one", "10.5.0.2")}
        async with watching(path) as (_, stated):
            assert await stated.names(1) == ["one"]
            docker.requests.clear()
            docker.containers["two"] = container("two", "10.5.0.3")
            docker.happen("network", "connect", "net1", container="two")  # before its start: it cannot be read yet
            assert await stated.names(2) == ["one"]
            docker.happen("container", "start", "two")
            assert await stated.names(3) == ["one", "two"]
            docker.happen("network", "disconnect", "net1", container="one")
            assert await stated.names(4) == ["two", "one"]
            docker.happen("container", "die", "one")
            assert await stated.names(5) == ["two"]
            assert stated.all[-1].stopped == {"one": "docker:one"}
            docker.containers["two"]["Name"] = "/second"
            docker.happen("container", "rename", "two", name="second")
            assert await stated.names(6) == ["second"]
            assert stated.all[-1].containers[0].id == "two"
            docker.happen("container", "destroy", "one")
            assert await stated.names(7) == ["second"]
            assert not stated.all[-1].stopped
            docker.networks = []
            docker.happen("network", "destroy", "net1")
            assert await stated.names(8) == []
            assert docker.requests == [f"/containers/{one}/json" for one in ("two", "one", "two")] + ["/networks"]


@in_loop
async def test_events_that_come_together_are_handled_together(path: Path) -> None:
    async with FakeDocker(path) as docker:
        docker.networks = [NETWORK]
        async with watching(path) as (_, stated):
            assert await stated.names(1) == []
            stated.may_adopt.clear()
            docker.happen("network", "create", "net2")  # its statement waits
            while docker.requests.count("/networks") < 2:
                await asyncio.sleep(0)
            docker.containers = {f"c{number}": container(f"c{number}", f"10.5.0.{number}") for number in range(2, 52)}
            for name in docker.containers:
                docker.happen("container", "start", name)
                docker.happen("network", "connect", "net1", container=name)
            del docker.containers["c7"]  # it has ended meanwhile
            docker.happen("container", "die", "c8")
            docker.requests.clear()
            while not docker.is_sent:
                await asyncio.sleep(0)
            stated.may_adopt.set()
            wanted = {*docker.containers} - {"c8"}
            number = 3  # the events may come in two or three pieces
            while {*await stated.names(number)} != wanted:
                number += 1
            assert len(docker.requests) < 60  # one by one it would be 98


@in_loop
async def test_container_that_cannot_be_read_keeps_no_other_from_being_served(path: Path) -> None:
    async with FakeDocker(path) as docker:
        docker.networks = [NETWORK]
        docker.containers = {name: container(name, f"10.5.0.{number}") for number, name in enumerate("abc", 2)}
        docker.status["/containers/b/json"] = 500
        async with watching(path) as (watcher, stated):
            assert sorted(await stated.names(1)) == ["a", "c"]
            assert "/containers/b/json failed with status 500: it broke" in "".join(stated.lines)
            docker.networks = [NETWORK, NETWORK | {"Id": "net2", "Name": "a b"}]
            for _ in range(2):
                docker.happen("network", "create", "net2")
                await stated.names(len(stated.all) + 1)
            assert sum("network a b of Docker's is not served" in line for line in stated.lines) == 1
            assert "a b" in watcher.problem
            assert watcher.summary == f"Docker/99.1 at {path}: 1 network, 2 running containers"


@in_loop
async def test_without_rules_containers_are_stated_without_their_ports(path: Path) -> None:
    """What gangway could not serve of the rest is dockerd's concern."""
    async with FakeDocker(path) as docker:
        docker.networks = [NETWORK, NETWORK | {"Id": "net2", "Name": "a b"}]
        docker.containers = {"one": container("one", "10.5.0.2")}
        docker.containers["one"]["NetworkSettings"]["Ports"] = {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8000"}]}
        async with watching(path, has_rules=False) as (watcher, stated):
            assert await stated.names(1) == ["one"]
            assert [one.mappings for one in stated.all[0].containers] == [()]
            assert [one.has_rules for one in stated.all[0].networks] == [False]
            assert not watcher.problem
            assert stated.lines[0].startswith("Docker's containers are followed: Docker/99.1")


@in_loop
async def test_container_is_looked_up_or_the_reason_named(path: Path) -> None:
    def find(name: str) -> Adopted:
        return find_container(str(path), name)

    with pytest.raises(HostRefused, match=r"container web cannot be looked up: .*No such file.*set socket in table"):
        await asyncio.to_thread(find, "web")
    async with FakeDocker(path) as docker:
        docker.networks = [NETWORK, NETWORK | {"Id": "net2", "Name": "other"}]
        docker.containers = {name: container(name, "10.5.0.2") for name in ("web", "c0ffee", "host", "shared", "none")}
        docker.containers["ended"] = container("ended", "") | {"State": {"Running": False, "Pid": 0}}
        docker.containers["c0ffee"]["Name"] = "/tea"
        for name, mode in (("host", "host"), ("shared", "container:0123456789abcdef"), ("none", "none")):
            docker.containers[name] |= {"HostConfig": {"NetworkMode": mode}, "NetworkSettings": {"Networks": {}}}
        found = await asyncio.to_thread(find, "web")
        assert [(one.id, one.endpoint.container, one.mappings) for one in found.containers] == [
            ("web", "docker:web", ())
        ]
        for name, reason in {
            "nobody": "no container named 'nobody'",
            "ended": "container ended does not run: docker start ended",
            "c0ffee": "container c0ffee is named tea: use its name",
            "host": "is on the host's network: its ports are the host's own",
            "shared": r"shares the network of another container \(0123456789ab\)",
            "none": "container none is on no bridge network$",
        }.items():
            with pytest.raises(Conflict, match=reason):
                await asyncio.to_thread(find, name)


def test_process_that_listens_at_a_path_is_found(tmp_path: Path) -> None:
    path, link = tmp_path / "run" / "docker.sock", tmp_path / "var-run"
    path.parent.mkdir()
    link.symlink_to(path.parent)
    assert not listens_at(str(path), os.getpid())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(link / "docker.sock"))
        assert not listens_at(str(path), os.getpid())
        sock.listen()
        for name in (path, link / "docker.sock"):
            assert listens_at(str(name), os.getpid())
            assert not listens_at(str(name), os.getppid())
        assert not would_start_dockerd(str(path))  # it is not systemd that listens


def test_dockerd_that_was_stopped_is_not_started_by_a_connection(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_stopped = True
    monkeypatch.setattr("gangway.docker.watcher.would_start_dockerd", lambda _: is_stopped)

    async def test() -> None:
        nonlocal is_stopped
        async with FakeDocker(path) as docker, watching(path) as (watcher, stated):
            while not stated.lines:
                await asyncio.sleep(0.01)
            assert watcher.problem == f"Docker's API {path}: cannot be read (dockerd is stopped)"
            assert not docker.query
            is_stopped = False
            await stated.names(1)
            assert docker.query

    asyncio.run(test())


@in_loop
async def test_everything_is_read_again_after_the_stream_broke(path: Path) -> None:
    """What was stated stays until then."""
    async with watching(path) as (watcher, stated):
        while not stated.lines:
            await asyncio.sleep(0.01)
        async with FakeDocker(path) as docker:
            docker.networks = [NETWORK]
            docker.containers = {"one": container("one", "10.5.0.2")}
            assert await stated.names(1) == ["one"]
            assert not watcher.problem
        while "connection closed" not in watcher.problem:
            await asyncio.sleep(0.01)
        assert len(stated.all) == 1
        async with FakeDocker(path) as docker:
            docker.networks = [NETWORK]
            docker.containers = {"two": container("two", "10.5.0.2")}
            assert await stated.names(2) == ["two"]
            assert not watcher.problem
    assert [line.rpartition(" (")[2] for line in stated.lines if "retried" in line] == [
        "No such file or directory): retried",
        "connection closed): retried",
    ]
