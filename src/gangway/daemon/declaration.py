"""What a file of conf.d may declare: networks, and the ports of containers, which need not exist yet.

    [[network]]
    name = "web"
    subnets = ["172.30.0.0/24", "fd30::/64"]

    [[publish]]
    container = "box"
    network = "web"
    ports = ["8000:80", "5060-5070:5060-5070/udp"]

What this file knows: which values are valid, alone and beside other files.  What it must not know: what there is on
the host.
"""

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import msgspec

from gangway.admission import parse_admitted, parse_subnet
from gangway.daemon.messages import NetworkRequest
from gangway.errors import InvalidRequest
from gangway.model import (
    DOCKER_PREFIX,
    Address,
    PortRequest,
    Source,
    check_container,
    parse_address,
    parse_port,
)

_Value = TypeVar("_Value")

_EXAMPLE_SUBNET = parse_subnet("172.30.0.0/24")  # stands for the subnets of a network that names none


class PublishTable(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A table `[[publish]]`."""

    container: str  # a name of ip-netns(8), a path, pid:PID or docker:NAME
    network: str | list[str] = ""
    """Which it is attached to if it is on none, the network of its ports first; `gangway0` if left out."""
    addresses: list[str] = []  # of the container: one for each subnet at most; in the others it gets a free one
    ports: list[str] = []  # each as after `-p`; without any the container is only attached
    admitted: list[str] = msgspec.field(default=[], name="from")  # the subnets of the clients that may connect


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """What one file says."""

    network: list[NetworkRequest] = []
    publish: list[PublishTable] = []


class DeclaredPort(NamedTuple):
    request: PortRequest
    file: str  # the path of the file that declares it


@dataclass(frozen=True)
class DeclaredContainer:
    """A container with its networks, none if none is named, and its ports: of one file, or of several."""

    name: str
    networks: tuple[str, ...]  # the first one is that of its ports
    addresses: frozenset[Address]
    file: str  # the first that declares it
    ports: tuple[DeclaredPort, ...] = ()

    @property
    def is_dockers(self) -> bool:
        return self.name.startswith(DOCKER_PREFIX)


class DeclaredNetwork(NamedTuple):
    request: NetworkRequest
    file: str


@dataclass(frozen=True)
class Declaration:
    """What all files declare, by name."""

    networks: Mapping[str, DeclaredNetwork] = field(default_factory=dict)
    containers: Mapping[str, DeclaredContainer] = field(default_factory=dict)
    unknown_networks: frozenset[str] = frozenset()  # files contradict each other: these are not removed
    unknown_containers: frozenset[str] = frozenset()  # likewise, nor are their ports

    def __bool__(self) -> bool:
        return bool(self.networks or self.containers)

    def without(self, other: "Declaration") -> "Declaration":
        """Leave out the networks and containers that another one declares, as if it were unknown what they are."""
        return Declaration(
            {name: one for name, one in self.networks.items() if name not in other.networks},
            {name: one for name, one in self.containers.items() if name not in other.containers},
            self.unknown_networks | other.networks.keys(),
            self.unknown_containers | other.containers.keys(),
        )


def parse_document(text: str, file: str) -> Document:
    """Read a file's text.  InvalidRequest names the file, the key and the reason, in one line."""
    try:
        document = msgspec.convert(tomllib.loads(text), Document)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidRequest(f"{file}: {error}") from None
    for network in document.network:
        with _naming(file, "network", network.name):
            network.network(subnets=() if network.subnets else (_EXAMPLE_SUBNET,))
    for table in document.publish:
        _container(table, file)
    return document


def merge(documents: Mapping[str, Document]) -> tuple[Declaration, list[str]]:
    """Return what files declare together, and what of it contradicts a file before it, line by line.

    Such an entry is left out, and it is unknown which of the two is meant.
    """
    networks = dict[str, DeclaredNetwork]()
    containers = dict[str, DeclaredContainer]()
    unknown_networks, unknown_containers = set[str](), set[str]()
    problems = list[str]()
    for file, document in documents.items():
        for request in document.network:
            if request.name in networks:
                other = networks[request.name].file
                unknown_networks.add(request.name)
                problems.append(f"{file}: network {request.name}: name: {other} declares this network already")
            else:
                networks[request.name] = DeclaredNetwork(request, file)
        for table in document.publish:
            found = _container(table, file)
            known = containers.get(found.name, found)
            if key := _contradiction(known, found):
                problems.append(f"{file}: publish {found.name}: {key}: {known.file} declares this container otherwise")
                unknown_containers.add(found.name)
                continue
            attached = known.networks or found.networks, known.addresses or found.addresses
            ports = _distinct((*known.ports, *found.ports))
            containers[found.name] = DeclaredContainer(known.name, *attached, known.file, ports)
    return Declaration(networks, containers, frozenset(unknown_networks), frozenset(unknown_containers)), problems


def networks_of(table: PublishTable) -> tuple[str, ...]:
    """Return the networks that a table names."""
    named = table.network
    return tuple(filter(None, [named] if isinstance(named, str) else named))


def document_text(document: Document) -> str:
    """Return a file's text, without the keys that have their default."""
    lines = list[str]()
    for name in Document.__struct_fields__:
        for table in getattr(document, name):
            lines += ["", f"[[{name}]]"]
            lines += (f"{key} = {_value(value)}" for key, value in msgspec.to_builtins(table).items())
    return "".join(f"{line}\n" for line in lines)


def _value(value: object) -> str:
    """Return a value as TOML has it, whose strings, lists and numbers are written as JSON's are."""
    return json.dumps(value, ensure_ascii=False)


def _container(table: PublishTable, file: str) -> DeclaredContainer:
    name = table.container
    is_dockers = name.startswith(DOCKER_PREFIX)
    with _naming(file, "publish", name):
        check_container(name, None)
        if is_dockers and (table.network or table.addresses):
            raise InvalidRequest(f"{'network' if table.network else 'addresses'}: Docker attaches this container")
        if name.startswith("pid:") and not name[4:].isdecimal():
            raise InvalidRequest(f"container: {name[4:]!r} is not a process id")
        networks = networks_of(table)
        if twice := next((one for one in networks if networks.count(one) > 1), ""):
            raise InvalidRequest(f"network: {twice} is named twice")
        addresses = frozenset(_each("addresses", table.addresses, parse_address))
        try:
            admitted = parse_admitted(table.admitted)
        except InvalidRequest as error:
            raise InvalidRequest(f"from: {error}") from None
        requests = _each("ports", table.ports, lambda text: tuple(parse_port(text, admitted).split_ports()))
        ports = (
            DeclaredPort(replace(request, source=Source.DECLARED), file) for split in requests for request in split
        )
        return DeclaredContainer(name, networks, addresses, file, _distinct(ports))


def _contradiction(one: DeclaredContainer, other: DeclaredContainer) -> str:
    """Return the key that two tables give different values; empty if there is none."""
    if one.networks and other.networks and one.networks != other.networks:
        return "network"
    return "addresses" if one.addresses and other.addresses and one.addresses != other.addresses else ""


def _distinct(ports: Iterable[DeclaredPort]) -> tuple[DeclaredPort, ...]:
    """Return the ports without those that an earlier one requests as well."""
    found = dict[PortRequest, DeclaredPort]()
    for port in ports:
        found.setdefault(port.request, port)
    return tuple(found.values())


def _each(key: str, texts: Iterable[str], parse: Callable[[str], _Value]) -> list[_Value]:
    try:
        return list(map(parse, texts))
    except InvalidRequest as error:
        raise InvalidRequest(f"{key}: {error}") from None


@contextmanager
def _naming(file: str, table: str, name: str) -> Iterator[None]:
    """Say which file and table an error is about."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{file}: {table} {name}: {error}") from None
