"""`gangway down`: removes everything of gangway's in this network namespace.

Containers and networks are removed one after the other, each as a whole: what a failure leaves is managed as before.
"""

import os
from collections.abc import Callable, Iterator, Sequence

from gangway.daemon import supervisor
from gangway.daemon.declared_files import DeclaredFiles
from gangway.daemon.processes import relays, terminate
from gangway.docker import settings_file
from gangway.errors import Conflict, GangwayError, HostRefused
from gangway.firewall.iptables import timeouts
from gangway.host.saved_settings import SavedSettings
from gangway.reconcile.dataplane import DataPlane
from gangway.state.adopted import Adopted
from gangway.state.adoption import Adoption
from gangway.state.database import Database, copies_of
from gangway.state.registry import Registry
from gangway.state.requests import Requests

_MOST_NAMES = 5


class Down:
    """What is to be removed with the daemon."""

    def __init__(
        self,
        requests: Requests,
        registry: Registry,
        adoption: Adoption,
        dataplane: DataPlane,
        settings: SavedSettings,
        database: Database,
        declared: DeclaredFiles,
        relays: Callable[[], Sequence[int]] = relays,
    ) -> None:
        self._requests, self._registry, self._adoption = requests, registry, adoption
        self._dataplane, self._settings, self._database = dataplane, settings, database
        self._declared, self._relays = declared, relays

    def planned(self) -> list[str]:
        """Return what would be removed, line by line.  Conflict: nothing would, because of launchers."""
        self._require_no_leases()
        return [
            *self._managed(),
            *(f"saved setting, restored: {name}" for name in self._settings.unrestored()),
            *(f"relay (pid {relay})" for relay in self._relays()),
            f"daemon (pid {os.getpid()})",
            f"database {self._database.path}",
        ]

    def advice(self) -> list[str]:
        """Return what stays, or comes again, and what to do about it, line by line."""
        backup = settings_file.SettingsFile(settings_file.DEFAULT).backup
        found = [f"kept: {copy}, a damaged database" for copy in copies_of(self._database.path)]
        found += (f"kept: {path}, which the next daemon serves again: delete it" for path in self._declared.paths())
        if backup.exists():
            found.append(f"gangway docker disable restores {settings_file.DEFAULT}: dockerd publishes its ports again")
        if supervisor.is_supervised():
            found.append("systemctl disable --now gangway keeps systemd from starting a daemon again")
        return found

    def carry_out(self) -> list[str]:
        """Remove everything but daemon and database; return what was removed, with these.

        Conflict: launchers run, and nothing was removed.  HostRefused: something could not be; the text names all that
        is left.
        """
        planned = self.planned()
        try:
            self._remove()
        except (GangwayError, ExceptionGroup) as error:
            left = "; ".join(self._managed()) or "the relay, or saved settings"
            raise HostRefused(f"{error}; left, and managed as before: {left}") from None
        return planned

    def _remove(self) -> None:
        requests, registry = self._requests, self._registry
        if requests.orphans:
            requests.clean_up()
        own = [one for one in registry.endpoints() if not registry.network(one.network).is_adopted]
        for container in dict.fromkeys(one.container for one in own):
            self._detach(container)
        for network in registry.networks:
            if not network.is_adopted:
                self._remove_network(network.name)
        if registry.networks or registry.parked:
            self._adoption.adopt(Adopted())
        for name in self._settings.unrestored():
            self._settings.restore(name)
        if left := self._settings.unrestored():
            raise HostRefused(f"cannot be restored: {', '.join(left)}")
        if not self._dataplane.stop_if_unused():
            raise Conflict("the relay serves ports of docker-proxy launchers")
        timeouts.delete()  # there are some as soon as the firewall is iptables
        # They would wait for another daemon for some seconds, or for the end of their connections.
        if stuck := [relay for relay in self._relays() if not terminate(relay)]:
            raise HostRefused(f"the relay (pid {stuck[0]}) does not end: kill it")

    def _detach(self, container: str) -> None:
        try:
            self._requests.detach(container)
        except Conflict:  # it was found dead meanwhile, and removed
            if self._registry.has_endpoint(container):
                raise

    def _remove_network(self, name: str) -> None:
        try:
            self._requests.remove_network(name)
        except Conflict:  # it was made on demand, and removed with such a container
            if name in {one.name for one in self._registry.networks}:
                raise

    def _managed(self) -> Iterator[str]:
        """Yield the networks and containers, line by line."""
        registry = self._registry
        if self._requests.orphans:
            yield f"links of a daemon whose database is lost, and their rules: {', '.join(self._requests.orphans)}"
        for network in registry.networks:
            yield f"network {network.name}" + (" (rules only: it is Docker's)" if network.is_adopted else "")
            for endpoint in registry.endpoints(network.name):
                mappings = (one.mapping for one in registry.mappings(endpoint.container))
                count = sum(ports.count for _, ports in {(one.protocol, one.host_ports) for one in mappings})
                ports = f", {count} published port{'s' * (count != 1)}" if endpoint.is_first else ""
                yield f"container {endpoint.container} on it{ports}"
        for mapping in registry.waiting():
            yield f"port {mapping}, which waits for {mapping.container}"

    def _require_no_leases(self) -> None:
        leases = self._requests.leases
        if leases.has_any:
            ports = [str(one.mapping) for one in leases.planned()]
            named = ", ".join(ports[:_MOST_NAMES]) + (", …" if len(ports) > _MOST_NAMES else "")
            raise Conflict(
                f"nothing was removed: docker-proxy launchers have ports ({named or 'of an earlier daemon'}), and "
                "would start a daemon again; stop the containers that publish them, or name another "
                "userland-proxy-path in daemon.json and restart dockerd"
            )
