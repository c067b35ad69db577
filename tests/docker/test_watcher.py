"""What the watcher states of a real dockerd's networks and containers, with what is stated recorded."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gangway.docker.watcher import Watcher
from gangway.errors import HostRefused
from gangway.log import Log
from gangway.state.adopted import Adopted
from lab.dockerd import Dockerd
from lab.engines import engine_root
from lab.netns import Host
from lab.waiting import wait_until
from tests.docker.dockerhost import ENGINE_PARAMETERS, WITHOUT_RULES


class Recorder:
    """A watcher in a thread of its own; `adopted` is what it stated last."""

    def __init__(self, path: Path, refuse: Callable[[Adopted], bool] = lambda _: False) -> None:
        self._lines: list[str] = []
        self._refuse = refuse
        self.adopted = Adopted()
        self.watcher = Watcher(str(path), self._adopt, Log(lambda event: self._lines.append(event.text)))

    async def _adopt(self, adopted: Adopted) -> None:
        if self._refuse(adopted):
            raise HostRefused("not now")
        self.adopted = adopted

    @property
    def log(self) -> str:
        return "\n".join(self._lines)

    def ports(self) -> dict[str, str]:
        """Return each container's IPv4 address and its ports."""
        return {
            one.endpoint.container: " ".join(map(str, (one.endpoint.addresses[0], *one.mappings)))
            for one in self.adopted.containers
        }

    def networks(self) -> set[str]:
        return {one.name for one in self.adopted.networks}

    def wait_for(self, container: str, said: str | None) -> None:
        wait_until(lambda: self.ports().get(container) == said, f"{container} to have {said}, not {self.ports()}")


@contextmanager
def watching(path: Path, refuse: Callable[[Adopted], bool] = lambda _: False) -> Iterator[Recorder]:
    recorder = Recorder(path, refuse)
    loop = asyncio.new_event_loop()
    task = loop.create_task(recorder.watcher.run())

    def run() -> None:
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield recorder
        assert "internal error" not in recorder.log
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def run(docker: Dockerd, name: str, *flags: str) -> str:
    """Run a container and return what the watcher should call it."""
    docker.run("run", "-d", "--init", "--name", name, *flags, docker.image, "sleep", "1h")
    return f"docker:{name}"


def address(docker: Dockerd, name: str, network: str) -> str:
    form = f'{{{{(index .NetworkSettings.Networks "{network}").IPAddress}}}}'
    return docker.run("inspect", "-f", form, name).stdout.strip()


def namespaces(seen: Recorder) -> set[str]:
    return {one.namespace for one in seen.adopted.containers}


# Other releases' answers are those that the tests of adopted ports depend on.
@pytest.fixture(scope="module", params=ENGINE_PARAMETERS[:1])
def docker(request: pytest.FixtureRequest) -> Iterator[Dockerd]:
    root = engine_root(request.param) if request.param else None
    with Host() as host, Dockerd(host, None, *WITHOUT_RULES, engine=root) as made:
        yield made


@pytest.fixture(scope="module")
def seen(docker: Dockerd) -> Iterator[Recorder]:
    with watching(docker.socket) as recorder:
        wait_until(recorder.networks, "the networks")
        yield recorder


def test_ports_are_stated_for_as_long_as_a_container_runs(docker: Dockerd, seen: Recorder) -> None:
    web = run(docker, "web", "-p", "8000-8009:80-89", "-p", "127.0.0.1:53:53/udp")
    ports = "127.0.0.1:53:53/udp 0.0.0.0:8000-8009:80-89/tcp [::]:8000-8009:80-89/tcp"
    seen.wait_for(web, f"{address(docker, 'web', 'bridge')} {ports}")
    docker.run("rename", "web", "shop")
    seen.wait_for("docker:shop", f"{address(docker, 'shop', 'bridge')} {ports}")
    assert web not in seen.ports()
    docker.run("pause", "shop")
    docker.run("unpause", "shop")
    docker.run("kill", "shop")
    seen.wait_for("docker:shop", None)
    other = run(docker, "other")  # takes the address
    docker.run("start", "shop")
    seen.wait_for("docker:shop", f"{address(docker, 'shop', 'bridge')} {ports}")
    seen.wait_for(other, address(docker, "other", "bridge"))
    docker.run("restart", "-t", "0", "shop")
    docker.run("rm", "-f", "other")
    seen.wait_for(other, None)
    seen.wait_for("docker:shop", f"{address(docker, 'shop', 'bridge')} {ports}")
    docker.run("rm", "-f", "shop")
    seen.wait_for("docker:shop", None)


