"""What the log says about requests: who asked for what, and what came of it."""

import re
import socket
import syslog
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from gangway.daemon.config import Config, by_name
from gangway.daemon.messages import ApplyAnswer, EndpointAnswer, ErrorAnswer, MappingAnswer, NetworkAnswer, StatusAnswer
from gangway.inet import format_host
from gangway.log import Event, Field, event
from gangway.model import PortMapping
from gangway.peers import peer_credentials
from gangway.plan import MappingPlan

_MAX_NAMED = 8  # so many ports are named in a line; of more, the number


class Client(NamedTuple):
    """A process that sent a request.  The kernel knows pid 0 if it is in another PID namespace."""

    pid: int
    uid: int
    command: str  # as in /proc/PID/comm; empty if it has exited, or cannot be seen

    def __str__(self) -> str:
        return f"{self.command or 'a process'} (pid {self.pid}, uid {self.uid})"


NOBODY = Client(0, -1, "")
"""A client that has closed its connection before anything was known about it."""


class Described(NamedTuple):
    """What a request has done."""

    name: str  # of the event
    text: str
    fields: dict[str, Field]


def client_of(sock: socket.socket) -> Client:
    """Return the process that has connected a unix socket."""
    pid, uid, _ = peer_credentials(sock)
    command = ""
    with suppress(OSError), open(f"/proc/{pid}/comm", errors="replace") as file:
        command = file.read().removesuffix("\n")
    return Client(pid, uid, command)


def started(status: StatusAnswer) -> Event:
    """Return the event of a daemon that serves."""
    text = f"daemon {status.version} started: pid {status.pid}, socket {status.socket}"
    fields: dict[str, Field] = {"version": status.version, "pid": status.pid, "socket": status.socket}
    return event("started", text, fields | {"folder": status.folder})


def settings(config: Config) -> Event:
    """Return the event that says which settings are in force."""
    said = {name: _setting(value) for name, value in by_name(config).items()}
    fields = {re.sub("[-.]", "_", name): value for name, value in said.items()}
    return event("settings", "settings: " + ", ".join(f"{name} {one or '-'}" for name, one in said.items()), fields)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def carried_out(described: Described, client: Client) -> Event:
    """Return the event of a request that was carried out."""
    return event(described.name, f"{described.text}, by {client}", described.fields | client._asdict())


def refused(method: str, path: str, status: int, answer: ErrorAnswer, client: Client) -> Event:
    """Return the event of a request that was answered with an error."""
    text = f"{method} {path} refused: {answer.error} (by {client})"
    fields: dict[str, Field] = {"method": method, "path": path, "status": status, "kind": answer.kind}
    return event("refused", text, fields | {"error": answer.error} | client._asdict(), syslog.LOG_WARNING)


def answered(method: str, path: str, status: int, client: Client) -> Event:
    """Return the event of any answer, for the level debug."""
    fields = {"method": method, "path": path, "status": status, **client._asdict()}
    return event("answered", f"{method} {path}: {status} (by {client})", fields, syslog.LOG_DEBUG)


def published(given: Mapping[str, Any], mappings: Sequence[MappingAnswer]) -> Described:
    described = _ports("published", given["container"], mappings, len(mappings))
    return described._replace(text=described.text + _condition(given))


def unpublished(given: Mapping[str, Any], mappings: Sequence[MappingAnswer]) -> Described:
    return _ports("unpublished", given["container"], mappings, len(mappings))


def applied(given: Mapping[str, Any], answer: ApplyAnswer) -> Described:
    name, count = "compared" if given["dry_run"] else "applied", len(answer.changes)
    said = "; ".join(answer.changes[:_MAX_NAMED]) or "nothing to change"
    more = f" and {count - _MAX_NAMED} more" * (count > _MAX_NAMED)
    return Described(name, f"{given['name']} {name}: {said}{more}", {"file": given["name"], "changes": count})


def network_created(given: Mapping[str, Any], network: NetworkAnswer) -> Described:
    subnets = ", ".join(network.subnets)
    text = f"network {network.name} created: bridge {network.bridge}, {subnets}{_condition(given)}"
    return Described("network-created", text, {"network": network.name, "bridge": network.bridge, "subnets": subnets})


