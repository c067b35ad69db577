"""The daemon's settings: a TOML file, environment variables that override it, and options that override both.

A setting's name is its key, with that of its table: `ip-forward`, `relay.workers`.  Its variable is made of the name:
GANGWAY_IP_FORWARD, GANGWAY_RELAY_WORKERS.
"""

import grp
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from gangway.errors import InvalidRequest
from gangway.exclusions import parse_exclusion
from gangway.log import LEVELS
from gangway.log_targets import AUTO, FORMATS, unusable
from gangway.relay.settings import Settings, checked

SETTINGS = Path("/etc/gangway/gangway.toml")
"""Read if it exists and no other file is named."""
OLD_SETTINGS = Path("/etc/gangway/docker-proxy.toml")
"""Read if it exists, as the table `[relay]`; deprecated."""
GROUP = "gangway"
READ_GROUP = "gangway-ro"
"""The groups that may use the API socket and the socket for reading, if they exist and the settings name no others."""
FIREWALLS = ("auto", "nftables", "iptables", "none")
PREFIX = "GANGWAY"
DAEMON_STARTS, RELAY_STARTS = "from the daemon's next start", "from the relay's next start"
_VARIABLES = "GANGWAY_"  # how the name of each setting's variable begins
_OTHER_VARIABLES = ("GANGWAY_SOCKET",)  # the commands' own
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
    read_group: str = ""
    """The group that may use the socket for reading; empty: `gangway-ro` if there is such a group, else root only."""
    exclude: tuple[str, ...] = ()
    """Addresses of the host, and interfaces, at whose addresses nothing is published."""
    log: str = AUTO  # where the log goes: `gangway.log_targets`
    log_level: str = "info"  # the least important events in the log: `debug`, `info`, `warning` or `error`
    log_format: str = "text"  # `text` or `json`; the journal has fields in either case
    relay: dict[str, Any] = {}  # the relay's settings: `gangway.relay.settings`
    docker: Docker = Docker()  # the container engine

    @property
    def relay_settings(self) -> Settings:
        """The relay's settings, checked, and those of the log."""
        table = checked(self.relay, "relay")
        return table._replace(log=self.log, log_level=self.log_level, log_format=self.log_format)

    @property
    def group_ids(self) -> tuple[int, int]:
        """The numbers of the groups that may use the API socket, and the socket for reading; 0 for root only."""
        return _group_id("group", self.group, GROUP), _group_id("read-group", self.read_group, READ_GROUP)

    def __post_init__(self) -> None:
        _ = self.group_ids
        for text in self.exclude:
            parse_exclusion(text)
        _ = self.relay_settings
        if reason := unusable(self.log):
            raise InvalidRequest(f"log cannot be written to {self.log!r}: {reason}")
        _require_one_of(FIREWALLS, "firewall", self.firewall)
        _require_one_of(LEVELS, "log-level", self.log_level)
        _require_one_of(FORMATS, "log-format", self.log_format)
        prefix = self.chain_prefix
        if not (prefix.isascii() and prefix.isalnum() and len(prefix) <= _LONGEST_PREFIX) or prefix in _RESERVED:
            rule = f"use 1 to {_LONGEST_PREFIX} letters and digits, but no built-in chain or target"
            raise InvalidRequest(f"invalid chain-prefix {prefix!r}: {rule}")


def _group_id(key: str, name: str, default: str) -> int:
    try:
        return grp.getgrnam(name or default).gr_gid
    except KeyError:
        if name:
            raise InvalidRequest(f"invalid {key} {name!r}: there is no such group") from None
        return 0


def _require_one_of(known: Iterable[str], key: str, value: str) -> None:
    if value not in known:
        raise InvalidRequest(f"unknown {key} {value!r}: {', '.join(known)}")


class Loaded(NamedTuple):
    """Settings, warnings for the log, and where each setting comes from, by name; the others are defaults."""

    config: Config
    warnings: list[str]
    sources: dict[str, str]


