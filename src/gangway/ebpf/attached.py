"""Which programs of gangway's there are in the kernel for this network namespace, whoever holds them."""

import ctypes
import os
import sys
from collections.abc import Iterator
from ctypes import byref, c_uint32
from typing import Any

from gangway.ebpf import libbpf, redirect, requirements, steering
from gangway.ebpf.loader import MOST_MAPS

_NAME_BYTES = 15  # include/uapi/linux/bpf.h, BPF_OBJ_NAME_LEN, without the closing zero
_COOKIE_BYTES = 8  # what the constants of both programs begin with
_OBJECTS = (redirect.OBJECT, steering.OBJECT)
_NAMES = {name[:_NAME_BYTES] for one in _OBJECTS for name in (*one.cgroup_programs, *one.netns_programs)}


def attached() -> list[str]:
    """Return the names of the programs; none where there can be none."""
    if any(probe() is not None for probe in requirements.NEEDS.values()):
        return []
    bpf, cookie = libbpf.library(), requirements.own_netns_cookie().to_bytes(_COOKIE_BYTES, sys.byteorder)
    found = []
    for fd in _programs(bpf):
        numbers = (c_uint32 * MOST_MAPS)()
        info = libbpf.ProgramInfo(map_count=MOST_MAPS, map_ids=ctypes.addressof(numbers))
        name = info.name.decode() if _read(bpf, fd, info) else ""
        os.close(fd)
        if name in _NAMES and any(_constants(bpf, one) == cookie for one in numbers[: info.map_count]):
            found.append(name)
    return found


def _programs(bpf: Any) -> Iterator[int]:
    """Yield a descriptor of each program in the kernel, the caller's to close."""
    number = c_uint32()
    while bpf.bpf_prog_get_next_id(number, byref(number)) == 0:
        fd = bpf.bpf_prog_get_fd_by_id(number)
        if fd >= 0:  # else it was freed meanwhile
            yield fd


def _constants(bpf: Any, number: int) -> bytes:
    """Return the first bytes of a map of constants; nothing of another map."""
    fd, info = bpf.bpf_map_get_fd_by_id(number), libbpf.MapInfo()
    if fd < 0:
        return b""
    try:
        if not _read(bpf, fd, info) or not info.name.endswith(b".rodata"):
            return b""
        value = ctypes.create_string_buffer(info.value_size)
        return b"" if bpf.bpf_map_lookup_elem(fd, bytes(4), value) else value.raw[:_COOKIE_BYTES]
    finally:
        os.close(fd)


def _read(bpf: Any, fd: int, info: ctypes.Structure) -> bool:
    size = c_uint32(ctypes.sizeof(info))
    return int(bpf.bpf_obj_get_info_by_fd(fd, byref(info), byref(size))) == 0
