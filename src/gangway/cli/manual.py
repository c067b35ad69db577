"""What help and the manual pages say of commands besides their docstrings and options: sections, examples, `-p`.

Only `--help`, and the scripts that write the manual pages, import it.
"""

from __future__ import annotations

import textwrap

from gangway.cli.commands import COMMANDS, GROUPS
from gangway.cli.listing import MAPPINGS, NETWORKS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Pairs = tuple[tuple[str, str], ...]

WIDTH = 80
"""How wide help is, in characters."""
_PROGRAM = """Publish the ports of containers.

Clients that connect to a port of the host reach a port in a container's network namespace, each kind of client by the
shortest road that the kernel offers.  Most commands are requests to a daemon, which is started on demand.
"""
PORTS: Pairs = (
    ("8000:80", "port 8000 of all host addresses leads to the container's port 80"),
    ("127.0.0.1:8000:80", "port 8000 of this host address only"),
    ("[::1]:8000:80", "the same with an IPv6 address"),
    ("5060:5060/udp", "udp or sctp instead of tcp"),
    ("8000-8010:80-90", "a range: 8000 leads to 80, 8001 to 81, and so on"),
    ("8000-8010:80", "the first free host port of a range"),
    ("127.0.0.1::80", "a free host port of this address"),
    ("80", "a free host port of all addresses"),
)
"""The grammar of `-p`, by example."""
SECTIONS: dict[str, dict[str, Pairs]] = {
    "Networks and containers": {
        "network create": (
            (
                "gangway network create web --subnet 172.30.0.0/24 --subnet fd30::/64",
                "a bridge for both IP versions; the host has the first address of each subnet",
            ),
            (
                "gangway network create db --subnet 172.31.0.0/24 --internal",
                "its containers reach the host only, and only the host reaches them",
            ),
            ("gangway network create web --if-not-exists", "with free subnets, unless it exists already"),
        ),
        "network ls": (
            ("gangway network ls --wide", "a table of all networks, with gateways and MTU"),
            ("gangway network ls -q --filter container=box", "the names of the networks that box is on"),
        ),
        "network inspect": (
            ("gangway network inspect web", "its subnets, gateways, policy and containers"),
            ("gangway network inspect web --json", "the same as JSON"),
        ),
        "network rm": (
            ("gangway network rm web", "delete the bridge of web and its rules"),
            ("gangway detach box && gangway network rm web", "the containers have to be detached first"),
            ("gangway network rm --if-exists web db", "several, if they exist"),
        ),
        "attach": (
            ("gangway attach box --network web", "a namespace that `ip netns add box` has created"),
            ("gangway attach pid:4711 --network web --ip 172.30.0.9", "that of a process, with this address"),
            ("gangway attach box --network db", "box, which is on web, is on db, too; its ports stay on web"),
        ),
        "detach": (
            ("gangway detach box", "from all its networks; also unpublishes its ports"),
            ("gangway detach box --network db", "box stays on its other networks"),
            ("gangway detach pid:4711", "a container that was attached by this name"),
        ),
    },
    "Published ports": {
        "run": (
            (
                "gangway run -p 8000:8000 -- python3 -m http.server 8000",
                "a web server in a namespace of its own; its port is published until it ends",
            ),
            ("gangway run --name box --network web -- sh", "a shell in a container of the network web"),
        ),
        "publish": (
            ("gangway publish box -p 8000:80 -p 5060-5070:5060-5070/udp", "a port and a range"),
            ("gangway publish box -p 8443:443 --from 10.0.0.0/8", "for this host and clients of a subnet only"),
            ("gangway publish docker:web -p 8080:80", "one more port of a running container of Docker's"),
            ("gangway publish box --keep -p 8000:80", "also after a reboot, as soon as box exists"),
        ),
        "unpublish": (
            ("gangway unpublish box -p 8000:80", "one port, written as it was published"),
            ("gangway unpublish box", "all ports of box"),
            ("gangway unpublish --all", "all ports of all containers, but for what files declare"),
        ),
        "apply": (
            ("gangway apply web.toml", "publish what the file declares, and remove what it declared before"),
            ("gangway apply --dry-run web.toml", "print what would be done"),
        ),
        "ls": (
            ("gangway ls --filter road=relay --filter protocol=tcp", "a table of relayed TCP ports"),
            ("gangway ls --format '{host_address}\\t{host_ports}\\t{container}'", "separated by tabs, without a head"),
            ("gangway ls -q box | xargs -n1 gangway unpublish box -p", "unpublish the ports of box one by one"),
        ),
        "explain": (
            ("gangway explain 127.0.0.1:8000", "the roads to a port, why, and the rules that match"),
            ("gangway explain [::1]:53/udp --from loopback", "for one kind of client only"),
        ),
    },
    "Docker": {
        "docker check": (
            ("gangway docker check", "what daemon.json says and which of dockerd's rules are there"),
            ("gangway docker check --json", "the same as JSON; exit code 1 if something is to be changed"),
        ),
        "docker enable": (
            ("gangway docker enable", "edit /etc/docker/daemon.json, and keep a backup beside it"),
            ("gangway docker enable --config-file /srv/docker/daemon.json", "edit another file"),
        ),
        "docker cleanup": (
            ("gangway docker cleanup", "after dockerd was restarted with its new settings"),
            ("gangway docker cleanup --forward-accept", "also undo dockerd's policy DROP of FORWARD"),
        ),
        "docker disable": (
            ("gangway docker disable", "undo what `gangway docker enable` has changed"),
            ("gangway docker disable --config-file /srv/docker/daemon.json", "edit another file"),
        ),
    },
    "The daemon": {
        "daemon": (
            ("gangway daemon", "run in the foreground until SIGTERM; ports stay published"),
            ("gangway daemon --firewall nftables --exclude eth1", "publish nothing at the addresses of eth1"),
        ),
        "daemon status": (
            ("gangway daemon status", "of the daemon of this network namespace"),
            ("gangway daemon status --socket /run/other.sock", "of the one that listens there"),
        ),
        "daemon reload": (
            ("gangway daemon reload", "after /etc/gangway/gangway.toml or a file of conf.d was edited"),
            ("gangway config check && gangway daemon reload", "only if the settings are valid"),
        ),
        "daemon restart": (
            ("gangway daemon restart", "after an upgrade; connections go on"),
            ("gangway daemon restart --socket /run/other.sock", "the one that listens there"),
        ),
        "daemon stop": (
            ("gangway daemon stop", "published ports keep working"),
            ("gangway daemon stop --socket /run/other.sock", "the one that listens there"),
        ),
        "doctor": (
            ("gangway doctor", "a table of checks, with the consequence of each that fails"),
            ("gangway doctor --json", "the same as JSON"),
        ),
        "cleanup": (
            ("gangway cleanup", "of this network namespace; needed only if the database is lost"),
            ("gangway cleanup --socket /run/other.sock", "by the daemon that listens there"),
        ),
        "config check": (
            ("gangway config check", "of /etc/gangway/gangway.toml, and of the files in conf.d beside it"),
            ("gangway config check new.toml", "of another file, and of conf.d beside that"),
        ),
        "config show": (
            ("gangway config show", "of the running daemon, or of one that would be started"),
            ("gangway config show --json", "the same as JSON"),
        ),
        "down": (
            ("gangway down", "show what there is, ask, and remove it"),
            ("gangway down --yes && gangway uninstall-check", "in a script: remove it, and check"),
        ),
        "uninstall-check": (
            ("gangway uninstall-check", "a table of what is left, with a command for each"),
            ("gangway uninstall-check --json", "the same as JSON"),
        ),
        "log": (
            ("gangway log", "what the daemon did, who asked for it, and then what it does"),
            ("gangway log --json | grep refused", "refused requests, a JSON object for each"),
        ),
        "version": (
            ("gangway version", "warns if the daemon's or the relay's version differs"),
            ("gangway --version", "the command's only, without asking the daemon"),
        ),
    },
}
"""The sections of `gangway --help`, their commands, and examples of each: a command line, and what it does."""
EXAMPLES: dict[str, Pairs] = {name: pairs for section in SECTIONS.values() for name, pairs in section.items()}


