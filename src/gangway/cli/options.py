"""The options and arguments of commands, as argparse's `add_argument` takes them: names, and settings."""

from __future__ import annotations

import argparse
import os

from gangway.cli import views

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from gangway.cli.listing import Filter, Listing

    Option = tuple[list[str], dict[str, Any]]


def _option(names: str, text: str, metavar: str | None = None, **settings: Any) -> Option:
    """Return an option, or an argument, as argparse's `add_argument` takes it."""
    return names.split(), {"help": text, "metavar": metavar, **settings}


def _list(names: str, text: str, metavar: str, dest: str, **settings: Any) -> Option:
    """Return an option that may be given more than once."""
    return _option(names, text, metavar, dest=dest, action="append", default=[], **settings)


def _flag(names: str, text: str, dest: str, value: Any = True) -> Option:
    """Return an option that sets `dest` to `value`."""
    return names.split(), {"help": text, "dest": dest, "action": "store_const", "const": value}


def _container(name: str) -> str:
    """A path is made absolute: the daemon has another working directory."""
    return os.path.abspath(name) if "/" in name else _not_empty(name)


def _path(text: str) -> str:
    return os.path.abspath(_not_empty(text))


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("cannot be empty")
    return text


def _mappings() -> Listing:
    from gangway.cli.listing import MAPPINGS

    return MAPPINGS


def _networks() -> Listing:
    from gangway.cli.listing import NETWORKS

    return NETWORKS


def _listed(listing: Callable[[], Listing], quiet: str, text: str) -> tuple[Option, ...]:
    """Return the options of a command that prints a listing; `quiet` is the format that -q stands for."""

    def checked_format(text: str) -> str:
        from gangway.cli.listing import parse_format

        return parse_format(text, listing())

    def checked_filter(text: str) -> Filter:
        from gangway.cli.listing import parse_filter

        return parse_filter(text, listing())

    return (
        _list("--filter", "Only those with this value; see KEY below.", "KEY=VALUE", "filters", type=checked_filter),
        _flag("-q --quiet", text, "template", quiet),
        _option("--format", "Print this for each; see FIELD below.", "FORMAT", dest="template", type=checked_format),
        _flag("--wide", "Print all columns.", "wide"),
        JSON,
        SOCKET,
    )


_ADMITTED_HELP = "Who may connect, besides this host: clients of this subnet."
ADMITTED, ADMITTED_BY_RUN = (_list("--from", _ADMITTED_HELP, "SUBNET", name) for name in ("from", "admitted"))
ALL = _flag("--all", "Of all containers, but for what files declare.", "all")
AT = _option("at", "The address that a client connects to.", "HOST-IP:PORT[/PROTO]", type=_not_empty)
BRIDGE = _option("--bridge", "The bridge's name; gw-NAME if left out.", "IF", type=_not_empty)
CHAINS = _option("--chain-prefix", "The name of iptables chains; DOCKER for Docker's own layout.", "NAME")
COMMAND = _option("command", "The command and its arguments.", "COMMAND", nargs=argparse.PARSER)
CONFIG = _option("--config", "The settings, instead of /etc/gangway/gangway.toml.", "FILE", type=_not_empty)
CONFIG_FILE = _option("--config-file", "dockerd's settings, if not the usual ones.", "FILE", type=_path)
CONTAINER = _option("container", "A name of ip-netns, a path, or pid:PID.", "CONTAINER", type=_container)
DOCKER = _flag("--docker", "Serve Docker's networks and published ports.", "docker", {"enabled": True})
EXCLUDE = _option(
    "--exclude", "Publish nothing at this address, or at those of this interface.", "ADDRESS|IFACE", action="append"
)
FILE = _option("file", "/etc/gangway/gangway.toml if left out.", "FILE", nargs="?", type=_not_empty)
FIREWALL = _option("--firewall", "What the rules are written with (auto).", "auto|nftables|iptables|none")
FORWARD_ACCEPT = _flag("--forward-accept", "Set the policy of FORWARD to ACCEPT, if dockerd set it.", "forward_accept")
FROM = _option("--from", "Only clients from there.", choices=views.ORIGINS)
GATEWAYS = _list("--gateway", "The host's address in a subnet.", "ADDRESS", "gateways")
IF_EXISTS = _flag("--if-exists", "It is no error if there is none.", "if_exists")
IF_NOT_EXISTS = _flag("--if-not-exists", "It is no error if it is there, as requested.", "if_not_exists")
INTERNAL = _flag("--internal", "Containers reach the host only, and only the host reaches them.", "internal")
IPS = _list("--ip", "Its address; a free one if left out.", "ADDRESS", "addresses")
JSON = _flag("--json", "Print a JSON array.", "as_json")
JSON_LINES = _flag("--json", "Print a JSON object for each event.", "as_json")
LEFT_NETWORK = _option("--network", "From this network only; from all if left out.", "NETWORK", type=_not_empty)
LOG_FORMAT = _option("--log-format", "How the log is written (text).", "text|json")
LOG_LEVEL = _option("--log-level", "The least important events in the log (info).", "debug|info|warning|error")
MTU = _option("--mtu", "In bytes; that of the default route's interface if left out.", type=int)
NAME = _option("name", "The network's name.", "NAME", type=_not_empty)
NETWORK_NAMES = _option("names", "The networks' names.", "NETWORK", type=_not_empty, nargs="+")
NETWORK = _option(
    "--network", "The network; gangway0, which is created on demand, if left out.", "NETWORK", type=_not_empty
)
NETWORK_NAME = _option("name", "The network's name.", "NETWORK", type=_not_empty)
NO_FORWARD = _flag("--no-ip-forward", "Do not enable forwarding; relay instead.", "ip_forward", False)
NO_ICC = _flag("--no-icc", "Containers reach each other by published ports only.", "icc", False)
NO_MASQUERADE = _flag("--no-masquerade", "Other hosts see the containers' own addresses.", "masquerade", False)
OPTIONAL_CONTAINER = CONTAINER[0], {**CONTAINER[1], "nargs": "?"}
DECLARATION = _option("file", "Tables [[network]] and [[publish]], in TOML.", "FILE", type=_not_empty)
DRY_RUN = _flag("--dry-run", "Only print what would be done.", "dry_run")
KEEP = _flag("--keep", "Also after a reboot; unpublish ends it.", "keep")
_PORTS_HELP = "[HOST-IP:]HOST-PORT[-END]:PORT[-END][/PROTO]"
PORTS, ANY_PORTS = (
    _list("-p --publish", _PORTS_HELP, "PORTS", "ports", required=required) for required in (True, False)
)
RUN_NAME = _option("--name", "The container's name; run-PID if left out.", "NAME", type=_not_empty)
SOCKET = _option("--socket", "The daemon's socket, if not the usual one.", "PATH", dest="path", type=_not_empty)
STATE = _option("--state", "The database.", "PATH", type=_not_empty)
SUBNETS = _list("--subnet", "One of IPv4, one of IPv6, or both; free ones if left out.", "SUBNET", "subnets")
LISTED_PORTS = _listed(_mappings, "{ports}", "Print only the mappings, as they are written after -p.")
LISTED_NETWORKS = _listed(_networks, "{name}", "Print only the names.")
YES = _flag("--yes", "Do not ask.", "yes")