def load(path: Path | None, options: dict[str, Any], environment: Mapping[str, str]) -> Loaded:
    """Return the settings in a TOML file, overridden by variables of the environment, and these by `options`.

    Without a path the file is `SETTINGS`, if that exists.  Tables are overridden key by key.  InvalidRequest names the
    file or variable, the key and the problem.
    """
    file, warnings = path or SETTINGS, list[str]()
    given, sources = _read(file, is_optional=path is None)
    if _move_log(given.get("relay"), given):
        sources.setdefault("log", sources.pop("relay.log"))
        warnings.append(f"{file}: log in the table [relay] is deprecated: move it before the first table")
    _convert(given, str(file))
    old, old_sources = _read(OLD_SETTINGS, is_optional=True)
    if old:
        if _move_log(old, given):
            sources.setdefault("log", old_sources.pop("log"))
        _convert(given, str(OLD_SETTINGS))
        checked(old, str(OLD_SETTINGS))
        given = _overridden({"relay": old}, given)
        sources = {f"relay.{name}": source for name, source in old_sources.items()} | sources
        warnings.append(f"{OLD_SETTINGS} is deprecated: move its keys to the table [relay] of {SETTINGS}")
    settings = {variable(name): (name, default) for name, default in by_name(Config()).items()}
    for name, text in variables(environment).items():
        if name not in settings:
            warnings.append(f"{name} in the environment names no setting: gangway config show lists them")
            continue
        setting, default = settings[name]
        value = _nested(setting, _parsed(name, text, default))
        _convert(value, name)
        given, sources = _overridden(given, value), sources | {setting: f"environment {name}"}
    sources |= dict.fromkeys(_names(options), "option")
    return Loaded(_convert(_overridden(given, options), "options"), warnings, sources)


def by_name(config: Config) -> dict[str, Any]:
    """Return the value of every setting, by name."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        if field.name == "relay":
            found |= {f"relay.{name}": one for name, one in config.relay_settings.table().items()}
        elif isinstance(value, Docker):
            found |= {f"docker.{name}": one for name, one in msgspec.structs.asdict(value).items()}
        else:
            found[field.encode_name] = value
    return found


def variable(name: str) -> str:
    """Return the name of the environment variable of a setting."""
    return _VARIABLES + re.sub("[.-]", "_", name).upper()


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an environment that are, or should be, settings; an empty one is none."""
    return {
        name: text
        for name, text in environment.items()
        if text and name.startswith(_VARIABLES) and name not in _OTHER_VARIABLES
    }


def later(former: Config, now: Config) -> dict[str, str]:
    """Return the settings whose change takes effect later, by name: each with when."""
    before, after = by_name(former), by_name(now)
    is_docker_served = former.docker.enabled or now.docker.enabled
    found = {}
    for name in (name for name, value in after.items() if value != before[name]):
        is_none = name == "firewall" and "none" in (before[name], after[name])
        if (
            name in ("chain-prefix", "state", "log", "log-format")
            or is_none
            or (name.startswith("docker.") and is_docker_served)
        ):
            found[name] = DAEMON_STARTS
        elif name.startswith("relay."):
            found[name] = RELAY_STARTS
    return found


def _move_log(table: Any, settings: dict[str, Any]) -> bool:
    """Move the key `log` from a table to the settings, unless they have one; False if it is not there."""
    if not isinstance(table, dict) or "log" not in table:
        return False
    settings.setdefault("log", table.pop("log"))
    return True


def _parsed(name: str, text: str, default: Any) -> Any:
    """Return the value of a variable: of the type that the setting's default has.  InvalidRequest: it is no such."""
    if isinstance(default, tuple):
        return [part.strip() for part in text.split(",") if part.strip()]
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise InvalidRequest(f"{name} must be true or false, not {text!r}")
        return text == "true"
    try:
        return type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise InvalidRequest(f"{name} must be {kind}, not {text!r}") from None


def _nested(name: str, value: Any) -> dict[str, Any]:
    """Return a setting as a settings file has it."""
    table, _, key = name.rpartition(".")
    return {table: {key: value}} if table else {key: value}


def _overridden(given: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that are overridden by others, tables key by key."""
    tables = {name: given.get(name, {}) | value for name, value in by.items() if isinstance(value, dict)}
    return {**given, **by, **tables}


def _names(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the settings in a file's tables."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from (f"{name}.{key}" for key in value)
        else:
            yield name


def _read(path: Path, is_optional: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a file says, and where in it each setting is; nothing if it is optional and missing."""
    try:
        text = path.read_text()
        given = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        if is_optional and isinstance(error, FileNotFoundError):
            return {}, {}
        raise InvalidRequest(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    lines = _lines(text)
    return given, {name: f"{path}:{lines[name]}" if name in lines else str(path) for name in _names(given)}


def _lines(text: str) -> dict[str, int]:
    """Return the line of each setting that has one of its own, below the head of its table."""
    table = ""
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if head := re.match(r"\s*\[+\s*([\w.-]+)\s*\]", line):
            table = f"{head[1]}."
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            found.setdefault(table + key[1], number)
    return found


def _convert(given: dict[str, Any], source: str) -> Config:
    try:
        return msgspec.convert(given, Config)
    except (msgspec.ValidationError, InvalidRequest) as error:
        raise InvalidRequest(f"{source}: {error}") from None
