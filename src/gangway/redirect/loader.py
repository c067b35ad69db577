"""The redirect in the kernel: loads sockets.bpf.o, attaches its programs, changes its maps.

What this file knows: libbpf (by ctypes; the signatures are those of bpf/libbpf.h and bpf/bpf.h), cgroup v2.  What it
must not know: mappings, or what an entry says beyond which ports it is about.

How it works.  The programs are attached for as long as somebody holds their links (bpf_link: a file descriptor), and
a map lives as long as a program or a descriptor does.  So there is nothing to clean up: when the last of the processes
that hold them ends, however it ends, the kernel is as it was.  Whoever is to keep the redirect going without this
process gets `held`: the links, and the maps for reading only, so that it can end the redirect but lead nobody anywhere.
A process that comes later is given those back (`former`), loads programs of its own with the same maps, and so takes
over: for a moment both copies are attached, and the second finds an address that is not for it.

The hierarchy's root is found where it is mounted, whatever the place, or mounted for this process alone (fsmount(2)).
"""

import ctypes
import mmap
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_long, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

from gangway.errors import HostRefused, Unsupported
from gangway.redirect import probe
from gangway.redirect.entries import KEY_BYTES, ROWS, VALUE_BYTES, ports_of, without_count

_OBJECT = Path(__file__).with_name("sockets.bpf.o")
_PROGRAMS = tuple(f"{hook}{family}" for hook in ("connect", "sendmsg", "recvmsg", "getpeername") for family in (4, 6))
_MAPS = ("ports", "backends", "asked", "own_addresses")
HELD = len(_PROGRAMS) + len(_MAPS)
"""How many descriptors keep it going."""
_PORTS = 65536
# A count that is at its highest stays there: one look more for that port, and nothing else.
_MORE = bytes([*range(1, 256), 255])
_LESS = bytes([0, *range(254), 255])
_READ_ONLY = 1 << 3  # BPF_F_RDONLY, include/uapi/linux/bpf.h
# include/uapi/asm-generic/unistd.h: the same on all architectures
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6  # include/uapi/linux/mount.h
_CGROUP2 = re.compile(r"^\S+ \S+ \S+ / (\S+) .* - cgroup2 ", re.MULTILINE)  # proc_pid_mountinfo(5)


class _Settings(ctypes.Structure):
    """`settings` in sockets.bpf.c."""

    _fields_ = (("netns_cookie", c_uint64), ("host_too", ctypes.c_bool))


class _OpenFlags(ctypes.Structure):
    """struct bpf_get_fd_by_id_opts."""

    _fields_ = (("size", c_size_t), ("open_flags", c_uint32))