def paragraphs(name: str) -> list[str]:
    """Return what a command, a group, or gangway itself (an empty name) is for; each paragraph is one line."""
    text = COMMANDS[name][0].__doc__ or "" if name in COMMANDS else GROUPS.get(name, _PROGRAM)
    return [" ".join(one.split()) for one in text.split("\n\n")]


def summary(name: str) -> str:
    """Return the first sentence of a command's help."""
    return f"{paragraphs(name)[0].removesuffix('.').partition('. ')[0]}."


def description(name: str) -> str:
    """Return the beginning of the help of a command, of a group, or of all commands."""
    return "\n\n".join(textwrap.fill(one, WIDTH) for one in paragraphs(name))


def epilog(name: str) -> str:
    """Return what follows the options there."""
    return "\n".join(_details(name) if name in COMMANDS else _overview(name))


def tables(name: str) -> dict[str, Pairs]:
    """Return what explains the options of a command, by title: the grammar of -p, the fields and keys of listings."""
    listing = {"ls": MAPPINGS, "network ls": NETWORKS}.get(name)
    if listing is None:
        return {"PORTS, by example": PORTS} if any("-p" in names for names, _ in COMMANDS[name][1]) else {}
    return {
        "FIELD, as in --format '{FIELD}\\t{FIELD:>9}' (\\t: a tab; \\n: a new line)": tuple(
            (key, meaning) for key, (meaning, _) in listing.fields.items()
        ),
        "KEY (of several filters with one key, any has to match)": tuple(
            (key, meaning) for key, (meaning, *_) in listing.filters.items()
        ),
    }


def _details(name: str) -> Iterator[str]:
    for title, rows in tables(name).items():
        yield from (f"{title}:", *_columns(rows, max(len(first) for first, _ in rows)), "")
    yield "examples:"
    for line, meaning in EXAMPLES[name]:
        yield f"  {line}"
        yield from textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _overview(group: str) -> Iterator[str]:
    width = max(map(len, COMMANDS))
    for title, section in SECTIONS.items():
        rows = [(name, summary(name)) for name in section if not group or name.startswith(f"{group} ")]
        if rows:
            yield from (f"{title}:", *_columns(rows, width), "")
    yield " ".join(filter(None, ("gangway", group, "COMMAND --help shows a command's options, and examples.")))


def _columns(rows: Iterable[tuple[str, str]], width: int) -> Iterator[str]:
    """Yield two columns, the first one of this width; the second one is folded."""
    for first, second in rows:
        lines = textwrap.wrap(second, WIDTH - width - 4)
        yield f"  {first:{width}}  {lines[0]}"
        yield from (" " * (width + 4) + line for line in lines[1:])
