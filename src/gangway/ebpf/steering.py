"""Steering in the kernel: steering.bpf.o, attached, and its maps.

What this file knows: which maps there are, and how what is in one goes with what is in another.  What it must not know:
mappings; how anything is loaded (`kernel.bpf`).
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gangway.ebpf import requirements as bpf_probe
from gangway.ebpf.keys import KEY_BYTES
from gangway.ebpf.port_table import PortTable
from gangway.ebpf.program import Loaded, Module
from gangway.ebpf.steering_entries import LENT_BYTES, VALUE_BYTES, lent_port, row, stretch
from gangway.errors import Unsupported

MODULE = Module(
    path=Path(__file__).with_name("steering.bpf.o"),
    maps=("ports", "kept", "shared", "binding", "lent", "owners"),
    on_cgroups=("bind4", "bind6", "post_bind4", "post_bind6", "sendmsg4", "sendmsg6", "release"),
    on_netns=("steer",),
)


class Steering:
    """Attached programs, and their maps.  Unsupported says what is missing.

    It is about the calling thread's network namespace.
    """

    links: Sequence[int]
    """Descriptors that keep it going (`kernel.bpf`)."""

    def __init__(self, former: Sequence[int] = ()) -> None:
        why = bpf_probe.errors()
        if why is not None:
            raise Unsupported(why)
        self._loaded = Loaded(MODULE, former)
        self.links = self._loaded.links
        self._ports = PortTable(self._loaded.map_fd("ports"))
        self._ports.count_anew(stretch(key) for key, _ in self.entries())

    @property
    def binding_fd(self) -> int:
        """The map by which the relay says which socket it is about to bind."""
        return self._loaded.map_fd("binding")

    @property
    def lent_fd(self) -> int:
        """The map of the ports that sockets have got by the kernel's choice."""
        return self._loaded.map_fd("lent")

    def share(self, protocol: str, family: int, fd: int) -> None:
        """The socket that serves a protocol and family (4 or 6): a listener of TCP, or a bound socket of UDP."""
        self._loaded.update("shared", row(protocol, family), fd.to_bytes(8, sys.byteorder))

    def set(self, key: bytes, value: bytes) -> None:
        """An entry, new or changed.  HostRefused: the kernel does not take it."""
        is_new = self.look_up(key) is None
        self._loaded.update("kept", key, value)
        if is_new:
            self._ports.add((stretch(key),))

    def erase(self, key: bytes) -> None:
        """One less; nothing happens if it is not there."""
        if self._loaded.erase("kept", key):
            self._ports.remove((stretch(key),))

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """All of them."""
        return self._loaded.entries("kept", KEY_BYTES, VALUE_BYTES)

    def look_up(self, key: bytes) -> bytes | None:
        """The entry of a key, or of one that includes it."""
        return self._loaded.look_up("kept", key, VALUE_BYTES)

    def lent(self) -> Iterator[tuple[bytes, tuple[str, int]]]:
        """The keys of what is lent, or was, and the protocol and port of each."""
        return ((key, lent_port(key)) for key in self._loaded.keys("lent", LENT_BYTES))

    def take_back(self, key: bytes) -> None:
        """It is lent to nobody."""
        self._loaded.erase("lent", key)

    def is_attached(self) -> bool:
        """Nobody else has ended it (`bpftool link detach`)."""
        return self._loaded.is_attached()

    def close(self) -> None:
        """Lets go of everything: nothing is steered any more, unless somebody else holds it."""
        self._ports.close()
        self._loaded.close()
