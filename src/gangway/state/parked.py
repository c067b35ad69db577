"""Ports that `gangway publish` has added to Docker's containers, while these do not run; by the containers' ids."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress

from gangway.admission import parse_admitted
from gangway.errors import InvalidRequest
from gangway.model import DOCKER_PREFIX, PortMapping, parse_port
from gangway.state.database import Database

_KEY = "parked"


class ParkedPorts:
    """The ports of containers that are stopped or being restarted; they are in the database, too.

    A container that runs is among them if one of its ports could not be published again.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._texts: dict[str, list[str]] = {}  # the container's name, then its ports, each with admitted clients
        with suppress(ValueError):
            stored = json.loads(database.recall(_KEY) or "{}")
            self._texts = {one: _with_name(texts) for one, texts in stored.items()}

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, docker_id: str) -> bool:
        return docker_id in self._texts

    def all(self) -> list[PortMapping]:
        """Return the ports of all containers, by the names that these had last.  It may be called from any thread."""
        texts = self._texts
        return [mapping for docker_id in texts for mapping in _parse(*texts[docker_id])]

    def of(self, docker_id: str, name: str) -> list[PortMapping]:
        """Return the ports to publish when a container runs again, by the name that it has then."""
        return _parse(name, *self._texts.get(docker_id, [""])[1:])

    def park(self, docker_id: str, name: str, mappings: Iterable[PortMapping]) -> None:
        """Keep ports of a container that does not run any more, beside those that it has here already.

        A port that is here with other admitted clients is replaced: it has been published again since.
        """
        texts = [*self._texts.get(docker_id, [name])[1:], *map(_text, mappings)]
        if texts:
            self._write(self._texts | {docker_id: [name, *{_port(text): text for text in texts}.values()]})

    def remove(self, mappings: Iterable[PortMapping]) -> None:
        """Forget ports, whoever may be admitted there: they were unpublished, or published anew."""
        removed = {(one.container, str(one)) for one in mappings}
        left = {
            docker_id: [name, *(text for text in texts if (name, _port(text)) not in removed)]
            for docker_id, (name, *texts) in self._texts.items()
        }
        self._replace({docker_id: texts for docker_id, texts in left.items() if len(texts) > 1})

    def retain(self, names: Mapping[str, str]) -> None:
        """Forget the ports of all other containers, which were removed or have their ports; rename these."""
        self._replace({one: [names[one], *texts[1:]] for one, texts in self._texts.items() if one in names})

    def _replace(self, texts: dict[str, list[str]]) -> None:
        if texts != self._texts:
            self._write(texts)

    def _write(self, texts: dict[str, list[str]]) -> None:
        self._database.remember(_KEY, json.dumps(texts))
        self._texts = texts


def _text(mapping: PortMapping) -> str:
    return " ".join(map(str, (mapping, *mapping.admitted)))


def _port(text: str) -> str:
    """Return a port without its admitted clients."""
    return text.partition(" ")[0]


def _parse(name: str, *texts: str) -> list[PortMapping]:
    found = []
    for text in texts:
        with suppress(InvalidRequest):  # the database is damaged
            port, _, admitted = text.partition(" ")
            request = parse_port(port)
            if request.host_ports is not None:
                ports = request.host_addresses[0], request.host_ports, request.container_ports
                clients = parse_admitted(admitted.split())
                found.append(PortMapping(name, request.protocol, *ports, admitted=clients))
    return found


def _with_name(texts: list[str]) -> list[str]:
    """Return what is stored of a container; a daemon of an earlier version did not store its name."""
    return texts if texts and texts[0].startswith(DOCKER_PREFIX) else ["", *texts]
