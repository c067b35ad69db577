"""The command line of `gangway`: the words and options of each command, and the request that it becomes.

Most of a command's time is spent on imports, and `gangway publish` runs a hundred times when a host is set up.  So
argparse gets the options of one command only, and what only some commands need is imported by them.
"""

from __future__ import annotations

import argparse
import os
import sys

from gangway.cli.client import Refused, ask, socket_path
from gangway.cli.lines import mapping_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    Option = tuple[tuple[str, ...], dict[str, Any]]
    Function = Callable[..., None]

COMMANDS: dict[str, tuple[Function, tuple[Option, ...]]] = {}
"""Each command's function, which is called with the values of its options, and those options."""
GROUPS = {"config": "Check the settings file.", "network": "Create, list and remove networks."}
"""The first word of commands that have two, and its help."""
_INVALID, _FAILED = 2, 1


class _Parser(argparse.ArgumentParser):
    """A parser whose every error is one line."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(
            f"gangway {name}".strip(),
            description=description,
            allow_abbrev=False,
            add_help=False,
            # Its default is the terminal's width, which shutil tells, and that imports a lot.
            formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80),
        )
        self.add_argument("-h", "--help", action="help", help="Show this help.")

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (see {self.prog} --help)", _INVALID))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"gangway {version('gangway')}")
        parser.exit()


def main() -> NoReturn:
    """Carry out the command that was typed, and exit: with 0, 1 if it failed, or 2 if it is invalid."""
    try:
        function, given = parse(sys.argv[1:])
        function(**given)
        sys.stdout.flush()
        os._exit(0)  # Python would free each object first, which takes as long as the daemon's answer
    except Refused as error:
        sys.exit(_fail(str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", _FAILED))
    except BrokenPipeError:  # the reader of our output has left; without this Python would try to write again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_FAILED)


def parse(words: Sequence[str]) -> tuple[Function, dict[str, Any]]:
    """Return the function of the command in `words`, and its arguments.

    SystemExit: they are no command, but a mistake, which is reported, or a question for help, which is answered.
    """
    count = 2 if words and words[0] in GROUPS else 1
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
    """Answer words that name no command: by help, the version, or an error."""
    parser = _Parser(group, GROUPS.get(group, "Publish the ports of containers."))
    if not group:
        parser.add_argument("--version", action=_Version, nargs=0, help="Show the version.")
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
    print("gangway:", " ".join(text.split("\n")), file=sys.stderr)
    return code


def _option(*names: str, **settings: Any) -> Option:
    """Return an option, or an argument, as argparse's `add_argument` takes it."""
    return names, settings


def _flag(name: str, text: str) -> Option:
    return _option(name, action="store_true", help=text)


def _command(name: str, *options: Option) -> Callable[[Function], Function]:
    """Add a command whose help is its function's docstring."""

    def add(function: Function) -> Function:
        COMMANDS[name] = function, options
        return function

    return add


def _container(name: str) -> str:
    """Return a container's name; a path becomes absolute, as the daemon has another working directory."""
    if not name:
        raise argparse.ArgumentTypeError("a container's name cannot be empty")
    return os.path.abspath(name) if "/" in name else name


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a path cannot be empty")
    return text


_CONTAINER = _option("container", metavar="CONTAINER", type=_container, help="A name of ip-netns, a path, or pid:PID.")
_NAME = _option("name", metavar="NAME", help="The network's name.")
_NETWORK = _option(
    "--network", metavar="NAME", default="", help="The network; gangway0, which is created on demand, if left out."
)
_PORTS_HELP = "[HOST-IP:]HOST-PORT[-END]:PORT[-END][/PROTO]"
_PORTS = _option("-p", "--publish", dest="ports", metavar="PORTS", action="append", default=[], help=_PORTS_HELP)
_SOCKET = _option(
    "--socket", dest="path", metavar="PATH", type=_path, help="The daemon's socket, if it is not the usual one."
)
_JSON = _option("--json", dest="as_json", action="store_true", help="Print a JSON array.")


