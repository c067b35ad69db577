"""`gangway publish`, quickly.

What this file knows: the plain form of that command.  What it must not know: the rest of the command line.

Importing click takes longer than asking the daemon does, three times as long as Python itself takes to start; and this
is the command that runs a hundred times when a host is set up.  So its plain form is read here, and for everything
else, mistakes included, there is `commands`.  A test compares the two on any words.
"""

import sys

from gangway.cli.client import NoDaemon, Refused, ask_running, socket_path

Plain = tuple[str, str, list[str]]
"""The daemon's socket, the container, what came after each -p."""


def publish(words: list[str]) -> int | None:
    """Does it, and gives the exit code; None: it is not the plain form, or there is no daemon yet."""
    plain = parse(words)
    if plain is None:
        return None
    path, container, ports = plain
    try:
        for mapping in ask_running(path, "POST", "/mappings", {"container": container, "ports": ports}):
            print(line(mapping))
    except NoDaemon:
        return None
    except Refused as error:
        print(f"gangway: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(words: list[str]) -> Plain | None:
    """`publish CONTAINER -p PORTS …`, with `--socket PATH` perhaps; None if it is anything else."""
    if not words or words[0] != "publish":
        return None
    path, containers, ports = socket_path(), [], []
    rest = iter(words[1:])
    for word in rest:
        if word in ("-p", "--publish", "--socket"):
            value = next(rest, None)
            if value is None:
                return None
            if word == "--socket":
                path = value
            else:
                ports.append(value)
        elif word.startswith("-"):
            return None
        else:
            containers.append(word)
    if len(containers) != 1 or not ports or not path or "/" in containers[0]:
        return None
    return path, containers[0], ports


def line(mapping: dict[str, str]) -> str:
    """What `publish` prints of a mapping."""
    return f"{_at(mapping, 'host')} -> {_at(mapping, 'container')}/{mapping['protocol']}"


def _at(mapping: dict[str, str], side: str) -> str:
    address, ports = mapping[f"{side}_address"], mapping[f"{side}_ports"]
    return f"[{address}]:{ports}" if ":" in address else f"{address}:{ports}"
