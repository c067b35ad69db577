"""A daemon that is killed before any one of the things it does: the next one makes of the rest what is wanted."""

from collections.abc import Callable, Iterator
from ipaddress import ip_network
from itertools import count
from pathlib import Path

import pytest

from gangway.model import Network, first_gateway
from gangway.state.requests import Requests
from lab.netns import Namespace
from tests.kernel.mortal import Ground
from tests.kernel.snapshot import is_as, make_tables, snapshot

pytestmark = pytest.mark.any_kernel

Act = Callable[[Requests], object]


@pytest.fixture(autouse=True)
def _same_subnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network on demand gets a random one; here it has to be compared."""
    monkeypatch.setattr("gangway.state.requests.token_bytes", bytes)


@pytest.fixture(params=["nftables", "iptables", "none"])
def ground(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ground]:
    with Namespace("host") as host, Namespace("a") as one, Namespace("b") as other, host.entered():
        made = Ground(host, [one, other], tmp_path, request.param)
        make_tables(host)
        nothing = snapshot(host)
        made.start()
        try:
            yield made
            for box in made.service.endpoints():
                made.service.detach(box.container)
            for network in made.service.networks():
                made.service.remove_network(network.name)
            is_as(host, nothing)
        finally:
            made.close()


def _create(name: str, third: int) -> Act:
    subnets = ip_network(f"172.30.{third}.0/24"), ip_network(f"fd30:{third}::/64")
    return lambda service: service.create_network(
        Network(name, f"gw-{name}", subnets, tuple(first_gateway(subnet) for subnet in subnets))
    )


def _all(*acts: Act) -> Act:
    return lambda service: [act(service) for act in acts]


def _cases(one: str, other: str) -> dict[str, tuple[Act, Act, Act]]:
    """For each: what has to be there, the act, and what takes it back."""
    web, more = _create("web", 1), _create("more", 2)
    ports = ["8080:80", "8080:80/udp", "127.0.0.1:9000-9003:9000-9003"]

    def join(service: Requests) -> object:
        return service.attach(one, "web", [])

    def publish(service: Requests) -> object:
        return service.publish(one, ports)

    def nothing(_: Requests) -> None: ...

    return {
        "create the first network": (nothing, web, lambda service: service.remove_network("web")),
        "create another network": (web, more, lambda service: service.remove_network("more")),
        "remove one of two networks": (_all(web, more), lambda service: service.remove_network("more"), more),
        "remove the last network": (web, lambda service: service.remove_network("web"), web),
        "attach": (_all(web, join), lambda s: s.attach(other, "web", []), lambda s: s.detach(other)),
        "attach on demand": (nothing, lambda s: s.attach(other, None, []), lambda s: s.detach(other)),
        "detach": (_all(web, join, publish), lambda s: s.detach(one), _all(join, publish)),
        "publish": (_all(web, join), publish, lambda service: service.unpublish(one)),
        "unpublish": (_all(web, join, publish), lambda service: service.unpublish(one), publish),
        "unpublish one": (
            _all(web, join, publish),
            lambda service: service.unpublish(one, ports[:1]),
            lambda service: service.publish(one, ports[:1]),
        ),
    }


@pytest.mark.parametrize("name", list(_cases("", "")))
def test_a_daemon_that_was_killed_at_any_point_is_made_up_for_by_the_next_one(ground: Ground, name: str) -> None:
    before, act, back = _cases(*(box.name for box in ground.boxes))[name]
    before(ground.service)
    states = [(ground.wants(), ground.found())]
    act(ground.service)
    states.append((ground.wants(), ground.found()))
    assert states[0] != states[1]
    back(ground.service)
    ground.becomes(states[0][1])
    for left in count():
        goes_on = ground.is_killed(act, left)
        wanted = ground.wants()
        assert wanted in [state[0] for state in states], f"killed after {left}"
        expected = next(found for wants, found in states if wants == wanted)
        ground.becomes(expected)
        if wanted == states[1][0]:
            back(ground.service)
        if not goes_on:
            assert left > 1
            return


# What takes ports away puts right what is in its way, and tries again.
TRIED_AGAIN = {"detach", "unpublish", "unpublish one"}


@pytest.mark.parametrize("name", [name for name in _cases("", "") if name not in TRIED_AGAIN])
def test_a_step_that_fails_leaves_what_was_before(ground: Ground, name: str) -> None:
    before, act, back = _cases(*(box.name for box in ground.boxes))[name]
    before(ground.service)
    act(ground.service)
    back(ground.service)  # what lingers of a first time, as iptables' tables do, is there now
    wanted, found = ground.wants(), ground.found()
    for left in count():
        if not ground.is_refused(act, left):
            assert left > 0
            return
        ground.becomes(found)
        assert ground.wants() == wanted
