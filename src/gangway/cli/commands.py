"""The command line of `gangway`: the words and options of each command, and the request that it becomes.

Most of a command's time is spent on imports, and `gangway publish` runs a hundred times when a host is set up.  So
argparse gets the options of one command only, and what only some commands need is imported by them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from gangway import __version__
from gangway.cli import views
from gangway.cli.client import NoDaemon, Refused, ask, ask_running, daemon_command, socket_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    Option = tuple[list[str], dict[str, Any]]
    Function = Callable[..., None]
    Command = tuple[Function, tuple[Option, ...]]

GROUPS = {
    "config": "Check the settings file.",
    "daemon": "Manage the networks and published ports of this network namespace.",
    "docker": "Hand Docker's ports over to gangway, and back.",
    "network": "Create, list and remove networks.",
}
"""The first word of commands that have two, and its help; `daemon` is a command by itself, too."""
_INVALID, _FAILED = 2, 1


class _Parser(argparse.ArgumentParser):
    """A parser whose every error is one line."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(
            f"gangway {name}".strip(),
            description=description,
            allow_abbrev=False,
            add_help=False,
            # The default is the terminal's width, by shutil, which is slow to import.
            formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80),
        )
        self.add_argument("-h", "--help", action="help", help="Show this help.")

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (see {self.prog} --help)", _INVALID))


