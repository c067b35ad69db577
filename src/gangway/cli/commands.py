"""The commands of `gangway`: the words and options of each, and the request that it becomes.

What only some commands need is imported by them, as most of a command's time is spent on imports.
"""

from __future__ import annotations

import json
import os
import sys

from gangway.cli import options as opt
from gangway.cli import views
from gangway.cli.client import NoDaemon, Refused, ask, ask_running, daemon_command
from gangway.cli.views import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from gangway.cli.listing import Filter, Listing
    from gangway.cli.options import Option

    Function = Callable[..., None]
    Command = tuple[Function, tuple[Option, ...]]

FAILED = 1
"""The exit code of a command that failed."""
GROUPS = {
    "config": "Check and show the settings.",
    "daemon": "Manage the networks and published ports of this network namespace.",
    "docker": "Hand Docker's ports over to gangway, and back.",
    "network": "Create, list and remove networks.",
}
"""The first word of commands that have two, and its help; `daemon` is a command by itself, too."""


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
        say(text)


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
    from gangway.cli.lifecycle import end_daemon, status

    found = status(path)
    if found is None:
        return say(f"no daemon runs at {path}")
    end_daemon(path, found)
    if found["leases"]:
        say(f"{found['leases']} docker-proxy launchers start a daemon again, which serves their ports")


def restart(path: str) -> None:
    """End the daemon, and start it again with the same options.  Ports stay published meanwhile."""
    from gangway.cli.lifecycle import restart_daemon

    restart_daemon(path)


def reload(path: str) -> None:
    """Have the daemon read its settings and what is declared in the folder conf.d again, and open its log files again.

    The exit code is 1 if something declared is wrong or cannot be served; the rest is served.
    """
    try:
        found = ask_running(path, "POST", "/reload")
    except NoDaemon:
        raise Refused("Conflict", f"no daemon runs at {path}; the next one reads the settings when it starts") from None
    for text in (*found["warnings"], *found["problems"]):
        say(text)
    if found["problems"]:
        sys.exit(FAILED)


def list_ports(path: str, container: str | None, filters: Sequence[Filter], **form: Any) -> None:
    """List published ports, and the road that each kind of client takes."""
    from gangway.cli.listing import MAPPINGS, select

    def members(network: str) -> set[tuple[str, str]]:
        endpoints = ask(path, "GET", _filled("/networks/{name}", {"name": network}))["endpoints"]
        return {(one["container"], address) for one in endpoints for address in one["addresses"]}

    _check_form(**form)
    found = ask(path, "GET", _filled("/mappings", {"container": container} if container else {}))
    tests = [(key, members(value) if key == "network" else value) for key, value in filters]
    _show(MAPPINGS, select(MAPPINGS, found, tests), **form)


def list_networks(path: str, filters: Sequence[Filter], **form: Any) -> None:
    """List networks."""
    from gangway.cli.listing import NETWORKS, select

    _check_form(**form)
    _show(NETWORKS, select(NETWORKS, ask(path, "GET", "/networks"), filters), **form)


def _check_form(as_json: bool, wide: bool, template: str | None) -> None:
    if bool(as_json) + bool(wide) + (template is not None) > 1:
        raise Refused("InvalidRequest", "give only one of --json, --wide, --format and -q")


def _show(listing: Listing, answers: list[Any], as_json: bool, wide: bool, template: str | None) -> None:
    from gangway.cli.listing import show

    if as_json:
        print(json.dumps(answers, indent=2))
    else:
        show(listing, answers, wide, template)


def log(path: str, as_json: bool | None) -> None:
    """Follow the daemon's events: the last 1000 that it has kept, and then each new one."""
    from gangway.cli.log import follow

    try:
        follow(path, bool(as_json))
    except NoDaemon:
        raise Refused("Conflict", f"no daemon runs at {path}") from None


def check_config(file: str | None) -> None:
    """Check the settings file, the environment, and what is declared in the folder conf.d, without a daemon."""
    from gangway.cli.configuration import check

    check(file)


def show_config(path: str, as_json: bool | None) -> None:
    """Show the settings in force, and where each comes from: those of the daemon, or else of one started on demand.

    A setting is a default, or from a line of the settings file, which the environment overrides, and options both.
    """
    from gangway.cli.configuration import settings

    found = settings(path)
    if as_json:
        return print(json.dumps(found, indent=2))
    views.print_settings(found)


def down(path: str, yes: bool | None) -> None:
    """Remove everything of gangway's in this network namespace, and end the daemon.

    Networks, published ports, rules, the relay and the database are removed, and changed settings restored.  It asks
    first.
    """
    from gangway.cli.uninstall import down as take_down

    take_down(path, is_confirmed=bool(yes))


def uninstall_check(as_json: bool | None) -> None:
    """Show what is left of gangway's in this network namespace, and how to remove it.

    It changes nothing.  The exit code is 0 if nothing is left, and else 1.
    """
    from gangway.cli.uninstall import left

    found = left()
    if as_json:
        print(json.dumps([one._asdict() for one in found], indent=2))
    elif found:
        views.print_remains(found)
    else:
        print("nothing is left")
    if found:
        sys.stdout.flush()
        sys.exit(FAILED)


def apply(path: str, file: str, dry_run: bool | None) -> None:
    """Declare the networks and ports of a file, also after a reboot, and remove what it declared before.

    The file is copied to /etc/gangway/conf.d.  Containers need not exist yet.
    """
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused("InvalidRequest", f"{file}: {getattr(error, 'strerror', None) or error}") from None
    body = {"name": os.path.basename(file), "text": text, "dry_run": bool(dry_run)}
    answer = ask(path, "POST", "/apply", body)
    print("".join(f"{line}\n" for line in answer["changes"]), end="", flush=True)
    for note in answer["notes"]:
        say(note)


