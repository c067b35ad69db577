"""Loads an object file's programs, attaches them, and reads and changes their maps.

What this file knows: libbpf, how programs are attached.  What it must not know: what a program does, what a map holds.

How it works.  Programs stay attached for as long as a process holds their links (bpf_link: a file descriptor), and a
map lives as long as a program or a descriptor does.  So there is nothing to clean up: when the last process that holds
them ends, in whatever way, the kernel is as it was before.  A process that has only the links can keep
the programs attached, or detach them, but change nothing.

To take over, a later process is given the former links, finds the maps by them (which takes root), loads programs of
its own with the same maps and attaches them.  For a moment both copies are attached.
"""

import ctypes
import errno
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from ctypes import byref, c_char_p, c_long, c_size_t, c_uint32
from pathlib import Path
from typing import NamedTuple

from gangway.ebpf import libbpf, requirements
from gangway.errors import HostRefused, Unsupported

MOST_MAPS = 16
_MOST_ENTRIES = 4096  # that are read with one call
_LAYOUT = ("type", "key_size", "value_size", "max_entries")
# include/uapi/asm-generic/unistd.h: the same on all architectures
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6  # include/uapi/linux/mount.h: FSOPEN_, FSMOUNT_ and FSCONFIG_
_MOUNTED = re.compile(r"^\S+ \S+ \S+ / (\S+) .* - cgroup2 ", re.MULTILINE)  # proc_pid_mountinfo(5)


class ObjectFile(NamedTuple):
    """An object file, the maps that are used of it, and where its programs are attached."""

    path: Path
    maps: tuple[str, ...]
    cgroup_programs: tuple[str, ...]  # attached to the root of the cgroups
    netns_programs: tuple[str, ...] = ()  # attached to the calling thread's network namespace