def main() -> NoReturn:
    """Carry out the command that was typed, and exit: with 0, 1 if it failed, or 2 if it is invalid."""
    try:
        function, given = parse(sys.argv[1:])
        function(**given)
        if sys.stdout is not None:  # it is None if the command was started with it closed
            sys.stdout.flush()
        os._exit(0)  # Python would free each object first, which takes as long as the daemon's answer
    except Refused as error:
        sys.exit(_fail(str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", _FAILED))
    except OSError as error:  # of our own output: other errors are turned into Refused where they arise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to write again at its end
        if not isinstance(error, BrokenPipeError):  # else its reader has exited, and wants no more
            _fail(f"cannot write the output: {error.strerror}", _FAILED)
        sys.exit(_FAILED)


def parse(words: Sequence[str]) -> tuple[Function, dict[str, Any]]:
    """Return the function of the command in `words`, and its arguments.

    SystemExit: the words are invalid, and that was reported; or they ask for help, and that was printed.
    """
    is_group = words and words[0] in GROUPS and (words[0] not in COMMANDS or " ".join(words[:2]) in COMMANDS)
    count = 2 if is_group else 1
    name = " ".join(words[:count])
    if name not in COMMANDS:
        _overview(words[0] if count == 2 else "", words[count - 1 :])
    function, options = COMMANDS[name]
    parser = _Parser(name, function.__doc__ or "")
    for names, settings in options:
        parser.add_argument(*names, **settings)
    given = vars(parser.parse_args(words[count:]))
    if "path" in given:
        given["path"] = given["path"] or socket_path()
    return function, given


def _overview(group: str, words: Sequence[str]) -> NoReturn:
    """Print help, the version, or an error for words that name no command."""
    parser = _Parser(group, GROUPS.get(group, "Publish the ports of containers."))
    if not group:
        parser.add_argument("--version", action="version", version=f"gangway {__version__}", help="Show it.")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=argparse.ArgumentParser)
    texts = {name: function.__doc__ or "" for name, (function, _) in COMMANDS.items()} | GROUPS
    for name in sorted(texts):
        if name.rpartition(" ")[0] == group and name != group:
            commands.add_parser(name.rpartition(" ")[2], help=texts[name].partition("\n")[0], add_help=False)
    if words:
        parser.parse_args(words)
    parser.print_help(sys.stderr)
    sys.exit(_INVALID)


def _fail(text: str, code: int) -> int:
    _say(" ".join(text.split("\n")))
    return code


def _say(text: str) -> None:
    print("gangway:", text, file=sys.stderr)


def run(name: str | None, command: list[str], **given: Any) -> None:
    """Run a command in a network namespace of its own, attached and published while it runs."""
    from gangway.cli.run import run as run_command

    words = command[1:] if command[0] == "--" else command
    if not words[0]:
        raise Refused("InvalidRequest", "the command to run cannot be empty")
    sys.exit(run_command(words, container=name or f"run-{os.getpid()}", **given))


def daemon(path: str, config: str | None, **options: Any) -> None:
    """Manage the networks and published ports of this network namespace.

    Other commands start a daemon if there is none.  Options override the settings file.  A running daemon is managed by
    gangway daemon status, reload, restart and stop.
    """
    given = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    words = daemon_command(path, given, config)
    os.execv(words[0], words)


def show_version(path: str) -> None:
    """Show the versions of this program, of the running daemon, and of its relay."""
    from gangway.cli.lifecycle import mismatches, status, versions

    found = status(path)
    print(*versions(found), sep="\n")
    for text in mismatches(found):
        _say(text)


def show_status(path: str) -> None:
    """Show the running daemon and its relay, and how much they manage."""
    import time

    from gangway.cli.lifecycle import described, status

    found = status(path)
    if found is None:
        raise Refused("Conflict", f"no daemon runs at {path}")
    print(*described(found, time.time()), sep="\n")


def stop(path: str) -> None:
    """End the daemon.  Ports stay published, and the next command starts a daemon again."""
    from gangway.cli.lifecycle import status, stop_daemon

    found = status(path)
    if found is None:
        return _say(f"no daemon runs at {path}")
    stop_daemon(path, found)
    if found["leases"]:
        _say(f"{found['leases']} docker-proxy launchers start a daemon again, which serves their ports")


def restart(path: str) -> None:
    """End the daemon, and start it again with the same options.  Ports stay published meanwhile."""
    from gangway.cli.lifecycle import restart_daemon

    restart_daemon(path)


def reload(path: str) -> None:
    """Have the daemon read its settings again, and open its log files again."""
    try:
        for warning in ask_running(path, "POST", "/reload"):
            _say(warning)
    except NoDaemon:
        raise Refused("Conflict", f"no daemon runs at {path}; the next one reads the settings when it starts") from None


def check_config(file: str | None) -> None:
    """Check the settings, without a daemon."""
    from pathlib import Path

    from gangway.daemon.config import load
    from gangway.errors import InvalidRequest

    try:
        _, warnings = load(None if file is None else Path(file), {})
    except InvalidRequest as error:
        raise Refused("InvalidRequest", str(error)) from None
    for warning in warnings:
        _say(warning)
    print("OK")


def _request(
    request: str,
    options: tuple[Option, ...],
    text: str,
    show: Callable[[Any], object] | None = None,
    succeeded: Callable[[Any], bool] = lambda _: True,
) -> Command:
    """Return a command that is a request of the API; its answer is printed by `show`, or as JSON.

    The exit code is 1 if the answer says that the command has not `succeeded`.

    The values that are given are the body of a POST; of other methods they go into the path, or else into the query.
    """
    method, target = request.split()

    def send(path: str, as_json: bool | None = None, **values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None}
        answer = ask(path, method, target, given) if method == "POST" else ask(path, method, _filled(target, given))
        if as_json:
            print(json.dumps(answer if isinstance(answer, list) else [answer], indent=2))
        elif show is not None:
            show(answer)
        if not succeeded(answer):
            if sys.stdout is not None:
                sys.stdout.flush()
            sys.exit(_FAILED)

    send.__doc__ = text
    return send, (*options, _JSON, _SOCKET) if method == "GET" else (*options, _SOCKET)


def _filled(target: str, given: dict[str, str]) -> str:
    """Return a path with these values, and those that it has no place for as its query."""
    from urllib.parse import quote

    quoted = {name: quote(value, safe="") for name, value in given.items()}
    query = "&".join(f"{name}={value}" for name, value in quoted.items() if f"{{{name}}}" not in target)
    return target.format(**quoted) + (f"?{query}" if query else "")


def _option(names: str, text: str, metavar: str | None = None, **settings: Any) -> Option:
    """Return an option, or an argument, as argparse's `add_argument` takes it."""
    return names.split(), {"help": text, "metavar": metavar, **settings}


def _list(names: str, text: str, metavar: str, dest: str, required: bool = False) -> Option:
    """Return an option that may be given more than once."""
    return _option(names, text, metavar, dest=dest, action="append", default=[], required=required)


def _flag(name: str, text: str, dest: str, value: Any = True) -> Option:
    """Return an option that sets `dest` to `value`."""
    return [name], {"help": text, "dest": dest, "action": "store_const", "const": value}


def _container(name: str) -> str:
    """A path is made absolute: the daemon has another working directory."""
    return os.path.abspath(name) if "/" in name else _not_empty(name)


def _path(text: str) -> str:
    return os.path.abspath(_not_empty(text))


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("cannot be empty")
    return text


_ADMITTED_HELP = "Who may connect, besides this host: clients of this subnet."
_ADMITTED, _ADMITTED_BY_RUN = (_list("--from", _ADMITTED_HELP, "SUBNET", name) for name in ("from", "admitted"))
_AT = _option("at", "The address that a client connects to.", "HOST-IP:PORT[/PROTO]", type=_not_empty)
_BRIDGE = _option("--bridge", "The bridge's name; gw-NAME if left out.", "IF", type=_not_empty)
_CHAINS = _option("--chain-prefix", "The name of iptables chains; DOCKER for Docker's own layout.", "NAME")
_COMMAND = _option("command", "The command and its arguments.", "COMMAND", nargs=argparse.PARSER)
_CONFIG = _option("--config", "The settings, instead of /etc/gangway/gangway.toml.", "FILE", type=_not_empty)
_CONFIG_FILE = _option("--config-file", "dockerd's settings, if not the usual ones.", "FILE", type=_path)
_CONTAINER = _option("container", "A name of ip-netns, a path, or pid:PID.", "CONTAINER", type=_container)
_DOCKER = _flag("--docker", "Serve Docker's networks and published ports.", "docker", {"enabled": True})
_EXCLUDE = _option(
    "--exclude", "Publish nothing at this address, or at those of this interface.", "ADDRESS|IFACE", action="append"
)
_FILE = _option("file", "/etc/gangway/gangway.toml if left out.", "FILE", nargs="?", type=_not_empty)
_FIREWALL = _option("--firewall", "What the rules are written with (auto).", "auto|nftables|iptables|none")
_FORWARD_ACCEPT = _flag("--forward-accept", "Set the policy of FORWARD to ACCEPT, if dockerd set it.", "forward_accept")
_FROM = _option("--from", "Only clients from there.", choices=views.ORIGINS)
_GATEWAYS = _list("--gateway", "The host's address in a subnet.", "ADDRESS", "gateways")
_INTERNAL = _flag("--internal", "Containers reach the host only, and only the host reaches them.", "internal")
_IPS = _list("--ip", "Its address; a free one if left out.", "ADDRESS", "addresses")
_JSON = _flag("--json", "Print a JSON array.", "as_json")
_MTU = _option("--mtu", "In bytes; that of the default route's interface if left out.", type=int)
_NAME = _option("name", "The network's name.", "NAME", type=_not_empty)
_NETWORK = _option(
    "--network", "The network; gangway0, which is created on demand, if left out.", "NAME", type=_not_empty
)
_NO_FORWARD = _flag("--no-ip-forward", "Do not enable forwarding; relay instead.", "ip_forward", False)
_NO_ICC = _flag("--no-icc", "Containers reach each other by published ports only.", "icc", False)
_NO_MASQUERADE = _flag("--no-masquerade", "Other hosts see the containers' own addresses.", "masquerade", False)
_OPTIONAL_CONTAINER = _CONTAINER[0], {**_CONTAINER[1], "nargs": "?"}
_PORTS_HELP = "[HOST-IP:]HOST-PORT[-END]:PORT[-END][/PROTO]"
_PORTS, _ANY_PORTS = (_list("-p --publish", _PORTS_HELP, "PORTS", "ports", required) for required in (True, False))
_RUN_NAME = _option("--name", "The container's name; run-PID if left out.", "NAME", type=_not_empty)
_SOCKET = _option("--socket", "The daemon's socket, if not the usual one.", "PATH", dest="path", type=_not_empty)
_STATE = _option("--state", "The database.", "PATH", type=_not_empty)
_SUBNETS = _list("--subnet", "One of IPv4, one of IPv6, or both.", "SUBNET", "subnets", required=True)

COMMANDS: dict[str, Command] = {
    "network create": _request(
        "POST /networks",
        (_NAME, _SUBNETS, _GATEWAYS, _BRIDGE, _NO_MASQUERADE, _NO_ICC, _INTERNAL, _MTU),
        "Create a network: a bridge, its subnets, and a policy.",
        lambda network: print(network["name"]),
    ),
    "network ls": _request("GET /networks", (), "List networks.", views.print_networks),
    "network inspect": _request("GET /networks/{name}", (_NAME,), "Show a network's details.", views.print_network),
    "network rm": _request("DELETE /networks/{name}", (_NAME,), "Remove a network that has no containers."),
    "attach": _request(
        "POST /endpoints",
        (_CONTAINER, _NETWORK, _IPS),
        "Attach a container to a network.",
        views.print_attached,
    ),
    "detach": _request("DELETE /endpoints/{container}", (_CONTAINER,), "Detach a container, and unpublish its ports."),
    "publish": _request(
        "POST /mappings", (_CONTAINER, _PORTS, _ADMITTED), "Publish ports of a container.", views.print_lines
    ),
    "unpublish": _request(
        "POST /mappings/withdraw",
        (_CONTAINER, _ANY_PORTS),
        "Unpublish ports of a container: those given by -p, or all.",
    ),
    "ls": _request(
        "GET /mappings",
        (_OPTIONAL_CONTAINER,),
        "List published ports, and the road that each kind of client takes.",
        views.print_mappings,
    ),
    "explain": _request(
        "GET /explain",
        (_AT, _FROM),
        "Explain which road a client takes to a published port, and why.",
        lambda answer: print(*views.explanation(answer), sep="\n"),
    ),
    "cleanup": _request(
        "POST /cleanup",
        (),
        "Delete links, rules and ports of a daemon whose database is lost.",
        lambda names: print(*(f"deleted {name}" for name in names), sep="\n", end="\n" * bool(names)),
    ),
    "doctor": _request("GET /doctor", (), "Show what this host supports, and what it does not.", views.print_checks),
    "docker check": _request(
        "GET /docker",
        (_CONFIG_FILE,),
        "Check whether Docker's ports are gangway's, and print what to change.",
        views.print_docker,
        lambda report: all(check["holds"] for check in report["checks"]),
    ),
    "docker enable": _request(
        "POST /docker/enable",
        (_CONFIG_FILE,),
        "Switch dockerd's rules and proxy off in its settings, and print what has to follow.",
        views.print_change,
    ),
    "docker disable": _request(
        "POST /docker/disable", (_CONFIG_FILE,), "Restore dockerd's settings.", views.print_change
    ),
    "docker cleanup": _request(
        "POST /docker/cleanup", (_FORWARD_ACCEPT,), "Remove the rules that dockerd has left.", views.print_change
    ),
    "run": (run, (_RUN_NAME, _NETWORK, _ANY_PORTS, _ADMITTED_BY_RUN, _SOCKET, _COMMAND)),
    "daemon reload": (reload, (_SOCKET,)),
    "daemon restart": (restart, (_SOCKET,)),
    "daemon status": (show_status, (_SOCKET,)),
    "daemon stop": (stop, (_SOCKET,)),
    "version": (show_version, (_SOCKET,)),
    "daemon": (daemon, (_FIREWALL, _NO_FORWARD, _EXCLUDE, _DOCKER, _CHAINS, _STATE, _CONFIG, _SOCKET)),
    "config check": (check_config, (_FILE,)),
}
"""Each command's function, which is called with the values of its options, and those options.  The function's docstring
is the command's help."""
