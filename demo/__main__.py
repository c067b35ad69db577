"""Ports published with no Docker on the machine: what a user types, who gets there by which road, and what it costs.

How it works.  A host and another machine are network namespaces, and so are the containers.  Every command is the real
one.  The road in the table is not what gangway says it is: the kernel's record of tracked connections tells whether the
destination was translated; what was answered and not translated has gone through the relay.
"""

import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from demo import stage
from lab import mirror
from lab.conntrack import was_translated
from lab.netns import Namespace, ip
from lab.waiting import wait_until

GANGWAY = Path(__file__).parents[1] / ".venv/bin/gangway"
PORT = 8000
HOST4, HOST6, OTHER4, OTHER6 = "10.77.0.1", "fd77::1", "10.77.0.2", "fd77::2"


class Scene(NamedTuple):
    """The host, another machine, three containers, and where the daemon listens."""

    host: Namespace
    other: Namespace
    web: Namespace
    near: Namespace
    far: Namespace
    socket: str


def show() -> None:
    """Everything between setting up and cleaning up."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gangway-demo-"))
        roles = {role: stack.enter_context(Namespace(role)) for role in ("host", "other", "web", "near", "far")}
        scene = Scene(**roles, socket=f"{directory}/gangway.sock")
        _join(scene.host, scene.other)
        print(f"The host is {HOST4} and {HOST6}; another machine is {OTHER4} and {OTHER6}.  No Docker.\n")
        _publish(scene)
        stack.callback(_withdraw, scene)
        mirror.serve(scene.web.popen, PORT)
        print()
        head = ("client", "asks", "answer", "the container saw", "road")
        stage.table(head, [row for client in _clients(scene) for row in _rows(scene, *client)])
        print()
        _type(scene, "explain", f"{HOST4}:{PORT}", "--from", "remote")
        print()
        _costs(scene)


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
        _type(scene, *words)


def _withdraw(scene: Scene) -> None:
    for container in (scene.web, scene.near, scene.far):
        _run(scene, "detach", container.name)
    for network in ("shop", "back"):
        _run(scene, "network", "rm", network)
    wait_until(lambda: not _processes(scene), "the daemon's end: nothing is left to keep", patience_s=20)


def _clients(scene: Scene) -> Iterable[tuple[str, Namespace, Sequence[str]]]:
    yield "the host, loopback", scene.host, ("127.0.0.1", "::1")
    yield "the host, own address", scene.host, (HOST4, HOST6)
    yield "another machine", scene.other, (HOST4, HOST6)
    yield "a container, other network", scene.far, (HOST4, HOST6)
    yield "a container, same network", scene.near, (HOST4, HOST6)
    yield "the container itself", scene.web, (HOST4, HOST6)


def _rows(scene: Scene, who: str, space: Namespace, addresses: Sequence[str]) -> Iterable[Sequence[str]]:
    """Asks over TCP and UDP: one row if they are alike, else one for each."""
    for address in addresses:
        found = {}
        for protocol in ("tcp", "udp"):
            with space.entered():
                answer = mirror.ask_here(protocol, address, PORT)
            road = "nat" if was_translated(scene.host, protocol, address, PORT) else "relay"
            found[protocol] = answer.text, answer.peer, road
        if found["tcp"] == found["udp"]:
            found = {"tcp and udp": found["tcp"]}
        at = f"[{address}]:{PORT}" if ":" in address else f"{address}:{PORT}"
        yield from ((who, f"{at} {protocol}", *outcome) for protocol, outcome in found.items())


def _costs(scene: Scene) -> None:
    """Memory for the two ports above, and with a range of a hundred."""
    before = _memory_kib(scene)
    _type(scene, "publish", scene.web.name, "-p", "9000-9099:9000-9099")
    after = _memory_kib(scene)
    each = (after - before) / 200
    print(
        f"\nDaemon and relay take {before / 1024:.0f} MiB (PSS), and {each:.0f} KiB more for each of these ports, IPv4"
    )
    print("and IPv6 counted apart; no process, and one element of the firewall's maps for the range.")


def _memory_kib(scene: Scene) -> int:
    total = 0
    for pid in _processes(scene):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total


def _processes(scene: Scene) -> list[int]:
    """The daemon and its relay."""
    found = []
    inode = Path(scene.host.path).stat().st_ino
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            ours = {b"gangway.daemon", b"gangway.relay"} & set(words)
            if ours and (process / "ns/net").stat().st_ino == inode:
                found.append(int(process.name))
    return found


def _type(scene: Scene, *words: str) -> None:
    """Shows a command and what it says."""
    print(f"$ gangway {shlex.join(words)}")
    done = _run(scene, *words)
    print(*(f"    {line}" for line in (done.stderr + done.stdout).splitlines()), sep="\n")


def _run(scene: Scene, *words: str) -> subprocess.CompletedProcess[str]:
    done = scene.host.run(str(GANGWAY), words[0], *words[1:], check=False, env={"GANGWAY_SOCKET": scene.socket})
    if done.returncode:
        raise RuntimeError(f"gangway {shlex.join(words)}: {done.stderr.strip()}")
    return done


def _join(host: Namespace, other: Namespace) -> None:
    ip("link", "add", "eth0", "netns", host.name, "type", "veth", "peer", "name", "eth0", "netns", other.name)
    for space, four, six in ((host, HOST4, HOST6), (other, OTHER4, OTHER6)):
        space.ip("address", "add", f"{four}/24", "dev", "eth0")
        space.ip("address", "add", f"{six}/64", "dev", "eth0", "nodad")
        space.ip("link", "set", "eth0", "up")


if __name__ == "__main__":
    sys.exit(stage.run(show))
