"""Completes a command line: the words that may follow those that were typed.

The shells' scripts (packaging/completions) run `gangway __complete WORD...`; the last word is the one to complete, and
may be empty.  Each line of the answer is a candidate: a word, or a word, a tab and what it means.  A line that begins
with a colon says what the shell completes by itself: `:files` or `:commands`.

It never starts a daemon, and does not wait long for one.
"""

from __future__ import annotations

import os
from argparse import PARSER
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from gangway.cli import manual
from gangway.cli.client import NoDaemon, Refused, ask_running, socket_path
from gangway.cli.commands import COMMANDS, GROUPS
from gangway.cli.listing import MAPPINGS, NETWORKS, ROADS, SOURCES
from gangway.cli.main import split_leading_socket
from gangway.cli.options import SOCKET
from gangway.inet import PROTOCOLS, format_host

Option = tuple[list[str], dict[str, Any]]
Candidate = tuple[str, str]
"""A word, and what it means."""
Get = Callable[[str], Any]
"""Returns the daemon's answer to a GET request; an empty one if there is no daemon."""
_LIMIT_S = 2.0
_FILES, _COMMANDS = (":files", ""), (":commands", "")
_HELP: Option = ["-h", "--help"], {"help": "Show this help.", "action": "help"}
_VERSION: Option = ["--version"], {"help": "Show it.", "action": "version"}


def complete(words: Sequence[str]) -> None:
    """Print the candidates for the last one of the words after `gangway`."""
    path = _socket_in(words) or socket_path()

    def get(target: str) -> Any:
        try:
            return ask_running(path, "GET", target, limit_s=_LIMIT_S)
        except (NoDaemon, Refused):
            return []

    for word, meaning in candidates(words or [""], get):
        print(f"{word}\t{meaning}" if meaning else word)


def candidates(words: Sequence[str], get: Get) -> list[Candidate]:
    """Return the candidates for the last word."""
    *typed, last = words
    leading, typed = map(list, split_leading_socket(typed))
    name = next((one for one in (" ".join(typed[:2]), *typed[:1]) if one in COMMANDS), "")
    found: list[Candidate] = []
    if leading and leading[-1] == "--socket":
        found = [_FILES]
    elif not typed:
        found = [*_words_after(""), *_option_words(last, _HELP, _VERSION, SOCKET)]
    elif len(typed) == 1 and typed[0] in GROUPS:
        found = [*_words_after(typed[0]), *(_after_command(name, [], last, get) if name else ())]
    elif name:
        found = list(_after_command(name, typed[name.count(" ") + 1 :], last, get))
    return [one for one in found if one in (_FILES, _COMMANDS) or one[0].startswith(last)]


def _socket_in(words: Sequence[str]) -> str:
    """Return the socket that the words name; empty: they name none."""
    found = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == "--socket":
            found = value if equals else following
    return found


def _words_after(group: str) -> Iterator[Candidate]:
    """Yield the words that may follow `gangway`, or a group."""
    if not group:
        yield from ((name, manual.summary(name)) for name in sorted({*GROUPS, *COMMANDS}) if " " not in name)
    for name in sorted(COMMANDS):
        if group and name.startswith(f"{group} "):
            yield name.removeprefix(f"{group} "), manual.summary(name)


def _option_words(last: str, *options: Option) -> Iterator[Candidate]:
    """Yield the options, if one is being typed."""
    if last.startswith("-"):
        for names, settings in options:
            yield from ((name, settings["help"]) for name in names if name.startswith("-"))


