"""What becomes of published ports, and of the proxy's processes, when their user goes: the last container, or dockerd.

These tests share a second dockerd, since they kill it.
"""

from collections.abc import Iterator

import pytest

from lab.netns import ip
from lab.waiting import wait_until
from tests.docker.dockerhost import Site, site


@pytest.fixture(scope="module", params=["", "--live-restore"], ids=["plain", "live-restore"])
def mortal(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A site whose dockerd may be killed."""
    with site(*filter(None, [request.param])) as ours:
        yield ours


def test_a_killed_dockerd_frees_the_ports_and_its_successor_publishes_them(mortal: Site) -> None:
    always = mortal.container("--restart=always", "-p", "8000:80", "-p", "8000:80/udp", serving=(80,))
    by_hand = mortal.container("-p", "8001:80", serving=(80,))
    before = mortal.docker.pid_of(always)
    mortal.docker.kill()
    wait_until(lambda: mortal.is_free(8000) and mortal.is_free(8001), "the killed dockerd's ports to be free")

    mortal.docker.start()
    wait_until(lambda: mortal.docker.pid_of(always), "the container to run again")
    if mortal.docker.pid_of(always) != before:  # without --live-restore dockerd ends what runs, and starts it anew
        mortal.docker.run("start", by_hand)
        for name in (always, by_hand):
            mortal.serve(name, 80)
    for port, protocol in (8000, "tcp"), (8000, "udp"), (8001, "tcp"):
        assert mortal.ask(port, protocol=protocol)
    mortal.remove(always, by_hand)
    assert mortal.is_free(8000)


def test_no_process_of_the_proxy_outlives_the_last_container_for_long(mortal: Site) -> None:
    name = mortal.container("-p", "8002:80", serving=(80,))
    assert mortal.ask(8002)
    assert mortal.proxies()
    mortal.remove(name)
    wait_until(lambda: not mortal.proxies(), "the end of the proxy's last process")
    # Nor does one that has left dockerd's mount namespace, by which proxies() knows them.
    wait_until(
        lambda: len(ip("netns", "pids", mortal.host.name).split()) == 2, "only dockerd and containerd to be left"
    )
