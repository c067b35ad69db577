"""The commands of `gangway`.

What this file knows: their words and options, and which request each becomes.  What it must not know: how anything is
done.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import click

from gangway.cli.client import STATE, Refused, ask, daemon_command, socket_path
from gangway.cli.quick import line

_Command = TypeVar("_Command", bound=Callable[..., Any])
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Group(click.Group):
    """Every error is a line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Refused as error:
            print(f"gangway: {error}", file=sys.stderr)
            ctx.exit(error.exit_code)


def _with_socket(command: _Command) -> _Command:
    option = click.option(
        "--socket", "path", metavar="PATH", default=socket_path, help="The daemon's socket (or GANGWAY_SOCKET)."
    )
    return option(command)


_container_argument = click.argument("container", callback=lambda _context, _option, name: _container(name))
_json = click.option("--json", "as_json", is_flag=True, help="As JSON, an array.")
_ports = click.option(
    "-p", "--publish", "ports", metavar="PORTS", multiple=True, help="[HOST-IP:]HOST-PORT[-END]:PORT[-END][/PROTO]"
)


@click.group(cls=_Group, context_settings=_HELP)
@click.version_option(package_name="gangway", message="%(prog)s %(version)s")
def gangway() -> None:
    """Publishes containers' ports."""


@gangway.group()
def network() -> None:
    """Networks: a bridge, its subnets, and a policy."""


@network.command("create")
@click.argument("name")
@click.option("--subnet", "subnets", multiple=True, required=True, help="One of IPv4, one of IPv6, or both.")
@click.option("--gateway", "gateways", multiple=True, help="The host's address in a subnet; its first one if left out.")
@click.option("--bridge", metavar="IF", default="", help="The bridge's name; gw-NAME if left out.")
@click.option("--no-masquerade", is_flag=True, help="Containers go out under their own addresses.")
@click.option("--no-icc", is_flag=True, help="Containers cannot reach each other but by published ports.")
@click.option("--internal", is_flag=True, help="Containers cannot go out, and nobody gets in but the host.")
@click.option("--mtu", type=int, default=1500, show_default=True)
@_with_socket
def create_network(path: str, no_masquerade: bool, no_icc: bool, **given: Any) -> None:
    """Makes a network."""
    body = {**given, "masquerade": not no_masquerade, "icc": not no_icc}
    print(ask(path, "POST", "/networks", body)["name"])


@network.command("ls")
@_json
@_with_socket
def list_networks(path: str, as_json: bool) -> None:
    """Lists networks."""
    found = ask(path, "GET", "/networks")
    _show(found, as_json, lambda: _views().print_networks(found))


@network.command("inspect")
@click.argument("name")
@_json
@_with_socket
def inspect_network(path: str, name: str, as_json: bool) -> None:
    """Shows a network and its containers."""
    found = ask(path, "GET", f"/networks/{_part(name)}")
    _show([found], as_json, lambda: _views().print_network(found))


@network.command("rm")
@click.argument("name")
@_with_socket
def remove_network(path: str, name: str) -> None:
    """Removes a network that has no containers."""
    ask(path, "DELETE", f"/networks/{_part(name)}")


@gangway.command()
@_container_argument
@click.option("--network", default="", help="The network; gangway0, which is made on demand, if left out.")
@click.option("--ip", "addresses", multiple=True, help="An address for it; a free one if left out.")
@_with_socket
def attach(path: str, **given: Any) -> None:
    """Attaches CONTAINER (a name of ip-netns, a path, or pid:PID) to a network."""
    print(*ask(path, "POST", "/endpoints", given)["addresses"], sep="\n")


@gangway.command()
@_container_argument
@_with_socket
def detach(path: str, container: str) -> None:
    """Takes CONTAINER off its network; its ports are withdrawn."""
    ask(path, "DELETE", f"/endpoints/{_part(container)}")


@gangway.command()
@_container_argument
@_ports
@_with_socket
def publish(path: str, container: str, ports: tuple[str, ...]) -> None:
    """Publishes CONTAINER's ports."""
    if not ports:
        raise click.UsageError("nothing to publish: name ports with -p")
    for mapping in ask(path, "POST", "/mappings", {"container": container, "ports": ports}):
        print(line(mapping))