@_command(
    "network create",
    _NAME,
    _option(
        "--subnet",
        dest="subnets",
        metavar="SUBNET",
        action="append",
        required=True,
        help="One of IPv4, one of IPv6, or both.",
    ),
    _option(
        "--gateway",
        dest="gateways",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="The host's address in a subnet.",
    ),
    _option("--bridge", metavar="IF", default="", help="The bridge's name; gw-NAME if left out."),
    _flag("--no-masquerade", "Containers reach other hosts under their own addresses."),
    _flag("--no-icc", "Containers reach each other by published ports only."),
    _flag("--internal", "Containers reach the host only, and only the host reaches them."),
    _option("--mtu", type=int, default=1500, help="In bytes; 1500 if left out."),
    _SOCKET,
)
def create_network(path: str, no_masquerade: bool, no_icc: bool, **given: Any) -> None:
    """Create a network: a bridge, its subnets, and a policy."""
    body = {**given, "masquerade": not no_masquerade, "icc": not no_icc}
    print(ask(path, "POST", "/networks", body)["name"])


@_command("network ls", _JSON, _SOCKET)
def list_networks(path: str, as_json: bool) -> None:
    """List networks."""
    found = ask(path, "GET", "/networks")
    _show(found, as_json, lambda: _tables().print_networks(found))


@_command("network inspect", _NAME, _JSON, _SOCKET)
def inspect_network(path: str, name: str, as_json: bool) -> None:
    """Show a network and its containers."""
    found = ask(path, "GET", f"/networks/{_quoted(name)}")
    _show([found], as_json, lambda: _tables().print_network(found))


@_command("network rm", _NAME, _SOCKET)
def remove_network(path: str, name: str) -> None:
    """Remove a network that has no containers."""
    ask(path, "DELETE", f"/networks/{_quoted(name)}")


@_command(
    "attach",
    _CONTAINER,
    _NETWORK,
    _option(
        "--ip",
        dest="addresses",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="Its address; a free one if left out.",
    ),
    _SOCKET,
)
def attach(path: str, **given: Any) -> None:
    """Attach a container to a network."""
    print(*ask(path, "POST", "/endpoints", given)["addresses"], sep="\n")


@_command("detach", _CONTAINER, _SOCKET)
def detach(path: str, container: str) -> None:
    """Detach a container from its network, and unpublish its ports."""
    ask(path, "DELETE", f"/endpoints/{_quoted(container)}")


@_command("publish", _CONTAINER, (_PORTS[0], {**_PORTS[1], "required": True}), _SOCKET)
def publish(path: str, container: str, ports: list[str]) -> None:
    """Publish ports of a container."""
    for mapping in ask(path, "POST", "/mappings", {"container": container, "ports": ports}):
        print(mapping_line(mapping))


@_command("unpublish", _CONTAINER, _PORTS, _SOCKET)
def unpublish(path: str, container: str, ports: list[str]) -> None:
    """Unpublish ports of a container: those given by -p, or all."""
    ask(path, "POST", "/mappings/withdraw", {"container": container, "ports": ports})


@_command("ls", _option("container", metavar="CONTAINER", nargs="?", type=_container), _JSON, _SOCKET)
def list_mappings(path: str, container: str | None, as_json: bool) -> None:
    """List published ports, and the road that each kind of client takes."""
    query = f"?container={_quoted(container)}" if container else ""
    found = ask(path, "GET", f"/mappings{query}")
    _show(found, as_json, lambda: _tables().print_mappings(found))


@_command(
    "explain",
    _option("at", metavar="HOST-IP:PORT[/PROTO]", help="The address that a client connects to."),
    _option("--from", dest="origin", choices=["loopback", "host", "remote", "container"], help="Only such clients."),
    _JSON,
    _SOCKET,
)
def explain(path: str, at: str, origin: str | None, as_json: bool) -> None:
    """Explain which road a client takes to a published port, and why."""
    query = f"at={_quoted(at)}" + (f"&from={origin}" if origin else "")
    found = ask(path, "GET", f"/explain?{query}")
    _show([found], as_json, lambda: _print_explanation(found))


