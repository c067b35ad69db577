"""libnftables, called in this process: to start nft(8), which only calls it, takes twenty times as long as a change.

nftables carries out a text as one transaction: all of it or nothing (libnftables(3)).
"""

import ctypes
import json
from contextlib import suppress
from ctypes import c_bool, c_char_p, c_int, c_uint, c_void_p

from gangway.errors import HostRefused, Unsupported

_LONG_TEXT = 1 << 20  # bytes
_LIBRARY = "libnftables.so.1"
# include/nftables/libnftables.h
_STATELESS, _JSON, _TERSE = 1 << 1, 1 << 4, 1 << 11


class Nftables:
    """libnftables, in the network namespace of the calling thread.  Unsupported: it is not installed."""

    def __init__(self) -> None:
        try:
            self._library = library = ctypes.CDLL(_LIBRARY)
        except OSError:
            raise Unsupported(f"nftables cannot be used: {_LIBRARY} is not installed (Debian: nftables)") from None
        library.nft_ctx_new.restype, library.nft_ctx_new.argtypes = c_void_p, [c_uint]
        library.nft_run_cmd_from_buffer.argtypes = [c_void_p, c_char_p]
        library.nft_ctx_output_set_flags.argtypes = [c_void_p, c_uint]
        library.nft_ctx_set_dry_run.argtypes = [c_void_p, c_bool]
        for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
            getattr(library, name).argtypes = [c_void_p]
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, name).argtypes = [c_void_p]
            getattr(library, name).restype = c_char_p
        library.nft_run_cmd_from_buffer.restype = c_int
        self._context = library.nft_ctx_new(0)
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)

    @classmethod
    def if_installed(cls) -> "Nftables | None":
        """Return the library, or None if it is not installed."""
        try:
            return cls()
        except Unsupported:
            return None

    def close(self) -> None:
        self._library.nft_ctx_free(self._context)

    def apply(self, text: str) -> None:
        """Carry out a transaction.  HostRefused: nothing was changed."""
        self._run(text)
        if len(text) > _LONG_TEXT:
            with suppress(AttributeError):  # glibc has malloc_trim, musl does not
                ctypes.CDLL(None).malloc_trim(0)  # while it works, libnftables needs a hundred times the text's size

    def accepts(self, text: str) -> bool:
        """True if the kernel would carry out a transaction; it is not carried out."""
        self._library.nft_ctx_set_dry_run(self._context, True)
        try:
            self._run(text)
        except HostRefused:
            return False
        finally:
            self._library.nft_ctx_set_dry_run(self._context, False)
        return True

    def listing(self, table: str) -> str:
        """Return a table's rules, and its sets without their elements; empty if there is no such table."""
        try:
            return self._run(f"list table {table}", _STATELESS | _TERSE)
        except HostRefused:
            return ""

    def chains(self) -> str:
        """Return all chains as JSON (libnftables-json(5)).  HostRefused: the kernel has no nftables."""
        return self._run("list chains", _JSON)

    def last_rule(self, table: str, chain: str) -> list[dict[str, object]] | None:
        """Return the expressions of a chain's last rule, as JSON has them; None if the chain has no rules."""
        found = json.loads(self._run(f"list chain {table} {chain}", _JSON))["nftables"]
        rules = [entry["rule"] for entry in found if "rule" in entry]
        return rules[-1]["expr"] if rules else None

    def element_counts(self, table: str) -> dict[str, int]:
        """Return the number of elements of each set and map of a table, without those that are empty."""
        entries = json.loads(self._run(f"list table {table}", _JSON))["nftables"]
        sets = [entry.get("set") or entry.get("map") or {} for entry in entries]
        return {one["name"]: len(one["elem"]) for one in sets if one.get("elem")}

    def _run(self, text: str, flags: int = 0) -> str:
        self._library.nft_ctx_output_set_flags(self._context, flags)
        failed = self._library.nft_run_cmd_from_buffer(self._context, text.encode())
        output = self._library.nft_ctx_get_output_buffer(self._context) or b""
        errors = self._library.nft_ctx_get_error_buffer(self._context) or b""
        if failed:
            lines = [*errors.decode(errors="replace").splitlines(), "refused"]
            raise HostRefused(f"nftables: {lines[0].removeprefix('Error: ')}")
        return bytes(output).decode(errors="replace")
