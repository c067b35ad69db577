"""The redirect in the kernel: redirect.bpf.o, attached, and its maps.

What this file knows: which maps there are, and how what is in one goes with what is in another.  What it must not know:
mappings, or what an entry says beyond which ports it is about; how anything is loaded (`kernel.bpf`).

While one process takes over from another both have their programs attached, and the second to be asked finds an
address that is not for it.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from gangway.ebpf.keys import KEY_BYTES
from gangway.ebpf.port_table import PortTable
from gangway.ebpf.program import Loaded, Module
from gangway.ebpf.redirect_entries import VALUE_BYTES, ports_of, without_count

MODULE = Module(
    path=Path(__file__).with_name("redirect.bpf.o"),
    maps=("ports", "backends", "asked_tcp", "asked_udp", "own_addresses", "lent"),
    on_cgroups=tuple(f"{hook}{family}" for hook in ("connect", "sendmsg", "recvmsg", "getpeername") for family in "46"),
)
_ADDRESS_BYTES = 16


class Redirect:
    """Attached programs, and their maps.

    Sockets of the calling thread's network namespace are redirected; with `host_too` also those that ask the host's own
    addresses (`set_own_addresses`).  `lent_fd`: steering's map of the ports that are lent to somebody.  Unsupported
    says what is missing.
    """

    links: Sequence[int]
    """Descriptors that keep it going (`kernel.bpf`)."""

    def __init__(self, host_too: bool = False, former: Sequence[int] = (), lent_fd: int | None = None) -> None:
        given = {} if lent_fd is None else {"lent": lent_fd}
        self._loaded = Loaded(MODULE, former, bytes([host_too]), given)  # `settings` in sockets.bpf.c
        self.links = self._loaded.links
        self._ports = PortTable(self._loaded.map_fd("ports"))
        self._ports.count_anew(one for key, value in self.entries() for one in ports_of(key, value))

    def enter(self, key: bytes, value: bytes) -> None:
        """One entry more; it is not there yet.  HostRefused: the kernel does not take it."""
        self._loaded.update("backends", key, value)
        self._ports.add(ports_of(key, value))

    def erase(self, key: bytes) -> None:
        """One less; nothing happens if it is not there."""
        value = self.look_up(key)
        if self._loaded.erase("backends", key) and value is not None:
            self._ports.remove(ports_of(key, value))

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """All of them, as they were entered."""
        for key, value in self._loaded.entries("backends", KEY_BYTES, VALUE_BYTES):
            yield key, without_count(value)

    def look_up(self, key: bytes) -> bytes | None:
        """The value that a socket which asks there meets, if there is one."""
        return self._loaded.look_up("backends", key, VALUE_BYTES)

    def set_own_addresses(self, addresses: Collection[bytes]) -> None:
        """The host's own, of 16 bytes each."""
        for gone in set(self._loaded.keys("own_addresses", _ADDRESS_BYTES)).difference(addresses):
            self._loaded.erase("own_addresses", gone)
        for address in addresses:
            self._loaded.update("own_addresses", address, b"\1")

    def is_attached(self) -> bool:
        """Nobody else has ended it (`bpftool link detach`)."""
        return self._loaded.is_attached()

    def close(self) -> None:
        """Lets go of everything: nothing is redirected any more, unless somebody else holds it."""
        self._ports.close()
        self._loaded.close()
