"""Bindings for the core's C library, by ctypes: the structures and signatures are those of `core.h`."""

import ctypes
import os
import socket
from ctypes import POINTER, c_int, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path

from gangway.relay import sockets

_PATH = Path(__file__).with_name("core.so")


class End(ctypes.Structure):
    """struct core_end: an address and a port."""

    _fields_ = (("family", c_uint16), ("port", c_uint16), ("zone", c_uint32), ("address", c_uint8 * 16))

    @classmethod
    def at(cls, address: str, port: int = 0) -> "End":
        """Return the end at an address, which may have a zone."""
        plain, _, zone = address.partition("%")
        family = socket.AF_INET6 if ":" in plain else socket.AF_INET
        packed = socket.inet_pton(family, plain)
        return cls(family, port, _index(zone) if zone else 0, (c_uint8 * 16)(*packed))


class Subnet(ctypes.Structure):
    """struct core_subnet."""

    _fields_ = (("family", c_uint16), ("length", c_uint16), ("address", c_uint8 * 16))

    @classmethod
    def of(cls, text: str) -> "Subnet":
        """Return the subnet that is written ADDRESS/PREFIX-LENGTH."""
        address, _, length = text.partition("/")
        end = End.at(address)
        return cls(end.family, int(length), end.address)


class PortSettings(ctypes.Structure):
    """struct core_port_settings."""

    _fields_ = (
        ("host", End),
        ("backend", End),
        ("admitted", POINTER(Subnet)),
        ("admitted_count", c_uint32),
        ("last", c_uint16),
        ("protocol", c_uint16),
    )


class Counters(ctypes.Structure):
    """struct core_counters."""

    _fields_ = tuple((name, c_uint64) for name in sockets.Counters._fields)


class Note(ctypes.Structure):
    """struct core_note."""

    _fields_ = (
        ("port", c_uint64),
        ("end", End),
        ("kind", c_int32),
        ("error", c_int32),
        ("protocol", c_uint32),
        ("host_port", c_uint32),
    )


PORT_REMOVED, CANNOT_CONNECT, CLIENTS_WAIT, CLIENT_LOST = 1, 2, 3, 4
UDP_CLIENT_LOST, NOT_SENT_UP, NOT_SENT_DOWN, UNREACHABLE = 5, 6, 7, 8
"""enum core_note_kind."""


class CoreSettings(ctypes.Structure):
    """struct core_settings."""

    _fields_ = (
        ("threads", c_uint32),
        ("keepalive_s", c_uint32),
        ("connect_timeout_ms", c_uint32),
        ("udp_timeout_s", c_uint32),
        ("udp_clients", c_uint32),
        ("udp_clients_per_port", c_uint32),
        ("icmp", c_int32),
        ("icmp6", c_int32),
    )


def _load() -> ctypes.CDLL:
    core = ctypes.CDLL(str(_PATH), use_errno=True)
    for result, name, arguments in (
        (c_void_p, "start", [POINTER(CoreSettings)]),
        (None, "stop", [c_void_p]),
        (c_int, "notes_fd", [c_void_p]),
        (c_int, "read_notes", [c_void_p, POINTER(Note), c_int]),
        (c_void_p, "listen", [c_void_p, c_int, c_int]),
        (None, "leave_entrance", [c_void_p, c_void_p]),
        (None, "close_entrance", [c_void_p, c_void_p]),
        (c_void_p, "add_port", [c_void_p, POINTER(PortSettings), c_int, c_int]),
        (None, "leave_port", [c_void_p, c_void_p]),
        (None, "remove_port", [c_void_p, c_void_p]),
        (None, "read_counters", [c_void_p, POINTER(Counters)]),
        (c_int, "open_icmp", [c_int]),
        (c_int, "confine", []),
        (c_int, "admits", [POINTER(Subnet), c_uint32, POINTER(End)]),
        (c_int, "exclude", [c_void_p, POINTER(End), c_uint32]),
        (c_uint64, "active", [c_void_p]),
    ):
        function = getattr(core, f"core_{name}")
        function.restype, function.argtypes = result, arguments
    return core


library = _load()
"""Loaded with this module: after the relay has given up root it may not be able to read its own files.

Functions that return a pointer return None on failure, and set errno."""


def error() -> OSError:
    """Return the error of the last call in this thread."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _index(zone: str) -> int:
    try:
        return socket.if_nametoindex(zone)
    except OSError:
        if not zone.isdecimal():
            raise
        return int(zone)
