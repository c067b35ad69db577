"""What the kernel records about redirected sockets and attached programs."""

import ctypes
import errno
import os
import re
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_FAMILIES = {socket.AF_INET: "", socket.AF_INET6: "6"}
_KINDS = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}


def actual_peer(client: socket.socket) -> tuple[str, int]:
    """Return the address and port that a connected TCP or UDP socket of the current network namespace sends to.

    getpeername(2) returns the address that the client connected to; the table of sockets (proc_pid_net(5)) is not
    translated.

    ConnectionResetError: the table has no such socket, because the other end has reset the connection.
    """
    inode = str(os.fstat(client.fileno()).st_ino)
    table = Path(f"/proc/thread-self/net/{_KINDS[client.type]}{_FAMILIES[client.family]}").read_text()
    remote = next((words[2] for words in map(str.split, table.splitlines()) if words[9] == inode), "")
    if not remote:
        raise ConnectionResetError(errno.ECONNRESET, "the connection was reset")
    address, _, port = remote.partition(":")
    packed = b"".join(int(address[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(address), 8))
    return socket.inet_ntop(client.family, packed).removeprefix("::ffff:"), int(port, 16)


def cgroup_links_of(pids: Iterable[int]) -> set[int]:
    """Return the ids of the BPF links by which processes keep programs attached to cgroups (`bpftool link`)."""
    found = set()
    for pid in pids:
        for info in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(FileNotFoundError):
                link = re.search(r"^link_type:\s*cgroup\nlink_id:\s*(\d+)", info.read_text(), re.MULTILINE)
                found |= {int(link[1])} if link else set()
    return found


def link_exists(link_id: int) -> bool:
    """True if the kernel still has this BPF link."""
    fd = int(_libbpf().bpf_link_get_fd_by_id(link_id))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def detach_link(link_id: int) -> None:
    """Detach the program of a BPF link, like `bpftool link detach id`: it no longer runs, though the link is held."""
    bpf = _libbpf()
    fd = bpf.bpf_link_get_fd_by_id(link_id)
    assert fd >= 0, f"there is no BPF link {link_id}"
    try:
        assert bpf.bpf_link_detach(fd) == 0, f"BPF link {link_id} cannot be detached"
    finally:
        os.close(fd)


def _libbpf() -> ctypes.CDLL:
    return ctypes.CDLL("libbpf.so.1")