def remove_networks(path: str, names: list[str], if_exists: bool | None) -> None:
    """Remove networks that have no containers."""
    given = {"if_exists": True} if if_exists else {}
    failed = []
    for name in names:
        try:
            ask(path, "DELETE", _filled("/networks/{name}", {"name": name, **given}))
        except Refused as error:
            failed.append(error)
    for refused in failed[:-1]:
        say(str(refused))
    if failed:
        raise failed[-1]


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
            sys.exit(FAILED)

    send.__doc__ = text
    return send, (*options, opt.JSON, opt.SOCKET) if method == "GET" else (*options, opt.SOCKET)


def _filled(target: str, given: dict[str, Any]) -> str:
    """Return a path with these values, and those that it has no place for as its query."""
    from urllib.parse import quote

    quoted = {name: "true" if value is True else quote(value, safe="") for name, value in given.items()}
    query = "&".join(f"{name}={value}" for name, value in quoted.items() if f"{{{name}}}" not in target)
    return target.format(**quoted) + (f"?{query}" if query else "")


COMMANDS: dict[str, Command] = {
    "network create": _request(
        "POST /networks",
        (
            *(opt.NAME, opt.SUBNETS, opt.GATEWAYS, opt.BRIDGE, opt.NO_MASQUERADE, opt.NO_ICC, opt.INTERNAL, opt.MTU),
            opt.IF_NOT_EXISTS,
        ),
        "Create a network: a bridge, its subnets, and a policy.",
        lambda network: print(network["name"]),
    ),
    "network ls": (list_networks, opt.LISTED_NETWORKS),
    "network inspect": _request(
        "GET /networks/{name}", (opt.NETWORK_NAME,), "Show a network's details.", views.print_network
    ),
    "network rm": (remove_networks, (opt.NETWORK_NAMES, opt.IF_EXISTS, opt.SOCKET)),
    "attach": _request(
        "POST /endpoints",
        (opt.CONTAINER, opt.NETWORK, opt.IPS, opt.IF_NOT_EXISTS),
        "Attach a container to a network.  On several, the first one has its default route and its published ports.",
        views.print_attached,
    ),
    "detach": _request(
        "DELETE /endpoints/{container}",
        (opt.CONTAINER, opt.LEFT_NETWORK, opt.IF_EXISTS),
        "Detach a container, and unpublish its ports.  The first of its networks is left last.",
    ),
    "publish": _request(
        "POST /mappings",
        (opt.CONTAINER, opt.PORTS, opt.ADMITTED, opt.KEEP, opt.IF_NOT_EXISTS),
        "Publish ports of a container.",
        views.print_lines,
    ),
    "unpublish": _request(
        "POST /mappings/withdraw",
        (opt.OPTIONAL_CONTAINER, opt.ANY_PORTS, opt.ALL, opt.IF_EXISTS),
        "Unpublish ports of a container: those given by -p, or all.",
    ),
    "ls": (list_ports, (opt.OPTIONAL_CONTAINER, *opt.LISTED_PORTS)),
    "explain": _request(
        "GET /explain",
        (opt.AT, opt.FROM),
        "Explain which road a client takes to a published port, and why.",
        lambda answer: print(*views.explanation(answer), sep="\n"),
    ),
    "apply": (apply, (opt.DECLARATION, opt.DRY_RUN, opt.SOCKET)),
    "cleanup": _request(
        "POST /cleanup",
        (),
        "Delete links, rules and ports of a daemon whose database is lost.",
        lambda names: print(*(f"deleted {name}" for name in names), sep="\n", end="\n" * bool(names)),
    ),
    "doctor": _request("GET /doctor", (), "Show what this host supports, and what it does not.", views.print_checks),
    "docker check": _request(
        "GET /docker",
        (opt.CONFIG_FILE,),
        "Check whether Docker's ports are gangway's, and print what to change.",
        views.print_docker,
        lambda report: all(check["holds"] for check in report["checks"]),
    ),
    "docker enable": _request(
        "POST /docker/enable",
        (opt.CONFIG_FILE,),
        "Switch dockerd's rules and proxy off in its settings, and print what has to follow.",
        views.print_change,
    ),
    "docker disable": _request(
        "POST /docker/disable", (opt.CONFIG_FILE,), "Restore dockerd's settings.", views.print_change
    ),
    "docker cleanup": _request(
        "POST /docker/cleanup", (opt.FORWARD_ACCEPT,), "Remove the rules that dockerd has left.", views.print_change
    ),
    "run": (run, (opt.RUN_NAME, opt.NETWORK, opt.ANY_PORTS, opt.ADMITTED_BY_RUN, opt.SOCKET, opt.COMMAND)),
    "daemon reload": (reload, (opt.SOCKET,)),
    "daemon restart": (restart, (opt.SOCKET,)),
    "daemon status": (show_status, (opt.SOCKET,)),
    "daemon stop": (stop, (opt.SOCKET,)),
    "log": (log, (opt.JSON_LINES, opt.SOCKET)),
    "version": (show_version, (opt.SOCKET,)),
    "daemon": (
        daemon,
        (
            *(opt.FIREWALL, opt.NO_FORWARD, opt.EXCLUDE, opt.DOCKER, opt.CHAINS, opt.STATE),
            *(opt.LOG_LEVEL, opt.LOG_FORMAT, opt.CONFIG, opt.SOCKET),
        ),
    ),
    "down": (down, (opt.YES, opt.SOCKET)),
    "uninstall-check": (uninstall_check, (opt.JSON,)),
    "config check": (check_config, (opt.FILE,)),
    "config show": (show_config, (opt.JSON, opt.SOCKET)),
}
"""Each command's function, which is called with the values of its options, and those options.  The function's docstring
is the command's help."""
