"""Puts the daemon's parts together."""

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from gangway import runtime
from gangway.daemon.config import Config
from gangway.daemon.doctor import Check, checks
from gangway.daemon.home import Home
from gangway.ebpf.redirect import Redirect
from gangway.ebpf.steering import Steering
from gangway.errors import GangwayError
from gangway.firewall.base import Driver, driver_for
from gangway.host.forwarding import ForwardingSwitch
from gangway.host.links import Links
from gangway.host.reserved_ports import ReservedPorts
from gangway.host.saved_settings import SavedSettings
from gangway.log import Log
from gangway.plan import Firewall
from gangway.reconcile.controller import Controller
from gangway.reconcile.dataplane import DataPlane
from gangway.reconcile.executor import Executor
from gangway.reconcile.observe import Observer
from gangway.relay.client import RelayClient
from gangway.state.database import Database
from gangway.state.leases import Leases
from gangway.state.registry import Registry
from gangway.state.requests import Requests


class Parts:
    """The parts of one daemon.  `close` leaves everything as it is: published ports go on."""

    def __init__(self, config: Config, home: Home, log: Log) -> None:
        def warn(text: str) -> None:
            log.warning("%s", text)

        self.config = config
        self._database = Database(Path(config.state or runtime.default_state()))
        self._settings = settings = SavedSettings(self._database, warn)
        relay = RelayClient(home.relay_path, config.relay_settings)
        relay.connect()
        redirect = Redirect(
            relay,
            enabled=config.relay_settings.redirect,
            host_addresses=config.firewall == Firewall.NONE,
        )
        steering = Steering(relay, lambda: redirect.auto_bound_fd, deferred=True)
        self.dataplane = DataPlane(relay, steering, redirect, settings)
        self.dataplane.reuse_ports = config.relay_settings.tcp_tw_reuse
        self._links = Links()
        self.observer = Observer(config, self._database, self._links, self.dataplane)
        forwarding = ForwardingSwitch(settings, self._links, self._forward_filters)
        executor = Executor(self._links, self.dataplane, forwarding, self.observer.alias)
        registry = Registry(self._database)
        self._controller = controller = Controller(
            self.observer, registry, executor, ReservedPorts(settings, warn), self._driver_for, log
        )
        leases = Leases(registry.index, self.dataplane, self.observer.lease_facts)
        self.requests = Requests(controller, registry, executor, leases)

    def _driver_for(self, firewall: Firewall) -> Driver:
        nft, prefix = self.observer.tools.nft, self.config.chain_prefix
        return driver_for(firewall, nft, self._database, self._settings, prefix)

    def _forward_filters(self, family: int) -> Collection[str]:
        return self._controller.filters(family)

    def checks(self) -> Iterator[Check]:
        """Yield what `gangway doctor` shows."""
        return checks(self.observer.tools, self.requests.facts, self.dataplane, len(self.requests.leases))

    def stop_if_idle(self) -> None:
        """Stop the relay if there is nothing to look after."""
        if self.requests.is_idle:
            with suppress(GangwayError):
                self.dataplane.stop_if_unused()

    def close(self) -> None:
        """Close sockets and files."""
        self._links.close()
        self.dataplane.close()
        self.observer.close()
        self._database.close()
