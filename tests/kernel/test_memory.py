"""A daemon's memory does not grow with the number of networks, containers and ports that it has had."""

import ctypes
import functools
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest

from gangway.daemon.messages import NetworkRequest
from lab.netns import Namespace
from tests.kernel.mortal import Ground

pytestmark = pytest.mark.any_kernel

_WARM_UP, _CYCLES = 3, 5
_BANNED = 300  # requests after which a socket of pyroute2 remembers no more sequence numbers (its `AddrPool.ban`)
# Growth with each cycle is a leak. What is allocated only once (a larger table, an import) is not. sqlite3 keeps up to
# 200 references to cursors, some 30 of a cycle, before it drops them. A socket left open has hundreds of blocks.
_MAX_BLOCKS, _MAX_BYTES = 60, 6000


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 (mallinfo(3))."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


class Memory(NamedTuple):
    """The blocks of Python's objects, and the bytes that C libraries and large objects use."""

    blocks: int
    malloc_bytes: int


@pytest.fixture
def ground(firewall: str, tmp_path: Path) -> Iterator[Ground]:
    """A daemon in this process, with a port that stays published: its relay goes on."""
    with Namespace("host") as host, Namespace("box") as box, Namespace("stay") as stay, host.entered():
        made = Ground(host, [box], tmp_path, firewall)
        made.start()
        made.requests.attach(stay.name, None, ())
        made.requests.publish(stay.name, ["7000:80"])
        for _ in range(_BANNED):
            made._parts._links.set_up("lo")
        yield made
        made.requests.detach(stay.name)
        relay = made._parts.dataplane.relay._process
        assert relay is not None
        relay.kill()  # it would stay for some seconds
        made.close()


@pytest.fixture
def caches() -> Iterator[list[Any]]:
    """The caches of gangway's functions, each of which has a limit.  What exists before is left out of collections."""
    found = [one for one in gc.get_objects() if isinstance(one, functools._lru_cache_wrapper)]
    gc.collect()
    gc.freeze()
    yield [one for one in found if one.__module__.startswith("gangway.")]
    gc.unfreeze()


def memory(caches: list[Any]) -> Memory:
    """Return what is used now, without garbage and caches."""
    for one in caches:
        one.cache_clear()
    sys._clear_type_cache()  # it holds the names of attributes that were looked up
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    return Memory(sys.getallocatedblocks(), mallinfo().uordblks)


def cycle(ground: Ground, number: int) -> None:
    """Publish ports of a container on a new network, and remove everything again; no two cycles use the same names."""
    requests, box, name = ground.requests, ground.boxes[0].name, f"net{number}"
    subnets = [f"172.31.{number}.0/24", f"fd31:{number}::/64"]
    requests.create_network(NetworkRequest(name, subnets).network())
    requests.attach(box, name, ())
    requests.publish(
        box, [f"{8000 + number}:80", f"{9000 + number}:53/udp", f"{10000 + 10 * number}-{10005 + 10 * number}:1-6"]
    )
    requests.unpublish(box)
    requests.detach(box)
    requests.remove_network(name)


def test_cycles_leave_no_memory_behind(ground: Ground, caches: list[Any]) -> None:
    found = []
    for number in range(_WARM_UP + _CYCLES):
        cycle(ground, number)
        found.append(memory(caches))
    steps = list(zip(found[_WARM_UP - 1 :], found[_WARM_UP:], strict=False))
    assert median(after.blocks - before.blocks for before, after in steps) < _MAX_BLOCKS
    assert median(after.malloc_bytes - before.malloc_bytes for before, after in steps) < _MAX_BYTES