class Redirect:
    """Attached programs, and their maps.

    Sockets of the calling thread's network namespace are redirected; with `host_too` also those that ask the host's own
    addresses (`set_own_addresses`).  Unsupported says what is missing.
    """

    def __init__(self, host_too: bool = False, former: Sequence[int] = ()) -> None:
        for needs in probe.NEEDS.values():
            why = needs()
            if why is not None:
                raise Unsupported(why)
        if not _OBJECT.exists():
            raise Unsupported(f"{_OBJECT} is missing: make build")
        self._bpf = _library()
        self._fds: list[int] = []
        try:
            self._load(host_too, [_map_id(fd) for fd in former[len(_PROGRAMS) :]])
        except Unsupported:
            self.close()
            if not former:
                raise
            self._load(host_too, ())  # the maps are another version's
        self._ports = mmap.mmap(self._maps["ports"], _PORTS * ROWS)
        self._count_anew()

    @property
    def held(self) -> list[int]:
        """Descriptors that keep it going; see the head of this file."""
        return self._links + self._readable

    def enter(self, key: bytes, value: bytes) -> None:
        """One entry more; it is not there yet.  HostRefused: the kernel does not take it."""
        self._update("backends", key, value)
        _count(self._ports, key, value, _MORE)

    def erase(self, key: bytes) -> None:
        """One less; nothing happens if it is not there."""
        value = self.look_up(key)
        if self._bpf.bpf_map_delete_elem(self._maps["backends"], key) == 0 and value is not None:
            _count(self._ports, key, value, _LESS)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """All of them, as they were entered."""
        for key in self._keys("backends", KEY_BYTES):
            value = self.look_up(key)
            if value is not None:
                yield key, without_count(value)

    def look_up(self, key: bytes) -> bytes | None:
        """The value that a socket which asks there meets, if there is one."""
        value = ctypes.create_string_buffer(VALUE_BYTES)
        found = self._bpf.bpf_map_lookup_elem(self._maps["backends"], key, value) == 0
        return value.raw if found else None

    def set_own_addresses(self, addresses: Collection[bytes]) -> None:
        """The host's own, of 16 bytes each."""
        for gone in set(self._keys("own_addresses", 16)).difference(addresses):
            self._bpf.bpf_map_delete_elem(self._maps["own_addresses"], gone)
        for address in addresses:
            self._update("own_addresses", address, b"\1")

    def is_attached(self) -> bool:
        """Nobody else has ended it (`bpftool link detach`)."""
        return all(_told_of(fd, "cgroup_id") != "0" for fd in self._links)

    def close(self) -> None:
        """Lets go of everything: nothing is redirected any more, unless somebody else holds it."""
        if hasattr(self, "_ports"):
            self._ports.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _load(self, host_too: bool, former: Sequence[int]) -> None:
        bpf = self._bpf
        opened = bpf.bpf_object__open_file(str(_OBJECT).encode(), None)
        if not opened:
            raise Unsupported(f"{_OBJECT} cannot be read: {_why()}")
        try:
            self._prepare(opened, host_too, former)
            if bpf.bpf_object__load(opened):
                raise Unsupported(f"this kernel does not take the programs: {_why()}")
            maps = {name: bpf.bpf_object__find_map_by_name(opened, name.encode()) for name in _MAPS}
            self._maps = {name: self._own(os.dup(bpf.bpf_map__fd(found))) for name, found in maps.items()}
            self._readable = [self._own(self._open_map(_map_id(fd), _READ_ONLY)) for fd in self._maps.values()]
            self._links = self._attach(opened)
        finally:
            bpf.bpf_object__close(opened)

    def _prepare(self, opened: int, host_too: bool, former: Sequence[int]) -> None:
        bpf = self._bpf
        size = c_size_t()
        start = bpf.bpf_map__initial_value(bpf.bpf_object__find_map_by_name(opened, b".rodata"), byref(size))
        settings = _Settings.from_address(start)
        settings.netns_cookie, settings.host_too = probe.own_cookie(), host_too
        for name, number in zip(_MAPS, former, strict=False):
            fd = self._open_map(number)
            try:
                bpf.bpf_map__reuse_fd(bpf.bpf_object__find_map_by_name(opened, name.encode()), fd)
            finally:
                os.close(fd)

    def _attach(self, opened: int) -> list[int]:
        bpf, found = self._bpf, []
        root = _root_of_cgroups()
        try:
            for name in _PROGRAMS:
                program = bpf.bpf_object__find_program_by_name(opened, name.encode())
                link = bpf.bpf_program__attach_cgroup(program, root)
                if not link:
                    raise Unsupported(f"the programs cannot be attached to the root of the cgroups: {_why()}")
                found.append(self._own(os.dup(bpf.bpf_link__fd(link))))
                bpf.bpf_link__destroy(link)  # its own descriptor; ours keeps the link
        finally:
            os.close(root)
        return found

    def _own(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _open_map(self, number: int, flags: int = 0) -> int:
        options = _OpenFlags(ctypes.sizeof(_OpenFlags), flags)
        fd = int(self._bpf.bpf_map_get_fd_by_id_opts(number, byref(options)))
        if fd < 0:
            raise Unsupported(f"map {number} cannot be opened: {os.strerror(-fd)}")
        return fd

    def _update(self, name: str, key: bytes, value: bytes) -> None:
        error = self._bpf.bpf_map_update_elem(self._maps[name], key, value, 0)
        if error:
            raise HostRefused(f"the redirect's map {name} takes no more: {os.strerror(-error)}")

    def _keys(self, name: str, size: int) -> list[bytes]:
        """All at once: a map that changes meanwhile would begin anew."""
        before, key, found = None, ctypes.create_string_buffer(size), []
        while self._bpf.bpf_map_get_next_key(self._maps[name], before, key) == 0:
            before = key.raw
            found.append(before)
        return found

    def _count_anew(self) -> None:
        """Whoever was here before may have died between an entry and its count."""
        counts = bytearray(_PORTS * ROWS)
        for key, value in self.entries():
            _count(counts, key, value, _MORE)
        self._ports[:] = bytes(counts)


def _count(table: mmap.mmap | bytearray, key: bytes, value: bytes, change: bytes) -> None:
    for row, first, last in ports_of(key, value):
        start, end = row * _PORTS + first, row * _PORTS + last + 1
        table[start:end] = table[start:end].translate(change)


def _library() -> ctypes.CDLL:
    bpf = ctypes.CDLL(probe.LIBRARY, use_errno=True)
    for name, result, arguments in (
        ("bpf_object__open_file", c_void_p, [c_char_p, c_void_p]),
        ("bpf_object__load", c_int, [c_void_p]),
        ("bpf_object__close", None, [c_void_p]),
        ("bpf_object__find_map_by_name", c_void_p, [c_void_p, c_char_p]),
        ("bpf_object__find_program_by_name", c_void_p, [c_void_p, c_char_p]),
        ("bpf_map__initial_value", c_void_p, [c_void_p, POINTER(c_size_t)]),
        ("bpf_map__reuse_fd", c_int, [c_void_p, c_int]),
        ("bpf_map__fd", c_int, [c_void_p]),
        ("bpf_program__attach_cgroup", c_void_p, [c_void_p, c_int]),
        ("bpf_link__fd", c_int, [c_void_p]),
        ("bpf_link__destroy", c_int, [c_void_p]),
        ("bpf_map_get_fd_by_id_opts", c_int, [c_uint32, c_void_p]),
        ("bpf_map_update_elem", c_int, [c_int, c_char_p, c_char_p, c_uint64]),
        ("bpf_map_lookup_elem", c_int, [c_int, c_char_p, c_char_p]),
        ("bpf_map_delete_elem", c_int, [c_int, c_char_p]),
        ("bpf_map_get_next_key", c_int, [c_int, c_char_p, c_char_p]),
    ):
        function = getattr(bpf, name)
        function.restype, function.argtypes = result, arguments
    bpf.libbpf_set_print(None)
    return bpf


def _why() -> str:
    return os.strerror(ctypes.get_errno())


def _map_id(fd: int) -> int:
    """The kernel's own number for a map, as bpftool shows it."""
    return int(_told_of(fd, "map_id"))


def _told_of(fd: int, what: str) -> str:
    """A field of proc_pid_fdinfo(5); for a map and a link see kernel/bpf/syscall.c, kernel/bpf/cgroup.c."""
    found = re.search(rf"^{what}:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    if found is None:
        raise Unsupported(f"the kernel does not tell the {what} of descriptor {fd}")
    return found[1]


def _root_of_cgroups() -> int:
    """A descriptor of the hierarchy's root."""
    for place in _CGROUP2.findall(Path("/proc/self/mountinfo").read_text()):
        with suppress(OSError):
            return os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype, libc.syscall.argtypes = c_long, [c_long, c_long, c_void_p, c_void_p, c_void_p, c_long]
    made = libc.syscall(_FSOPEN, ctypes.cast(c_char_p(b"cgroup2"), c_void_p).value or 0, 1, None, None, 0)
    if made >= 0:
        try:
            if libc.syscall(_FSCONFIG, made, _FSCONFIG_CMD_CREATE, None, None, 0) == 0:
                root = libc.syscall(_FSMOUNT, made, 1, None, None, 0)
                if root >= 0:
                    return int(root)
        finally:
            os.close(made)
    raise Unsupported(f"cgroup v2 is not mounted, and cannot be: {_why()}")