def test_container_that_restarts_itself_is_followed(docker: Dockerd, seen: Recorder) -> None:
    name = run(docker, "phoenix", "--restart", "always", "-p", "8100:80")
    wait_until(lambda: name in seen.ports(), "the container's first run")
    former = namespaces(seen)
    os.kill(docker.pid_of("phoenix"), signal.SIGKILL)
    wait_until(lambda: namespaces(seen) not in (former, set()), "the second run")
    seen.wait_for(name, f"{address(docker, 'phoenix', 'bridge')} 0.0.0.0:8100:80/tcp [::]:8100:80/tcp")
    docker.run("rm", "-f", "phoenix")
    seen.wait_for(name, None)


def test_networks_are_stated_and_the_connected_one_counts(docker: Dockerd, seen: Recorder) -> None:
    """A container's ports lead to its address on the network of its default route."""
    for name in ("beta", "alpha"):
        docker.run("network", "create", name)
    docker.run("network", "create", "--internal", "aaa")
    wait_until(
        lambda: seen.networks() == {"docker:bridge", "docker:beta", "docker:alpha", "docker:aaa"}, "all networks"
    )
    box = run(docker, "box", "-p", "8200:80", "--network", "beta")
    ports = "0.0.0.0:8200:80/tcp [::]:8200:80/tcp"
    seen.wait_for(box, f"{address(docker, 'box', 'beta')} {ports}")
    for name in ("alpha", "aaa"):
        docker.run("network", "connect", name, "box")
    seen.wait_for(box, f"{address(docker, 'box', 'alpha')} {ports}")
    docker.run("network", "disconnect", "alpha", "box")
    seen.wait_for(box, f"{address(docker, 'box', 'beta')} {ports}")
    alone = run(docker, "alone", "--network", "aaa")
    docker.run("network", "disconnect", "aaa", "alone")
    seen.wait_for(alone, None)
    docker.run("network", "connect", "beta", "alone")
    seen.wait_for(alone, address(docker, "alone", "beta"))
    docker.run("rm", "-f", "box", "alone")
    docker.run("network", "rm", "aaa", "alpha", "beta")
    wait_until(lambda: seen.networks() == {"docker:bridge"}, "the default network only")
    assert "timed out" not in seen.log


def test_what_could_not_be_served_is_stated_again(docker: Dockerd) -> None:
    answers = iter([True])
    with watching(docker.socket, refuse=lambda _: next(answers, False)) as recorder:
        wait_until(recorder.networks, "the second statement")
        assert recorder.log.splitlines()[1:] == ["Docker's networks and ports are not served: not now: retried"]
        assert recorder.watcher.problem == ""
        assert (
            recorder.watcher.summary
            == f"{recorder.watcher.summary.split()[0]} at {docker.socket}: 1 network, 0 running containers"
        )


@pytest.mark.parametrize("flag", ["", "--live-restore"], ids=["plain", "live-restore"])
def test_dockerd_is_followed_again_after_its_restart(flag: str, tmp_path: Path) -> None:
    """The watcher is started before dockerd; what was known stays while dockerd does not run."""
    with Host() as host:
        docker = Dockerd(host, None, *WITHOUT_RULES, *filter(None, [flag]))
        link = tmp_path / "docker.sock"
        with watching(link) as seen:
            wait_until(lambda: "(No such file or directory): retried" in seen.log, "the failure")
            assert "cannot be read" in seen.watcher.problem
            with docker:
                link.symlink_to(docker.socket)
                wait_until(seen.networks, "the networks")
                name = run(docker, "web", "--restart=always", "-p", "80")
                wait_until(seen.ports, "the container")
                former = seen.adopted
                docker.kill()
                wait_until(lambda: seen.watcher.problem, "the end of the stream")
                assert seen.adopted is former
                docker.start()
                wait_until(lambda: not seen.watcher.problem, "dockerd to be followed again")
                wait_until(lambda: seen.ports() and seen.adopted is not former, "the container again")
                assert (namespaces(seen) == {one.namespace for one in former.containers}) == bool(flag)
                docker.run("rm", "-f", "web")
                seen.wait_for(name, None)
                lines = seen.log.splitlines()
                assert len(set(lines)) == len(lines)
                assert sum("ports are followed: " in line for line in lines) == 2
                assert sum("(connection closed): retried" in line for line in lines) == 1
