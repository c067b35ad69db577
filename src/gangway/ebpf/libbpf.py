"""Bindings for libbpf 1, by ctypes: the signatures are those of bpf/libbpf.h and bpf/bpf.h."""

import ctypes
import os
import re
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

from gangway.errors import Unsupported

LIBRARY = "libbpf.so.1"


class MapInfo(ctypes.Structure):
    """The beginning of struct bpf_map_info (include/uapi/linux/bpf.h)."""

    _fields_ = (
        *((name, c_uint32) for name in ("type", "id", "key_size", "value_size", "max_entries", "map_flags")),
        ("name", ctypes.c_char * 16),
    )


class ProgramInfo(ctypes.Structure):
    """The beginning of struct bpf_prog_info."""

    _fields_ = (
        *((name, c_uint32) for name in ("type", "id", "tag_high", "tag_low", "jited_len", "xlated_len")),
        *((name, c_uint64) for name in ("jited", "xlated", "load_time")),
        *((name, c_uint32) for name in ("created_by_uid", "map_count")),
        ("map_ids", c_void_p),
        ("name", ctypes.c_char * 16),
    )


def library() -> ctypes.CDLL:
    """Load libbpf.  Functions that return a pointer return None on failure, the others a negative errno."""
    bpf = ctypes.CDLL(LIBRARY, use_errno=True)
    for result, arguments, names in (
        (c_void_p, [c_char_p, c_void_p], ["object__open_file"]),
        (c_int, [c_void_p], ["object__load", "map__fd", "map__type", "link__fd", "link__destroy"]),
        (c_uint32, [c_void_p], ["map__key_size", "map__value_size", "map__max_entries"]),
        (None, [c_void_p], ["object__close"]),
        (c_void_p, [c_void_p, c_char_p], ["object__find_map_by_name", "object__find_program_by_name"]),
        (c_void_p, [c_void_p, POINTER(c_size_t)], ["map__initial_value"]),
        (c_int, [c_void_p, c_int], ["map__reuse_fd"]),
        (c_void_p, [c_void_p, c_int], ["program__attach_cgroup", "program__attach_netns"]),
        (c_int, [c_uint32], ["map_get_fd_by_id", "prog_get_fd_by_id"]),
        (c_int, [c_uint32, POINTER(c_uint32)], ["prog_get_next_id"]),
        (c_int, [c_int, c_void_p, c_void_p], ["obj_get_info_by_fd"]),
        (c_int, [c_int, c_char_p, c_char_p, c_uint64], ["map_update_elem"]),
        (c_int, [c_int, c_char_p, c_char_p], ["map_lookup_elem", "map_get_next_key"]),
        (c_int, [c_int, c_char_p], ["map_delete_elem"]),
        (c_int, [c_int, *[c_void_p] * 4, POINTER(c_uint32), c_void_p], ["map_lookup_batch"]),
    ):
        for name in names:
            function = getattr(bpf, f"bpf_{name}")
            function.restype, function.argtypes = result, arguments
    bpf.libbpf_set_print(None)
    return bpf


def reason() -> str:
    return os.strerror(ctypes.get_errno())


def fdinfo(fd: int, field: str) -> int:
    """Return a number that the kernel shows for a descriptor (proc_pid_fdinfo(5)); `field` is a regular expression.

    The fields of a link: kernel/bpf/syscall.c, cgroup.c and net_namespace.c.
    """
    found = re.search(rf"^(?:{field}):\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    if found is None:
        raise Unsupported(f"/proc/self/fdinfo/{fd} has no {field}")
    return int(found[1])
