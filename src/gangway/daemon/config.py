"""The daemon's settings: a TOML file, and command-line options that override it."""

import grp
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from gangway.errors import InvalidRequest
from gangway.exclusions import parse_exclusion
from gangway.log import unusable
from gangway.relay.settings import Settings, checked

SETTINGS = Path("/etc/gangway/gangway.toml")
"""Read if it exists and no other file is named."""
OLD_SETTINGS = Path("/etc/gangway/docker-proxy.toml")
"""Read if it exists, as the table `[relay]`; deprecated."""
GROUP = "gangway"
"""The group that may use the API socket, if it exists and the settings name no other."""
FIREWALLS = ("auto", "nftables", "iptables", "none")
PREFIX = "GANGWAY"
_LONGEST_PREFIX = 20  # the name of an iptables chain has at most 28 characters
# iptables refuses a chain with such a name, or uses it instead of the target.
_RESERVED = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "ACCEPT", "DROP", "RETURN", "QUEUE"}
_RESERVED |= {"MASQUERADE", "DNAT", "SNAT", "REDIRECT", "REJECT", "LOG", "MARK", "CT", "NOTRACK", "TRACE"}


class Docker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    enabled: bool = False  # whether gangway serves Docker's networks and published ports
    socket: str = "/var/run/docker.sock"  # the path of the engine's API socket

    def __post_init__(self) -> None:
        if not self.socket.startswith("/"):
            raise InvalidRequest(f"docker: socket must be an absolute path, not {self.socket!r}")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    firewall: str = "auto"  # `auto`, `nftables`, `iptables` or `none`
    ip_forward: bool = True  # whether the daemon may turn forwarding on
    obey_input: bool = False  # whether what the host's chain INPUT drops holds for published ports
    chain_prefix: str = PREFIX  # the name of iptables chains; DOCKER gives Docker's own layout
    state: str = ""  # the database's path; empty: it depends on the network namespace and the socket
    group: str = ""
    """The group that may use the API socket; empty: `gangway` if there is such a group, else root only."""
    exclude: tuple[str, ...] = ()
    """Addresses of the host, and interfaces, at whose addresses nothing is published."""
    relay: dict[str, Any] = {}  # the relay's settings: `gangway.relay.settings`
    docker: Docker = Docker()  # the container engine

    @property
    def relay_settings(self) -> Settings:
        """The relay's settings, checked."""
        return checked(self.relay, "relay")

    @property
    def group_id(self) -> int:
        """The number of the group that may use the API socket; 0 for root only."""
        try:
            return grp.getgrnam(self.group or GROUP).gr_gid
        except KeyError:
            if self.group:
                raise InvalidRequest(f"invalid group {self.group!r}: there is no such group") from None
            return 0

    def __post_init__(self) -> None:
        _ = self.group_id
        for text in self.exclude:
            parse_exclusion(text)
        log = self.relay_settings.log
        if reason := unusable(log):
            raise InvalidRequest(f"relay: log cannot be written to {log!r}: {reason}")
        if self.firewall not in FIREWALLS:
            raise InvalidRequest(f"unknown firewall {self.firewall!r}: {', '.join(FIREWALLS)}")
        prefix = self.chain_prefix
        if not (prefix.isascii() and prefix.isalnum() and len(prefix) <= _LONGEST_PREFIX) or prefix in _RESERVED:
            rule = f"use 1 to {_LONGEST_PREFIX} letters and digits, but no built-in chain or target"
            raise InvalidRequest(f"invalid chain-prefix {prefix!r}: {rule}")


def load(path: Path | None, options: dict[str, Any]) -> tuple[Config, list[str]]:
    """Return the settings in a TOML file, overridden by `options`, and warnings for the log.

    Without a path the file is `SETTINGS`, if that exists.  An option that is a table overrides the file's keys one by
    one.  InvalidRequest names the file, the key and the problem.
    """
    given = _read(path or SETTINGS, is_optional=path is None)
    _convert(given, str(path or SETTINGS))
    warnings = []
    old = _read(OLD_SETTINGS, is_optional=True)
    if old:
        checked(old, str(OLD_SETTINGS))
        given["relay"] = old | given.get("relay", {})
        warnings.append(f"{OLD_SETTINGS} is deprecated: move its keys to the table [relay] of {SETTINGS}")
    tables = {name: given.get(name, {}) | value for name, value in options.items() if isinstance(value, dict)}
    return _convert(given | options | tables, "options"), warnings


def _read(path: Path, is_optional: bool) -> dict[str, Any]:
    """Return what a file says; nothing if it is optional and missing."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        if is_optional and isinstance(error, FileNotFoundError):
            return {}
        raise InvalidRequest(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _convert(given: dict[str, Any], source: str) -> Config:
    try:
        return msgspec.convert(given, Config)
    except (msgspec.ValidationError, InvalidRequest) as error:
        raise InvalidRequest(f"{source}: {error}") from None