class LoadedObject:
    """An object file's programs, attached, and its maps.

    Its constants (.rodata) are the cookie of the calling thread's network namespace (8 bytes), then `settings`.
    `former_links`: another process's links, whose maps are used again.  `maps`: descriptors of maps of another object
    that are used in place of its own.  Unsupported: something is missing; the message says what.

    `links` are the descriptors that keep the programs attached.
    """

    def __init__(
        self,
        file: ObjectFile,
        former_links: Sequence[int] = (),
        settings: bytes = b"",
        maps: Mapping[str, int] | None = None,
    ) -> None:
        for probe in requirements.NEEDS.values():
            if (missing := probe()) is not None:
                raise Unsupported(missing)
        if not file.path.exists():
            raise Unsupported(f"{file.path} is missing: run make build")
        self._bpf, self._file, self._given_maps = libbpf.library(), file, maps or {}
        try:
            with ExitStack() as scope:
                constants = requirements.own_netns_cookie().to_bytes(8, sys.byteorder) + settings
                self._maps, self.links = self._load(scope, constants, former_links)
                self._scope = scope.pop_all()
        except OSError as error:
            raise Unsupported(f"cannot load {file.path.name}: {error.strerror or error}") from None

    def close(self) -> None:
        """Close all descriptors: the programs are detached, unless another process holds the links."""
        self._scope.close()

    def is_attached(self) -> bool:
        """Return False if another program has detached a link (`bpftool link detach`)."""
        return all(libbpf.fdinfo(link, "cgroup_id|netns_ino") for link in self.links)

    def map_fd(self, name: str) -> int:
        """Return a map's descriptor, which stays this object's."""
        return self._maps[name]

    def update(self, name: str, key: bytes, value: bytes) -> None:
        """Add or change an entry.  HostRefused: the kernel refused it."""
        error = self._bpf.bpf_map_update_elem(self._maps[name], key, value, 0)
        if error:
            raise HostRefused(f"cannot add an entry to the eBPF map {name}: {os.strerror(-error)}")

    def delete(self, name: str, key: bytes) -> bool:
        """Delete an entry; return False if there was none."""
        return int(self._bpf.bpf_map_delete_elem(self._maps[name], key)) == 0

    def lookup(self, name: str, key: bytes, value_bytes: int) -> bytes | None:
        """Return the value of a key; None if there is none."""
        value = ctypes.create_string_buffer(value_bytes)
        return None if self._bpf.bpf_map_lookup_elem(self._maps[name], key, value) else value.raw

    def keys(self, name: str, key_bytes: int) -> list[bytes]:
        """Return all keys.  They are read at once: after a deletion the kernel would start from the beginning."""
        former, key, found = None, ctypes.create_string_buffer(key_bytes), []
        while self._bpf.bpf_map_get_next_key(self._maps[name], former, key) == 0:
            former = key.raw
            found.append(former)
        return found

    def set_keys(self, name: str, keys: Collection[bytes], key_bytes: int) -> None:
        """Make a map of one-byte flags have these keys and no others.  HostRefused: the kernel refused one."""
        there = set(self.keys(name, key_bytes))
        for former in there.difference(keys):
            self.delete(name, former)
        for key in keys:
            if key not in there:
                self.update(name, key, b"\1")

    def entries(self, name: str, key_bytes: int, value_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        """Yield all entries of a hash table, or of a trie (since Linux 5.13), which are read with few calls.

        What has been read is a number in a hash table, and the last key in a trie (kernel/bpf/syscall.c,
        generic_map_lookup_batch).
        """
        fd, info = self._maps[name], libbpf.MapInfo()
        self._read_info(fd, info)
        most = min(info.max_entries, _MOST_ENTRIES)
        keys, values = (ctypes.create_string_buffer(size * most) for size in (key_bytes, value_bytes))
        position, count, former = ctypes.create_string_buffer(max(4, key_bytes)), c_uint32(most), None
        while True:
            error = self._bpf.bpf_map_lookup_batch(fd, former, position, keys, values, byref(count), None)
            read = count.value if error in (0, -errno.ENOENT) else 0
            packed_keys = ctypes.string_at(keys, read * key_bytes)
            packed_values = ctypes.string_at(values, read * value_bytes)
            for number in range(read):
                key, value = number * key_bytes, number * value_bytes
                yield packed_keys[key : key + key_bytes], packed_values[value : value + value_bytes]
            if error or not read:
                return
            former, count = position, c_uint32(most)

    def _load(
        self, scope: ExitStack, constants: bytes, former_links: Sequence[int]
    ) -> tuple[dict[str, int], list[int]]:
        """Return descriptors of the maps, by name, and of the links; `scope` closes them."""
        bpf, file = self._bpf, self._file
        opened = bpf.bpf_object__open_file(str(file.path).encode(), None)
        if not opened:
            raise Unsupported(f"cannot read {file.path}: {libbpf.reason()}")
        try:
            size = c_size_t()
            start = bpf.bpf_map__initial_value(self._find_map(opened, ".rodata"), byref(size))
            ctypes.memmove(start, constants, len(constants))
            for name, fd in self._given_maps.items():
                bpf.bpf_map__reuse_fd(self._find_map(opened, name), fd)
            for number in {number for link in former_links for number in self._map_ids(link)}:
                self._reuse_map(opened, number)
            if bpf.bpf_object__load(opened):
                raise Unsupported(f"this kernel rejects the programs of {file.path.name}: {libbpf.reason()}")
            maps = {name: _duplicate(scope, bpf.bpf_map__fd(self._find_map(opened, name))) for name in file.maps}
            return maps, [*self._attach(scope, opened)]
        finally:
            bpf.bpf_object__close(opened)

    def _find_map(self, opened: int, name: str) -> int:
        return int(self._bpf.bpf_object__find_map_by_name(opened, name.encode()))

    def _map_ids(self, link: int) -> Sequence[int]:
        """Return the IDs of the maps of a link's program; none if the program has been freed."""
        program = self._bpf.bpf_prog_get_fd_by_id(libbpf.fdinfo(link, "prog_id"))
        if program < 0:
            return ()
        numbers = (c_uint32 * MOST_MAPS)()
        info = libbpf.ProgramInfo(map_count=MOST_MAPS, map_ids=ctypes.addressof(numbers))
        try:
            self._read_info(program, info)
        finally:
            os.close(program)
        return numbers[: info.map_count]

    def _reuse_map(self, opened: int, number: int) -> None:
        """Use an existing map, if it is one of this object's and has the same layout: libbpf does not compare them."""
        bpf, there = self._bpf, libbpf.MapInfo()
        fd = bpf.bpf_map_get_fd_by_id(number)
        if fd < 0:
            return
        try:
            self._read_info(fd, there)
            name = there.name.decode()
            if name in self._file.maps and name not in self._given_maps:
                own = self._find_map(opened, name)
                if all(getattr(there, field) == getattr(bpf, f"bpf_map__{field}")(own) for field in _LAYOUT):
                    bpf.bpf_map__reuse_fd(own, fd)
        finally:
            os.close(fd)

    def _read_info(self, fd: int, info: ctypes.Structure) -> None:
        size = c_uint32(ctypes.sizeof(info))
        if self._bpf.bpf_obj_get_info_by_fd(fd, byref(info), byref(size)):
            raise Unsupported(f"cannot read the kernel's information about descriptor {fd}: {libbpf.reason()}")

    def _attach(self, scope: ExitStack, opened: int) -> Iterator[int]:
        bpf, file = self._bpf, self._file
        for names, attach, open_place, place_name in (
            (file.netns_programs, bpf.bpf_program__attach_netns, _open_netns, "network namespace"),
            (file.cgroup_programs, bpf.bpf_program__attach_cgroup, _open_root_cgroup, "root cgroup"),
        ):
            if not names:
                continue
            place = open_place()
            try:
                for name in names:
                    link = attach(bpf.bpf_object__find_program_by_name(opened, name.encode()), place)
                    if not link:
                        raise Unsupported(f"cannot attach the program {name} to the {place_name}: {libbpf.reason()}")
                    yield _duplicate(scope, bpf.bpf_link__fd(link))
                    bpf.bpf_link__destroy(link)  # closes libbpf's descriptor; ours keeps the link
            finally:
                os.close(place)


def _duplicate(scope: ExitStack, fd: int) -> int:
    own = os.dup(fd)  # libbpf is going to close the other one
    scope.callback(os.close, own)
    return own


def _open_root_cgroup() -> int:
    """Return a descriptor of the root of cgroup v2: what is attached there runs for the sockets of every process."""
    for path in _MOUNTED.findall(Path("/proc/self/mountinfo").read_text()):
        with suppress(OSError):
            root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if os.access("cgroup.subtree_control", os.F_OK, dir_fd=root):
                return root
            os.close(root)  # another file system is mounted over it
    return _mount_root_cgroup()


def _mount_root_cgroup() -> int:
    """Mount it for this process alone (fsmount(2))."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = c_long
    context = syscall(c_long(_FSOPEN), c_char_p(b"cgroup2"), c_long(_CLOEXEC))
    if context >= 0:
        try:
            if syscall(c_long(_FSCONFIG), c_long(context), c_long(_CMD_CREATE), None, None, c_long(0)) == 0:
                root = syscall(c_long(_FSMOUNT), c_long(context), c_long(_CLOEXEC), c_long(0))
                if root >= 0:
                    return int(root)
        finally:
            os.close(context)
    raise Unsupported(f"cgroup v2 is not mounted and cannot be mounted: {libbpf.reason()}")


def _open_netns() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