def network_removed(given: Mapping[str, Any], _answer: None) -> Described:
    text = f"network {given['name']} removed{_condition(given)}"
    return Described("network-removed", text, {"network": given["name"]})


def attached(given: Mapping[str, Any], endpoint: EndpointAnswer) -> Described:
    container, network, addresses = endpoint.container, endpoint.network, ", ".join(endpoint.addresses)
    text = f"container {container} attached to network {network}: {addresses}{_condition(given)}"
    return Described("attached", text, {"container": container, "network": network, "addresses": addresses})


def detached(given: Mapping[str, Any], _answer: None) -> Described:
    container, network = given["container"], given.get("network", "")
    where = f" from network {network}" if network else ""
    fields = {"container": container} | ({"network": network} if network else {})
    return Described("detached", f"container {container} detached{where}{_condition(given)}", fields)


def planned_ports(name: str, container: str, mappings: Sequence[MappingPlan]) -> Described:
    """Describe ports of a container that were `published` or `unpublished`."""
    return _ports(name, container, list(map(MappingAnswer.of, mappings[:_MAX_NAMED])), len(mappings))


def adopted(name: str, container: str, mappings: Sequence[MappingPlan]) -> Event:
    """Return the event of ports that follow a container of Docker's: `published` or `unpublished`."""
    described = planned_ports(name, container, mappings)
    return event(name, f"{described.text}, as Docker says", described.fields)


def declared(described: Described, files: Collection[str], is_removed: bool) -> Event:
    """Return the event of what was done because these files declare it, or, if it `is_removed`, no longer do."""
    file = ", ".join(sorted(files))
    why = f"{'no longer declared' if is_removed else 'declared'} in {file}" if file else "not declared in any file"
    return event(described.name, f"{described.text}, {why}", described.fields | ({"file": file} if file else {}))


def lease_granted(mapping: PortMapping, client: Client) -> Event:
    """Return the event of a docker-proxy launcher that has taken a lease."""
    text, fields = _lease(mapping)
    return event("lease-granted", f"lease granted: {text}, by {client}", fields | client._asdict())


def lease_ended(mapping: PortMapping) -> Event:
    """Return the event of a launcher that has exited."""
    text, fields = _lease(mapping)
    return event("lease-ended", f"lease ended: {text}", fields)


def requested(pattern: str) -> Described:
    """Describe a request that has no event of its own."""
    return Described("requested", f"{pattern} carried out", {"request": pattern})


def _condition(given: Mapping[str, Any]) -> str:
    """Return under which condition something was done, as the answer does not say whether it held."""
    if given.get("if_not_exists"):
        return ", as far as it was not there"
    return ", if it was there" if given.get("if_exists") == "true" else ""


def _ports(name: str, container: str, mappings: Sequence[MappingAnswer], count: int) -> Described:
    ports = ", ".join(map(_ports_of, mappings[:_MAX_NAMED]))
    if count > _MAX_NAMED:
        ports += f" and {count - _MAX_NAMED} more"
    text = f"{name} {ports or 'no ports'} of {f'container {container}' if container else 'all containers'}"
    return Described(name, text, {"container": container, "ports": ports})


def _ports_of(mapping: MappingAnswer) -> str:
    """Return a mapping in short: `0.0.0.0:8000 -> 172.30.0.2:80/tcp`."""
    at = f"{format_host(mapping.container_address)}:" if mapping.container_address else ""
    host = f"{format_host(mapping.host_address)}:{mapping.host_ports}"
    return f"{host} -> {at}{mapping.container_ports}/{mapping.protocol}"


def _lease(mapping: PortMapping) -> tuple[str, dict[str, Field]]:
    ports = f"{format_host(mapping.host_address)}:{mapping.host_ports} -> "
    ports += f"{format_host(mapping.container)}:{mapping.container_ports}/{mapping.protocol}"
    return ports, {"container_address": mapping.container, "ports": ports}
