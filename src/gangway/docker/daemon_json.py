"""dockerd's settings, daemon.json, as text: what they say, and edits that leave everything else as it is.

dockerd reads JSON without comments, and takes an empty file for an empty object.  It refuses to start with a key that
it does not know, and with one that is also a flag on its command line (docs.docker.com/engine/daemon).
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gangway.errors import InvalidRequest

PROXY = "userland-proxy"
SWITCHES = ("iptables", "ip6tables", PROXY)
"""The keys that have to be false.  dockerd's backends for nftables and iptables obey the first two alike."""
NOTED = ("userland-proxy-path", "ip-forward", "ip", "live-restore", "firewall-backend")
"""Other keys that matter to published ports."""
DROP_IN = "gangway-docker-proxy"
"""The name of the program that takes docker-proxy's place: with it, `userland-proxy` may stay on."""

_SPACE = re.compile(r"[ \t\r\n]*")
_BYTE_ORDER_MARK = "\ufeff"
_INDENT = "\n  "  # of an object that has no keys yet


class _Member(NamedTuple):
    """A key and its value, and where they stand in the text."""

    key: str
    value: Any
    start: int
    value_start: int
    end: int


class Restored(NamedTuple):
    """What a file says without gangway's edit."""

    text: str | None  # None: there was no file, and nothing is left in it
    keys: tuple[str, ...]  # that are restored
    changed_since: tuple[str, ...]  # keys that somebody else has changed after gangway did: they stay


def values(text: str) -> dict[str, Any]:
    """Return the settings.  InvalidRequest: line, column and what is wrong."""
    return {member.key: member.value for member in _members(text)}


def needed(settings: Mapping[str, Any], flags: Mapping[str, str]) -> tuple[str, ...]:
    """Return the switches that have to be off, given the flags that dockerd was started with."""
    proxy = settings.get("userland-proxy-path", flags.get("userland-proxy-path", ""))
    return SWITCHES[:2] if str(proxy).rpartition("/")[2] == DROP_IN else SWITCHES


def to_change(settings: Mapping[str, Any], flags: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys that have to be set to false.

    A flag that is false already needs no key: dockerd refuses to start with both.
    """
    return tuple(
        key
        for key in needed(settings, flags)
        if settings.get(key) is not False and not (key not in settings and flags.get(key) == "false")
    )


def enabled(text: str, flags: Mapping[str, str]) -> str:
    """Return the text that leaves ports to gangway."""
    for key in to_change(values(text), flags):
        text = _with(text, key, "false")
    return text


def restored(text: str, before: str | None) -> Restored:
    """Return the text with the keys that `enabled` has changed as they were in `before`; None: there was no file."""
    former, now = {one.key: one for one in _members(before or "")}, values(text)
    keys, changed_since = [], []
    for key in to_change(values(before or ""), {}):
        if now.get(key) is False:
            old = former.get(key)
            text = _without(text, key) if old is None else _with(text, key, (before or "")[old.value_start : old.end])
            keys.append(key)
        elif key in now or key in former:
            changed_since.append(key)
    rest = values(text)
    is_as_before = list(rest.items()) == [(key, one.value) for key, one in former.items()]
    return Restored(before if is_as_before else text, tuple(keys), tuple(changed_since))


def _members(text: str) -> list[_Member]:
    try:
        bare = text.removeprefix(_BYTE_ORDER_MARK)
        is_object = not bare.strip(" \t\r\n") or isinstance(_DECODER.decode(bare), dict)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not valid JSON: {error}") from None
    if not is_object:
        raise InvalidRequest("line 1, column 1: the settings have to be an object: { … }")
    found = list(_scan(text))
    keys = [member.key for member in found]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise InvalidRequest(f'the key "{twice}" is there twice: delete one of them')
    return found


def _scan(text: str) -> Iterator[_Member]:
    """Yield the members of a valid object."""
    at = _skip(text, text.find("{") + 1) if "{" in text else len(text)
    while at < len(text) and text[at] != "}":
        key, end = _DECODER.raw_decode(text, at)
        value_start = _skip(text, _skip(text, end) + 1)  # after the colon
        value, end = _DECODER.raw_decode(text, value_start)
        yield _Member(key, value, at, value_start, end)
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _with(text: str, key: str, value: str) -> str:
    """Return the text with a value, as JSON; a new key comes last, spaced like the one before it."""
    members = _members(text)
    for member in members:
        if member.key == key:
            return text[: member.value_start] + value + text[member.end :]
    if not members:
        return _first(text, f'"{key}": {value}')
    last = members[-1]
    is_only = len(members) == 1
    gap = f",{text[text.find('{') + 1 : last.start] or ' '}" if is_only else text[members[-2].end : last.start]
    colon = text[_DECODER.raw_decode(text, last.start)[1] : last.value_start]
    return f'{text[: last.end]}{gap}"{key}"{colon}{value}{text[last.end :]}'


def _first(text: str, member: str) -> str:
    opening, closing = text.find("{"), text.rfind("}")
    if opening < 0:
        return f"{{{_INDENT}{member}\n}}\n"
    return f"{text[: opening + 1]}{_INDENT}{member}\n{text[closing:]}"


def _without(text: str, key: str) -> str:
    """Return the text without a key that it has."""
    members = _members(text)
    place = next(number for number, member in enumerate(members) if member.key == key)
    if len(members) == 1:
        return text[: text.find("{") + 1] + text[text.rfind("}") :]
    if place == 0:
        return text[: members[0].start] + text[members[1].start :]
    return text[: members[place - 1].end] + text[members[place].end :]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