@gangway.command()
@_container_argument
@_ports
@_with_socket
def unpublish(path: str, container: str, ports: tuple[str, ...]) -> None:
    """Withdraws CONTAINER's ports: those after -p, or all."""
    ask(path, "POST", "/mappings/withdraw", {"container": container, "ports": ports})


@gangway.command("ls")
@click.argument("container", required=False, callback=lambda _context, _option, name: name and _container(name))
@_json
@_with_socket
def list_mappings(path: str, container: str | None, as_json: bool) -> None:
    """Lists what is published, and the road of each kind of client."""
    query = f"?{urlencode({'container': container})}" if container else ""
    found = ask(path, "GET", f"/mappings{query}")
    _show(found, as_json, lambda: _views().print_mappings(found))


@gangway.command()
@click.argument("at", metavar="HOST-IP:PORT[/PROTO]")
@click.option(
    "--from", "origin", type=click.Choice(["loopback", "host", "remote", "container"]), help="One origin only."
)
@_json
@_with_socket
def explain(path: str, at: str, origin: str | None, as_json: bool) -> None:
    """Tells by which road a client gets to a container's port, and why."""
    query = {"at": at} | ({"from": origin} if origin else {})
    found = ask(path, "GET", f"/explain?{urlencode(query)}")
    _show([found], as_json, lambda: print(*_views().explanation(found), sep="\n"))


@gangway.command()
@_json
@_with_socket
def doctor(path: str, as_json: bool) -> None:
    """Tells what this host can do, and what follows from what it cannot."""
    found = ask(path, "GET", "/doctor")
    _show(found, as_json, lambda: _views().print_checks(found))


@gangway.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--name", help="The container's name; run-PID if left out.")
@click.option("--network", default="", help="The network; gangway0, which is made on demand, if left out.")
@_ports
@_with_socket
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(path: str, name: str | None, network: str, ports: tuple[str, ...], command: tuple[str, ...]) -> None:
    """Runs COMMAND in a network namespace of its own, attached and published for as long as it runs."""
    from gangway.cli.run import run as run_command

    container = name or f"run-{os.getpid()}"

    attached = False

    def begin(pid: int) -> None:
        nonlocal attached
        body = {"container": container, "network": network, "namespace": f"/proc/{pid}/ns/net"}
        ask(path, "POST", "/endpoints", body)
        attached = True
        if ports:
            for mapping in ask(path, "POST", "/mappings", {"container": container, "ports": ports}):
                print(f"gangway: {line(mapping)}", file=sys.stderr)

    try:
        code = run_command(command, begin)
    finally:
        if attached:
            _detach_if_there(path, container)
    sys.exit(code)


@gangway.command()
@click.option("--firewall", metavar="auto|nftables|iptables|none", help="Who writes the rules.  [default: auto]")
@click.option("--no-ip-forward", is_flag=True, help="Leave forwarding as it is; what needs it goes by the relay.")
@click.option("--chain-prefix", metavar="NAME", help="The name of iptables' chains; DOCKER: Docker's very layout.")
@click.option("--state", metavar="PATH", help=f"The database.  [default: {STATE}, or beside the socket]")
@click.option("--config", metavar="FILE", help="A TOML file with the same names; options come first.")
@_with_socket
def daemon(path: str, config: str | None, **options: Any) -> None:
    """Looks after networks and published ports.  Other commands start one when there is none."""
    given = {name.replace("_", "-"): value for name, value in options.items() if value not in (None, False)}
    if given.pop("no-ip-forward", False):
        given["ip-forward"] = False
    words = daemon_command(path, given, config)
    os.execv(words[0], words)


def _container(name: str) -> str:
    """A path means the same wherever the daemon is."""
    return os.path.abspath(name) if "/" in name else name


def _detach_if_there(path: str, container: str) -> None:
    """The daemon may have noticed already; and the exit code is the command's, whatever comes of this."""
    try:
        ask(path, "DELETE", f"/endpoints/{_part(container)}")
    except Refused as error:
        if error.kind != "Conflict":
            print(f"gangway: {error}", file=sys.stderr)


def _show(found: list[Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show()


def _views() -> Any:
    """rich takes longer to import than the daemon takes to answer."""
    from gangway.cli import tables as views

    return views


def _part(name: str) -> str:
    """A name as a part of a path."""
    return quote(name, safe="")