@_command("doctor", _JSON, _SOCKET)
def doctor(path: str, as_json: bool) -> None:
    """Show what this host supports, and the consequences of what it does not."""
    found = ask(path, "GET", "/doctor")
    _show(found, as_json, lambda: _tables().print_checks(found))


@_command(
    "run",
    _option("--name", help="The container's name; run-PID if left out."),
    _NETWORK,
    _PORTS,
    _SOCKET,
    _option("command", metavar="COMMAND", nargs=argparse.PARSER, help="The command and its arguments."),
)
def run(path: str, name: str | None, network: str, ports: list[str], command: list[str]) -> None:
    """Run a command in a network namespace of its own, attached and published while it runs."""
    from gangway.cli.run import run as run_command

    words = command[1:] if command[0] == "--" else command
    container = name or f"run-{os.getpid()}"
    attached = False

    def begin(pid: int) -> None:
        nonlocal attached
        body = {"container": container, "network": network, "namespace": f"/proc/{pid}/ns/net"}
        ask(path, "POST", "/endpoints", body)
        attached = True
        if ports:
            for mapping in ask(path, "POST", "/mappings", {"container": container, "ports": ports}):
                print(f"gangway: {mapping_line(mapping)}", file=sys.stderr)

    try:
        code = run_command(words, begin)
    finally:
        if attached:
            _detach_if_attached(path, container)
    sys.exit(code)


@_command(
    "daemon",
    _option("--firewall", metavar="auto|nftables|iptables|none", help="What the rules are written with (auto)."),
    _flag("--no-ip-forward", "Leave forwarding as it is: traffic that needs it is relayed."),
    _option("--chain-prefix", metavar="NAME", help="The name of iptables chains; DOCKER for Docker's own layout."),
    _option("--state", metavar="PATH", type=_path, help="The database."),
    _option("--config", metavar="FILE", type=_path, help="The settings, instead of /etc/gangway/gangway.toml."),
    _SOCKET,
)
def daemon(path: str, config: str | None, no_ip_forward: bool, **options: Any) -> None:
    """Manage the networks and published ports of this network namespace.

    Other commands start a daemon if there is none.  Options override the settings file.
    """
    from gangway.cli.start import daemon_command

    given = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    if no_ip_forward:
        given["ip-forward"] = False
    words = daemon_command(path, given, config)
    os.execv(words[0], words)


@_command("config check", _option("file", metavar="FILE", nargs="?", help="/etc/gangway/gangway.toml if left out."))
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
        print(f"gangway: {warning}", file=sys.stderr)
    print("OK")


def _detach_if_attached(path: str, container: str) -> None:
    """Detach a container whose command has ended, unless the daemon has noticed that already.

    An error is reported, but the exit code is the command's.
    """
    try:
        ask(path, "DELETE", f"/endpoints/{_quoted(container)}")
    except Refused as error:
        if error.kind != "Conflict":
            _fail(str(error), error.exit_code)


def _show(found: list[Any], as_json: bool, print_text: Callable[[], None]) -> None:
    """Print an answer as JSON, or as text."""
    if as_json:
        import json

        print(json.dumps(found, indent=2))
    else:
        print_text()


def _tables() -> Any:
    """Return the module that prints tables: it imports rich, which takes longer than the daemon's answer."""
    from gangway.cli import tables

    return tables


def _print_explanation(found: dict[str, Any]) -> None:
    from gangway.cli.explain import explanation

    print(*explanation(found), sep="\n")


def _quoted(name: str) -> str:
    """Return a name as a part of a path or a query."""
    from urllib.parse import quote

    return quote(name, safe="")
