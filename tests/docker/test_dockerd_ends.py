"""Published ports and the proxy's processes after dockerd was killed, or the last container was removed.

These tests kill dockerd, so they have one of their own.
"""

from collections.abc import Iterator

import pytest

from lab.netns import ip
from lab.waiting import wait_until
from tests.docker.dockerhost import Site, site


@pytest.fixture(scope="module", params=["", "--live-restore"], ids=["plain", "live-restore"])
def killable(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A site whose dockerd may be killed."""
    with site(*filter(None, [request.param])) as made:
        yield made


def test_ports_are_free_after_dockerd_is_killed_and_published_after_restart(killable: Site) -> None:
    always = killable.container("--restart=always", "-p", "8000:80", "-p", "8000:80/udp", serving=(80,))
    manual = killable.container("-p", "8001:80", serving=(80,))
    before = killable.docker.pid_of(always)
    killable.docker.kill()
    wait_until(lambda: killable.is_free(8000) and killable.is_free(8001), "the killed dockerd's ports to be free")

    killable.docker.start()
    wait_until(lambda: killable.docker.pid_of(always), "the container to run again")
    if (
        killable.docker.pid_of(always) != before
    ):  # without --live-restore dockerd stops running containers, and starts them again
        killable.docker.run("start", manual)
        for name in (always, manual):
            killable.serve(name, 80)
    for port, protocol in (8000, "tcp"), (8000, "udp"), (8001, "tcp"):
        assert killable.request(port, protocol=protocol)
    killable.remove(always, manual)
    assert killable.is_free(8000)


def test_proxy_processes_exit_after_last_container(killable: Site) -> None:
    name = killable.container("-p", "8002:80", serving=(80,))
    assert killable.request(8002)
    assert killable.proxies()
    killable.remove(name)
    wait_until(lambda: not killable.proxies(), "the proxy's last process to exit")
    # Also no process that has left dockerd's mount namespace, by which proxies() finds them.
    wait_until(
        lambda: len(ip("netns", "pids", killable.host.name).split()) == 2, "only dockerd and containerd to remain"
    )
