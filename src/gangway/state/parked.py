"""Ports that `gangway publish` has added to Docker's containers, while these do not run; by the containers' ids."""

import json
from collections.abc import Collection, Iterable
from contextlib import suppress

from gangway.admission import parse_admitted
from gangway.errors import InvalidRequest
from gangway.model import PortMapping, parse_port
from gangway.state.database import Database

_KEY = "parked"


class ParkedPorts:
    """The ports of containers that are stopped or being restarted; they are in the database, too."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._texts: dict[str, list[str]] = {}
        with suppress(ValueError):
            self._texts = json.loads(database.recall(_KEY) or "{}")

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, docker_id: str) -> bool:
        return docker_id in self._texts

    def of(self, docker_id: str, name: str) -> list[PortMapping]:
        """Return the ports to publish when a container runs again, by the name that it has then."""
        found = []
        for text in self._texts.get(docker_id, ()):
            with suppress(InvalidRequest):  # the database is damaged
                port, _, admitted = text.partition(" ")
                request = parse_port(port)
                if request.host_ports is not None:
                    ports = request.host_addresses[0], request.host_ports, request.container_ports
                    clients = parse_admitted(admitted.split())
                    found.append(PortMapping(name, request.protocol, *ports, admitted=clients))
        return found

    def park(self, docker_id: str, mappings: Iterable[PortMapping]) -> None:
        """Keep the ports of a container that does not run any more."""
        if texts := [" ".join(map(str, (one, *one.admitted))) for one in mappings]:
            self._write(self._texts | {docker_id: texts})

    def retain(self, docker_ids: Collection[str]) -> None:
        """Forget the ports of all other containers: they were removed, or their ports are published again."""
        left = {one: texts for one, texts in self._texts.items() if one in docker_ids}
        if left != self._texts:
            self._write(left)

    def _write(self, texts: dict[str, list[str]]) -> None:
        self._database.remember(_KEY, json.dumps(texts))
        self._texts = texts
