"""A daemon that is killed at any operation, and operations that fail: the host is left either as it was before the
request or as it is after it."""

from collections.abc import Callable, Iterator
from ipaddress import ip_network
from itertools import count
from pathlib import Path

import pytest

from gangway.addressing import first_gateway
from gangway.model import Network
from gangway.state.requests import Requests
from lab.netns import Namespace
from tests.kernel.mortal import Found, Ground
from tests.kernel.snapshot import make_tables, snapshot, wait_until_restored

pytestmark = pytest.mark.any_kernel

FIREWALLS = "nftables", "iptables", "none"
# Left out is an act whose operations with that firewall are those of another act, in the same order: on demand a
# network is created and a container attached; `detach` unpublishes.
ACTS = {
    "create the first network": ("nftables", "iptables"),
    "create another network": FIREWALLS,
    "remove one of two networks": ("nftables", "iptables"),
    "remove the last network": FIREWALLS,
    "attach": ("none",),
    "attach on demand": ("none",),
    "attach to another network": ("nftables", "iptables"),
    "detach from another network": ("nftables", "iptables"),
    "detach": FIREWALLS,
    "detach from both networks": ("none",),
    "publish": FIREWALLS,
    "unpublish": ("none",),
    "unpublish one": FIREWALLS,
}
each_act = pytest.mark.parametrize(("name", "firewall"), [(name, one) for name, each in ACTS.items() for one in each])

Act = Callable[[Requests], object]
State = tuple[set[str], Found]
"""What is wanted, and what there is."""


@pytest.fixture(autouse=True)
def _same_subnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always choose the same subnet for the network on demand, as its state is compared."""
    monkeypatch.setattr("gangway.state.requests.token_bytes", bytes)


@pytest.fixture
def ground(firewall: str, tmp_path: Path) -> Iterator[Ground]:
    with Namespace("host") as host, Namespace("a") as one, Namespace("b") as other, host.entered():
        made = Ground(host, [one, other], tmp_path, firewall)
        make_tables(host)
        nothing = snapshot(host)
        made.start()
        try:
            yield made
            _remove_all(made)
            wait_until_restored(host, nothing)
        finally:
            made.close()


def _create(name: str, third: int) -> Act:
    subnets = ip_network(f"172.30.{third}.0/24"), ip_network(f"fd30:{third}::/64")
    return lambda requests: requests.create_network(
        Network(name, f"gw-{name}", subnets, tuple(first_gateway(subnet) for subnet in subnets))
    )


def _all(*acts: Act) -> Act:
    return lambda requests: [act(requests) for act in acts]


def _cases(one: str, other: str) -> dict[str, tuple[Act, Act, Act]]:
    """Return for each act: what has to be done before, the act, and what undoes it."""
    web, more = _create("web", 1), _create("more", 2)
    ports = ["8080:80", "8080:80/udp", "127.0.0.1:9000-9003:9000-9003"]

    def join(requests: Requests) -> object:
        return requests.attach(one, "web", [])

    def join_more(requests: Requests) -> object:
        return requests.attach(one, "more", [])

    def publish(requests: Requests) -> object:
        return requests.publish(one, ports)

    def nothing(_: Requests) -> None: ...

    return {
        "create the first network": (nothing, web, lambda requests: requests.remove_network("web")),
        "create another network": (web, more, lambda requests: requests.remove_network("more")),
        "remove one of two networks": (_all(web, more), lambda requests: requests.remove_network("more"), more),
        "remove the last network": (web, lambda requests: requests.remove_network("web"), web),
        "attach": (
            _all(web, join),
            lambda requests: requests.attach(other, "web", []),
            lambda requests: requests.detach(other),
        ),
        "attach on demand": (
            nothing,
            lambda requests: requests.attach(other, None, []),
            lambda requests: requests.detach(other),
        ),
        "attach to another network": (
            _all(web, more, join),
            lambda requests: requests.attach(one, "more", []),
            lambda requests: requests.detach(one, "more"),
        ),
        "detach from another network": (
            _all(web, more, join, join_more),
            lambda requests: requests.detach(one, "more"),
            join_more,
        ),
        "detach from both networks": (
            _all(web, more, join, join_more),
            lambda requests: requests.detach(one),
            _all(join, join_more),
        ),
        "detach": (_all(web, join, publish), lambda requests: requests.detach(one), _all(join, publish)),
        "publish": (_all(web, join), publish, lambda requests: requests.unpublish(one)),
        "unpublish": (_all(web, join, publish), lambda requests: requests.unpublish(one), publish),
        "unpublish one": (
            _all(web, join, publish),
            lambda requests: requests.unpublish(one, ports[:1]),
            lambda requests: requests.publish(one, ports[:1]),
        ),
    }


def _states(ground: Ground, before: Act, act: Act, undo: Act) -> tuple[State, State]:
    """Return the states before and after an act, with what stays after its first time, as iptables' tables do."""
    before(ground.requests)
    act(ground.requests)
    after = ground.wanted(), ground.found()
    undo(ground.requests)
    return (ground.wanted(), ground.found()), after


@each_act
def test_the_next_daemon_finishes_or_undoes_what_a_killed_one_began(ground: Ground, name: str) -> None:
    before, act, undo = _cases(*(box.name for box in ground.boxes))[name]
    states = _states(ground, before, act, undo)
    assert states[0] != states[1]
    for left in count():
        goes_on = ground.is_killed(act, left)
        wanted = ground.wanted()
        assert wanted in [state[0] for state in states], f"killed after {left}"
        expected = next(found for before_or_after, found in states if before_or_after == wanted)
        ground.wait_until_found(expected)
        if wanted == states[1][0]:
            undo(ground.requests)
        if not goes_on:
            assert left >= 1
            return


def _remove_all(ground: Ground) -> None:
    for container in {one.container for one in ground.requests.endpoints()}:
        ground.requests.detach(container)
    for network in ground.requests.networks():
        ground.requests.remove_network(network.name)


@pytest.mark.parametrize("firewall", FIREWALLS)
@pytest.mark.timeout(300)
def test_the_next_daemon_finishes_what_one_killed_at_its_start_began(ground: Ground, tmp_path: Path) -> None:
    """The first one finds a host where nothing is left of what is wanted, as after a reboot."""
    before, publish, _ = _cases(*(box.name for box in ground.boxes))["publish"]
    before(ground.requests)
    publish(ground.requests)
    wanted, found = ground.wanted(), ground.found()
    ground.save(tmp_path / "saved")
    for left in count(1, 7):
        _remove_all(ground)
        goes_on = ground.is_killed_while_it_starts(tmp_path / "saved", left)
        assert ground.wanted() == wanted
        ground.wait_until_found(found)
        if not goes_on:
            assert left > 1
            return


@each_act
def test_a_failed_request_changes_nothing(ground: Ground, name: str) -> None:
    before, act, undo = _cases(*(box.name for box in ground.boxes))[name]
    states = _states(ground, before, act, undo)
    for left in count():
        goes_on, is_refused = ground.fails(act, left)
        wanted, found = states[0 if is_refused else 1]
        ground.wait_until_found(found)
        assert ground.wanted() == wanted, f"failed after {left}"
        if not is_refused:
            undo(ground.requests)
        if not goes_on:
            assert left >= 1
            return
