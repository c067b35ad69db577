"""Programs in the kernel: loaded from an object file, attached, their maps changed.

What this file knows: libbpf (by ctypes; the signatures are those of bpf/libbpf.h and bpf/bpf.h), cgroup v2.  What it
must not know: what a program does, what is in a map.

How it works.  The programs are attached for as long as somebody holds their links (bpf_link: a file descriptor), and
a map lives as long as a program or a descriptor does.  So there is nothing to clean up: when the last of the processes
that hold them ends, however it ends, the kernel is as it was.  Whoever is to keep the programs going without this
process gets `links`, by which it can end them, and change nothing.  A process that comes later is given those back
(`former`), finds the maps by them, which takes root, loads programs of its own with the same maps, and so takes over:
for a moment both copies are attached.

The hierarchy's root is found where it is mounted, whatever the place, or mounted for this process alone (fsmount(2)).
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_long, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

from gangway.ebpf import requirements as bpf_probe
from gangway.errors import HostRefused, Unsupported

_MOST_MAPS = 16
# include/uapi/asm-generic/unistd.h: the same on all architectures
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6  # include/uapi/linux/mount.h: FSOPEN_, FSMOUNT_ and FSCONFIG_
_CGROUP2 = re.compile(r"^\S+ \S+ \S+ / (\S+) .* - cgroup2 ", re.MULTILINE)  # proc_pid_mountinfo(5)


class Module(NamedTuple):
    """An object file, and what is needed of it."""

    path: Path
    maps: tuple[str, ...]
    on_cgroups: tuple[str, ...]
    """The programs to be attached to the root of the cgroups."""
    on_netns: tuple[str, ...] = ()
    """Those to be attached to the calling thread's network namespace."""


class _Map(ctypes.Structure):
    """The beginning of struct bpf_map_info (include/uapi/linux/bpf.h)."""

    _fields_ = (
        *((name, c_uint32) for name in ("type", "id", "key_size", "value_size", "max_entries", "map_flags")),
        ("name", ctypes.c_char * 16),
    )


class _Program(ctypes.Structure):
    """The beginning of struct bpf_prog_info."""

    _fields_ = (
        *((name, c_uint32) for name in ("type", "id", "tag_high", "tag_low", "jited_len", "xlated_len")),
        *((name, c_uint64) for name in ("jited", "xlated", "load_time")),
        *((name, c_uint32) for name in ("created_by_uid", "map_count")),
        ("map_ids", c_void_p),
    )


