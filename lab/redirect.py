"""What the kernel records about redirected sockets and attached programs."""

import ctypes
import os
import re
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_FAMILIES = {socket.AF_INET: "", socket.AF_INET6: "6"}
_KINDS = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}


def aimed_at(client: socket.socket) -> tuple[str, int]:
    """Return the address and port that a connected TCP or UDP socket really sends to.

    It must be of the calling thread's network namespace.  getpeername(2) would return the requested address; the table
    of sockets (proc_pid_net(5)) has the real one.
    """
    inode = str(os.fstat(client.fileno()).st_ino)
    table = Path(f"/proc/thread-self/net/{_KINDS[client.type]}{_FAMILIES[client.family]}").read_text()
    remote = next(words[2] for words in map(str.split, table.splitlines()) if words[9] == inode)
    address, _, port = remote.partition(":")
    packed = b"".join(int(address[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(address), 8))
    return socket.inet_ntop(client.family, packed).removeprefix("::ffff:"), int(port, 16)


def links_of(pids: Iterable[int]) -> set[int]:
    """Return the IDs of the links by which these processes keep programs attached to cgroups (`bpftool link`)."""
    found = set()
    for pid in pids:
        for told in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(FileNotFoundError):
                number = re.search(r"^link_type:\s*cgroup\nlink_id:\s*(\d+)", told.read_text(), re.MULTILINE)
                found |= {int(number[1])} if number else set()
    return found


def is_link(number: int) -> bool:
    """Return whether the kernel still has a link."""
    fd = int(_library().bpf_link_get_fd_by_id(number))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def detach(number: int) -> None:
    """Detach a link as `bpftool link detach id` does: its program no longer runs, whichever process holds the link."""
    bpf = _library()
    fd = bpf.bpf_link_get_fd_by_id(number)
    assert fd >= 0, f"there is no link {number}"
    try:
        assert bpf.bpf_link_detach(fd) == 0, f"link {number} cannot be detached"
    finally:
        os.close(fd)


def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libbpf.so.1")
