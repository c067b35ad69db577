"""What an operator may set for the daemon: by options, or by the same names in a file.

What this file knows: the keys, and that an option comes before the file.  What it must not know: what is done with
them.
"""

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from gangway.errors import InvalidRequest
from gangway.firewall.iptables.render import DEFAULT_PREFIX
from gangway.relay.settings import Settings, checked

FIREWALLS = ("auto", "nftables", "iptables", "none")
_LONGEST_PREFIX = 20  # a chain of iptables has 28 characters at most
# A chain of such a name is refused, or takes the target's place in the rules.
_NO_PREFIX = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "ACCEPT", "DROP", "RETURN", "QUEUE"}
_NO_PREFIX |= {"MASQUERADE", "DNAT", "SNAT", "REDIRECT", "REJECT", "LOG", "MARK", "CT", "NOTRACK", "TRACE"}


class Config(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    rename={"ip_forward": "ip-forward", "chain_prefix": "chain-prefix"},
):
    """The daemon's settings."""

    firewall: str = "auto"
    """`auto`, `nftables`, `iptables` or `none`."""
    ip_forward: bool = True
    """Whether forwarding may be switched on."""
    chain_prefix: str = DEFAULT_PREFIX
    """The name of iptables' chains; DOCKER asks for Docker's layout to the letter."""
    state: str = "/var/lib/gangway/state.db"
    """The database's path."""
    relay: dict[str, Any] = {}
    """The relay's settings: `gangway.relay.settings`."""

    @property
    def relay_settings(self) -> Settings:
        """The relay's settings, checked."""
        return checked(self.relay, "relay")

    def __post_init__(self) -> None:
        _ = self.relay_settings
        if self.firewall not in FIREWALLS:
            raise InvalidRequest(f"unknown firewall {self.firewall!r}: {', '.join(FIREWALLS)}")
        prefix = self.chain_prefix
        if not (prefix.isascii() and prefix.isalnum() and len(prefix) <= _LONGEST_PREFIX) or prefix in _NO_PREFIX:
            raise InvalidRequest(
                f"{prefix!r} is no prefix: up to {_LONGEST_PREFIX} letters and digits, and no chain or target's name"
            )


def load(path: Path | None, options: dict[str, Any]) -> Config:
    """The settings in a TOML file, if there is one, with `options` on top.  InvalidRequest names what is wrong."""
    given: dict[str, Any] = {}
    if path is not None:
        try:
            given = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidRequest(f"{path}: {error}") from None
        _convert(given, str(path))
    return _convert(given | options, "options")


def _convert(given: dict[str, Any], where: str) -> Config:
    try:
        return msgspec.convert(given, Config)
    except (msgspec.ValidationError, InvalidRequest) as error:
        raise InvalidRequest(f"{where}: {error}") from None