def _after_command(name: str, typed: Sequence[str], last: str, get: Get) -> Iterator[Candidate]:
    """Yield the candidates for the word after those that were typed after a command."""
    options = {word: option for option in COMMANDS[name][1] for word in option[0] if word.startswith("-")}
    arguments = [option for option in COMMANDS[name][1] if not option[0][0].startswith("-")]
    pending: Option | None = None
    given: list[str] = []
    only_arguments = False
    for word in typed:
        if pending is not None:
            pending = None
        elif word == "--" and not only_arguments:
            only_arguments = True
        elif word.startswith("-") and not only_arguments:
            pending = options[word] if word in options and _takes_value(options[word]) else None
        else:
            given.append(word)
            only_arguments |= arguments[0][1].get("nargs") == PARSER if arguments else False
    option, equals, _ = last.partition("=")
    if pending is not None:
        yield from _values(name, pending, given, last, get)
    elif equals and option in options and not only_arguments:
        values = _values(name, options[option], given, last.partition("=")[2], get)
        yield from ((word if word.startswith(":") else f"{option}={word}", meaning) for word, meaning in values)
    elif last.startswith("-") and not only_arguments:
        yield from _option_words(last, _HELP, *COMMANDS[name][1])
    elif len(given) < len(arguments):
        yield from _values(name, arguments[len(given)], given, last, get)
    elif arguments and arguments[-1][1].get("nargs") in (PARSER, "*", "+"):
        is_command = arguments[-1][1]["nargs"] == PARSER
        yield from [_FILES] if is_command else _values(name, arguments[-1], given, last, get)


def _takes_value(option: Option) -> bool:
    return option[1].get("action") in (None, "append")


def _values(name: str, option: Option, given: Sequence[str], last: str, get: Get) -> Iterator[Candidate]:
    """Yield what may be the value of a command's option, or an argument; `given` are the arguments before it."""
    settings = option[1]
    metavar = settings["metavar"] or ""
    if settings.get("choices"):
        yield from ((choice, "") for choice in settings["choices"])
    elif metavar in ("FILE", "PATH") or (metavar == "CONTAINER" and "/" in last):
        yield _FILES
    elif metavar == "COMMAND":
        yield _COMMANDS
    elif metavar == "CONTAINER":
        yield from _unattached() if name == "attach" else _containers(get)
    elif metavar == "NETWORK":
        yield from _networks(get) if name != "detach" else _networks_of(given, get)
    elif metavar == "PORTS" and name == "unpublish" and given:
        for mapping in get(f"/mappings?container={quote(given[0], safe='')}"):
            yield MAPPINGS.fields["ports"][1](mapping), ""
    elif metavar.startswith("HOST-IP:PORT"):
        for mapping in get("/mappings"):
            port = mapping["host_ports"].partition("-")[0]
            yield f"{format_host(mapping['host_address'])}:{port}/{mapping['protocol']}", mapping["container"]
    elif metavar == "KEY=VALUE":
        yield from _filters(name, last, get)
    elif "|" in metavar and metavar.islower():
        yield from ((choice, "") for choice in metavar.split("|"))


def _filters(name: str, last: str, get: Get) -> Iterator[Candidate]:
    key, equals, _ = last.partition("=")
    if not equals:
        listing = NETWORKS if name == "network ls" else MAPPINGS
        yield from ((f"{key}=", meaning) for key, (meaning, *_) in listing.filters.items())
    values: dict[str, Callable[[], Iterable[Candidate]]] = {
        "container": lambda: _containers(get),
        "name": lambda: _networks(get),
        "network": lambda: _networks(get),
        "protocol": lambda: ((one, "") for one in PROTOCOLS),
        "road": lambda: ((one, "") for one in ROADS),
        "source": lambda: ((one, "") for one in SOURCES),
    }
    if equals and key in values:
        yield from ((f"{key}={value}", meaning) for value, meaning in values[key]())


def _containers(get: Get) -> Iterator[Candidate]:
    networks: dict[str, list[str]] = {}
    for one in get("/endpoints"):
        networks.setdefault(one["container"], []).append(one["network"])
    yield from ((name, f"on network {', '.join(found)}") for name, found in networks.items())


def _networks(get: Get) -> Iterator[Candidate]:
    yield from ((one["name"], ", ".join(one["subnets"])) for one in get("/networks"))


def _networks_of(given: Sequence[str], get: Get) -> Iterator[Candidate]:
    """Yield the networks of the container that is given."""
    yield from ((one["network"], "") for one in get("/endpoints") if one["container"] in given)


def _unattached() -> Iterator[Candidate]:
    """Yield the namespaces of ip-netns(8)."""
    try:
        yield from ((name, "network namespace") for name in sorted(os.listdir("/run/netns")))
    except FileNotFoundError:
        return