class Loaded:
    """A module's programs, attached, and its maps.

    Its constants (.rodata) are set to the cookie of the calling thread's network namespace (8 bytes) and `settings`
    behind it; `former` are the links of another process, `given` descriptors of maps that another module has made.
    Unsupported says what is missing.
    """

    links: Sequence[int]
    """Descriptors that keep it going; see the head of this file."""

    def __init__(
        self,
        module: Module,
        former: Sequence[int] = (),
        settings: bytes = b"",
        given: Mapping[str, int] | None = None,
    ) -> None:
        for needs in bpf_probe.NEEDS.values():
            why = needs()
            if why is not None:
                raise Unsupported(why)
        if not module.path.exists():
            raise Unsupported(f"{module.path} is missing: make build")
        self._bpf = _library()
        self._given = given or {}
        try:
            with ExitStack() as scope:
                constants = bpf_probe.own_cookie().to_bytes(8, sys.byteorder) + settings
                self._maps, self.links = self._load(scope, module, constants, former)
                self._scope = scope.pop_all()
        except OSError as error:
            raise Unsupported(f"{module.path.name} cannot be loaded: {error.strerror or error}") from None

    def close(self) -> None:
        """Lets go of everything: nothing is attached any more, unless somebody else holds it."""
        self._scope.close()

    def is_attached(self) -> bool:
        """Nobody else has ended it (`bpftool link detach`)."""
        return all(_told_of(fd, "cgroup_id|netns_ino") != "0" for fd in self.links)

    def map_fd(self, name: str) -> int:
        """A map's descriptor; it stays ours."""
        return self._maps[name]

    def update(self, name: str, key: bytes, value: bytes) -> None:
        """An entry, new or changed.  HostRefused: the kernel does not take it."""
        error = self._bpf.bpf_map_update_elem(self._maps[name], key, value, 0)
        if error:
            raise HostRefused(f"the map {name} takes no more: {os.strerror(-error)}")

    def erase(self, name: str, key: bytes) -> bool:
        """Whether there was an entry."""
        return int(self._bpf.bpf_map_delete_elem(self._maps[name], key)) == 0

    def look_up(self, name: str, key: bytes, size: int) -> bytes | None:
        """A value of so many bytes; None if there is none."""
        value = ctypes.create_string_buffer(size)
        found = self._bpf.bpf_map_lookup_elem(self._maps[name], key, value) == 0
        return value.raw if found else None

    def keys(self, name: str, size: int) -> list[bytes]:
        """All keys, of so many bytes; all at once: a map that changes meanwhile would begin anew."""
        before, key, found = None, ctypes.create_string_buffer(size), []
        while self._bpf.bpf_map_get_next_key(self._maps[name], before, key) == 0:
            before = key.raw
            found.append(before)
        return found

    def entries(self, name: str, key_bytes: int, value_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        """All keys and values."""
        for key in self.keys(name, key_bytes):
            value = self.look_up(name, key, value_bytes)
            if value is not None:
                yield key, value

    def _load(
        self, scope: ExitStack, module: Module, constants: bytes, former: Sequence[int]
    ) -> tuple[dict[str, int], list[int]]:
        """Descriptors of the maps, by name, and of the links; `scope` closes them."""
        bpf = self._bpf
        opened = bpf.bpf_object__open_file(str(module.path).encode(), None)
        if not opened:
            raise Unsupported(f"{module.path} cannot be read: {_why()}")
        try:
            self._prepare(opened, module, constants, former)
            if bpf.bpf_object__load(opened):
                raise Unsupported(f"this kernel does not take the programs of {module.path.name}: {_why()}")
            maps = {name: bpf.bpf_object__find_map_by_name(opened, name.encode()) for name in module.maps}
            kept = {name: _kept(scope, bpf.bpf_map__fd(found)) for name, found in maps.items()}
            return kept, [*self._attach(scope, opened, module)]
        finally:
            bpf.bpf_object__close(opened)

    def _prepare(self, opened: int, module: Module, constants: bytes, former: Sequence[int]) -> None:
        bpf = self._bpf
        size = c_size_t()
        start = bpf.bpf_map__initial_value(bpf.bpf_object__find_map_by_name(opened, b".rodata"), byref(size))
        ctypes.memmove(start, constants, len(constants))
        for name, fd in self._given.items():
            bpf.bpf_map__reuse_fd(bpf.bpf_object__find_map_by_name(opened, name.encode()), fd)
        for number in {number for link in former for number in self._map_numbers(link)}:
            self._reuse(opened, number, module)

    def _map_numbers(self, link: int) -> Sequence[int]:
        """The kernel's numbers of the maps that a link's program has; none if the program is gone."""
        program = self._bpf.bpf_prog_get_fd_by_id(int(_told_of(link, "prog_id")))
        if program < 0:
            return ()
        numbers = (c_uint32 * _MOST_MAPS)()
        info = _Program(map_count=_MOST_MAPS, map_ids=ctypes.addressof(numbers))
        try:
            self._tell(program, info)
        finally:
            os.close(program)
        return numbers[: info.map_count]

    def _reuse(self, opened: int, number: int, module: Module) -> None:
        """libbpf takes a map of whatever kind for one of ours; one of another version is left alone."""
        bpf, there = self._bpf, _Map()
        fd = bpf.bpf_map_get_fd_by_id(number)
        if fd < 0:
            return
        try:
            self._tell(fd, there)
            if there.name.decode() in set(module.maps).difference(self._given):
                wanted = bpf.bpf_object__find_map_by_name(opened, there.name)
                sizes = bpf.bpf_map__key_size(wanted), bpf.bpf_map__value_size(wanted), bpf.bpf_map__max_entries(wanted)
                kind = bpf.bpf_map__type(wanted), *sizes
                if (there.type, there.key_size, there.value_size, there.max_entries) == kind:
                    bpf.bpf_map__reuse_fd(wanted, fd)
        finally:
            os.close(fd)

    def _tell(self, fd: int, info: ctypes.Structure) -> None:
        size = c_uint32(ctypes.sizeof(info))
        if self._bpf.bpf_obj_get_info_by_fd(fd, byref(info), byref(size)):
            raise Unsupported(f"the kernel does not tell what descriptor {fd} is: {_why()}")

    def _attach(self, scope: ExitStack, opened: int, module: Module) -> Iterator[int]:
        bpf = self._bpf
        with ExitStack() as places:
            for names, attach, place, where in (
                (module.on_netns, bpf.bpf_program__attach_netns, _own_netns, "network namespace"),
                (module.on_cgroups, bpf.bpf_program__attach_cgroup, _root_of_cgroups, "root of the cgroups"),
            ):
                fd = place() if names else -1
                if names:
                    places.callback(os.close, fd)
                for name in names:
                    link = attach(bpf.bpf_object__find_program_by_name(opened, name.encode()), fd)
                    if not link:
                        raise Unsupported(f"the program {name} cannot be attached to the {where}: {_why()}")
                    yield _kept(scope, bpf.bpf_link__fd(link))
                    bpf.bpf_link__destroy(link)  # its own descriptor; ours keeps the link


def _kept(scope: ExitStack, fd: int) -> int:
    """A descriptor of our own, for libbpf closes its."""
    kept = os.dup(fd)
    scope.callback(os.close, kept)
    return kept


def _library() -> ctypes.CDLL:
    bpf = ctypes.CDLL(bpf_probe.LIBRARY, use_errno=True)
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
        ("bpf_program__attach_netns", c_void_p, [c_void_p, c_int]),
        ("bpf_link__fd", c_int, [c_void_p]),
        ("bpf_link__destroy", c_int, [c_void_p]),
        ("bpf_map__type", c_int, [c_void_p]),
        ("bpf_map__key_size", c_uint32, [c_void_p]),
        ("bpf_map__value_size", c_uint32, [c_void_p]),
        ("bpf_map__max_entries", c_uint32, [c_void_p]),
        ("bpf_map_get_fd_by_id", c_int, [c_uint32]),
        ("bpf_prog_get_fd_by_id", c_int, [c_uint32]),
        ("bpf_obj_get_info_by_fd", c_int, [c_int, c_void_p, c_void_p]),
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


def _told_of(fd: int, what: str) -> str:
    """A field of proc_pid_fdinfo(5); for a map and a link see kernel/bpf/syscall.c, cgroup.c and net_namespace.c."""
    found = re.search(rf"^(?:{what}):\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    if found is None:
        raise Unsupported(f"the kernel does not tell the {what} of descriptor {fd}")
    return found[1]


def _own_netns() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _root_of_cgroups() -> int:
    """A descriptor of the hierarchy's root."""
    for place in _CGROUP2.findall(Path("/proc/self/mountinfo").read_text()):
        with suppress(OSError):
            root = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if os.access("cgroup.subtree_control", os.F_OK, dir_fd=root):
                return root
            os.close(root)  # something else is mounted over it
    return _mounted_privately()


def _mounted_privately() -> int:
    """The same of a mount that nobody else sees."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = c_long
    made = syscall(c_long(_FSOPEN), c_char_p(b"cgroup2"), c_long(_CLOEXEC))
    if made >= 0:
        try:
            if syscall(c_long(_FSCONFIG), c_long(made), c_long(_CMD_CREATE), None, None, c_long(0)) == 0:
                root = syscall(c_long(_FSMOUNT), c_long(made), c_long(_CLOEXEC), c_long(0))
                if root >= 0:
                    return int(root)
        finally:
            os.close(made)
    raise Unsupported(f"cgroup v2 is not mounted, and cannot be: {_why()}")
