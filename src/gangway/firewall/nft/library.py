"""libnftables, called in this process: to start nft(8), which only calls it, takes twenty times as long as a change.

nftables carries out a text as one transaction: all of it or nothing (libnftables(3)).
"""

import ctypes
from contextlib import suppress
from ctypes import c_bool, c_char_p, c_int, c_uint, c_void_p

from gangway.errors import HostRefused, Unsupported

_LONG_TEXT = 1 << 20  # bytes
_UNKNOWN_PROTOCOL = "Could not resolve protocol name"  # `tcp`: it asks getprotobyname(3)
_NO_PROTOCOLS = ": /etc/protocols is missing or incomplete (Debian: apt-get install netbase)"
_LIBRARY = "libnftables.so.1"


class Nftables:
    """libnftables, in the network namespace of the calling thread.  Unsupported: it is not installed."""

    def __init__(self) -> None:
        try:
            self._library = library = ctypes.CDLL(_LIBRARY)
        except OSError:
            raise Unsupported(f"nftables cannot be used: {_LIBRARY} is not installed (Debian: nftables)") from None
        library.nft_ctx_new.restype, library.nft_ctx_new.argtypes = c_void_p, [c_uint]
        library.nft_run_cmd_from_buffer.argtypes = [c_void_p, c_char_p]
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

    def _run(self, text: str) -> None:
        failed = self._library.nft_run_cmd_from_buffer(self._context, text.encode())
        errors = self._library.nft_ctx_get_error_buffer(self._context) or b""
        if failed:
            lines = [*errors.decode(errors="replace").splitlines(), "refused"]
            reason = lines[0].removeprefix("Error: ")
            raise HostRefused(f"nftables: {reason}{_NO_PROTOCOLS if _UNKNOWN_PROTOCOL in reason else ''}")
