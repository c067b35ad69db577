"""Ports published without Docker: the commands, the road that each kind of client gets, and what it costs.

The host, another machine and the containers are network namespaces. The commands are real: in the host's namespace they
find its daemon without options, and the first one starts it. The road in the table is not what gangway reports: it is
read from the kernel's own tables (lab/roads.py).
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from demo import common
from lab import echo_server
from lab.addresses import host_port
from lab.gangwayd import GANGWAY, runtime_folder
from lab.netns import Namespace, Neighbour
from lab.processes import pids_running, pss_kib
from lab.roads import observe_road
from lab.waiting import wait_until

PORT = 8000
ALL_PORTS, LAST = "1024-65000", 65000
HOST4, HOST6 = Neighbour.host4, Neighbour.host6


class Scene(NamedTuple):
    """The host, another machine, and three containers, two of them on one network."""

    host: Namespace
    other: Neighbour
    web: Namespace
    near: Namespace
    far: Namespace


def show() -> None:
    """Run the demo."""
    with ExitStack() as stack:
        host = stack.enter_context(Namespace("host"))
        other = stack.enter_context(Neighbour(host))
        web, near, far = (stack.enter_context(Namespace(role)) for role in ("web", "near", "far"))
        scene = Scene(host, other, web, near, far)
        print(
            f"The host is {HOST4} and {HOST6}; another machine is {other.address4} and {other.address6}. No Docker.\n"
        )
        stack.callback(_remove_networks, scene)
        _publish(scene)
        echo_server.serve(scene.web.popen, PORT)
        print()
        head = ("client", "connects to", "road", "the container saw")
        common.table(head, [row for client in _clients(scene) for row in _rows(scene, *client)])
        print()
        _show(scene, "explain", f"{HOST4}:{PORT}", "--from", "remote")
        _show(scene, "explain", f"127.0.0.1:{PORT}")
        print()
        _publish_all_ports(scene)


def _publish(scene: Scene) -> None:
    for words in (
        ("network", "create", "shop", "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64"),
        ("network", "create", "back", "--subnet", "172.31.0.0/24", "--subnet", "fd31::/64"),
        ("attach", scene.web.name, "--network", "shop"),
        ("attach", scene.near.name, "--network", "shop"),
        ("attach", scene.far.name, "--network", "back"),
        ("publish", scene.web.name, "-p", f"{PORT}:{PORT}", "-p", f"{PORT}:{PORT}/udp"),
        ("ls",),
    ):
        _show(scene, *words)


def _remove_networks(scene: Scene) -> None:
    """Remove what there is, also after a failure; the daemon then exits by itself."""
    if _processes(scene):
        for network in json.loads(_run(scene, "network", "ls", "--json").stdout):
            for endpoint in network["endpoints"]:
                _run(scene, "detach", endpoint["container"])
            _run(scene, "network", "rm", network["name"])
    wait_until(lambda: not _processes(scene), "the daemon to exit: nothing is published", patience_s=20)
    if runtime_folder(scene.host).exists():
        raise RuntimeError(f"the daemon did not remove {runtime_folder(scene.host)}")


def _clients(scene: Scene) -> Iterable[tuple[str, Namespace, Sequence[str]]]:
    yield "the host, loopback", scene.host, ("127.0.0.1", "::1")
    yield "the host, own address", scene.host, (HOST4, HOST6)
    yield "another machine", scene.other, (HOST4, HOST6)
    yield "a container, other network", scene.far, (HOST4, HOST6)
    yield "a container, same network", scene.near, (HOST4, HOST6)
    yield "the container itself", scene.web, (HOST4, HOST6)


def _rows(
    scene: Scene, client: str, space: Namespace, addresses: Sequence[str], port: int = PORT
) -> Iterable[Sequence[str]]:
    """Send requests over TCP and UDP; yield one row if the results are the same, else one for each protocol."""
    for address in addresses:
        found = {}
        for protocol in ("tcp", "udp"):
            found[protocol] = observe_road(scene.host, space, protocol, address, port)
        if found["tcp"] == found["udp"]:
            found = {"tcp and udp": found["tcp"]}
        at = host_port(address, port)
        yield from ((client, f"{at} {protocol}", *road) for protocol, road in found.items())


def _publish_all_ports(scene: Scene) -> None:
    """Publish all ports at once; show the time and the memory that takes, and which clients reach the last port."""
    _show(scene, "unpublish", scene.web.name)
    before_kib, start_s = pss_kib(_processes(scene)), time.monotonic()
    _show(scene, "publish", scene.web.name, "-p", f"{ALL_PORTS}:{ALL_PORTS}/tcp", "-p", f"{ALL_PORTS}:{ALL_PORTS}/udp")
    took_s, after_kib = time.monotonic() - start_s, pss_kib(_processes(scene))
    echo_server.serve(scene.web.popen, LAST)
    print()
    head = ("client", "connects to", "road", "the container saw")
    common.table(head, [row for client in list(_clients(scene))[:3] for row in _rows(scene, *client, LAST)])
    print(
        f"\nThat took {took_s:.2f} s. Daemon and relay together use {after_kib / 1024:.0f} MiB of memory (PSS), "
        f"{max(after_kib - before_kib, 0)} KiB more than before."
    )


def _processes(scene: Scene) -> list[int]:
    """Return the pids of the daemon and its relay."""
    return pids_running("gangway.daemon", scene.host) + pids_running("gangway.relay", scene.host)


def _show(scene: Scene, *words: str) -> None:
    """Run a gangway command, and print it and its output."""
    print(f"$ gangway {shlex.join(words)}")
    done = _run(scene, *words)
    print(*(f"    {line}" for line in (done.stderr + done.stdout).splitlines()), sep="\n")


def _run(scene: Scene, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "GANGWAY_SOCKET"}
    done = scene.host.run(str(GANGWAY), *words, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"gangway {shlex.join(words)}: {done.stderr.strip()}")
    return done


if __name__ == "__main__":
    sys.exit(common.run(show))
