"""Puts the daemon's parts together."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gangway import __version__, runtime
from gangway.daemon import audit, supervisor
from gangway.daemon.commands import Commands
from gangway.daemon.config import Config, Loaded, later
from gangway.daemon.declared import Declared
from gangway.daemon.declared_files import DeclaredFiles
from gangway.daemon.docker_ports import DockerPorts
from gangway.daemon.doctor import checks, docker_check, limit_checks, setting_checks
from gangway.daemon.down import Down
from gangway.daemon.home import Home
from gangway.daemon.in_force import in_force
from gangway.daemon.messages import CheckAnswer, HealthAnswer, SettingAnswer, StatusAnswer, VersionAnswer
from gangway.daemon.overlaps import overlap_check
from gangway.ebpf.redirect import Redirect
from gangway.ebpf.steering import Steering
from gangway.errors import GangwayError
from gangway.facts import Firewall
from gangway.firewall.base import Driver
from gangway.firewall.choice import driver_for
from gangway.firewall.nat_guard import NatGuard
from gangway.host.events import Notices
from gangway.host.forwarding import ForwardingSwitch
from gangway.host.links import Links
from gangway.host.reserved_ports import RESERVED, ReservedPorts
from gangway.host.saved_settings import SavedSettings
from gangway.host.source_ports import RecentCount, busiest
from gangway.host.usage import BusiestSource, usages
from gangway.limits import LimitWatch, Usage
from gangway.log import LEVELS, Log
from gangway.log_targets import is_file, open_file
from gangway.model import parse_address, without_zone
from gangway.reconcile.controller import Controller
from gangway.reconcile.dataplane import TW_REUSE, WITHOUT_TW_REUSE, DataPlane
from gangway.reconcile.executor import Executor
from gangway.reconcile.observe import Observer
from gangway.reconcile.properties import BRIDGE_SETTINGS, WITHOUT_BRIDGE_SETTING
from gangway.relay.client import RelayClient
from gangway.state.adopted import Adopted
from gangway.state.adoption import Adoption
from gangway.state.database import Database
from gangway.state.leases import Leases
from gangway.state.registry import Registry
from gangway.state.requests import Requests

if TYPE_CHECKING:
    from gangway.daemon.handover import Handover
    from gangway.docker.watcher import Watcher


class Parts:
    """The parts of one daemon.  `close` changes nothing on the host: ports stay published."""

    def __init__(self, loaded: Loaded, home: Home, log: Log, notices: Notices, declared: Path) -> None:
        self._loaded = self._loaded_at_start = loaded
        self._relay_before: int | None = None  # the pid of the relay that runs with settings from before a reload
        config = self.config = loaded.config
        self._started_s = time.time()
        self.serves_docker = config.docker.enabled  # a change takes effect at the daemon's next start
        self.docker: Watcher | None = None  # if Docker's networks and ports are served, or its containers followed
        self._home, self._log, self._notices, self._guard = home, log, notices, NatGuard()
        self._database = Database(Path(config.state or runtime.default_state()), log.warning)
        self._settings = settings = SavedSettings(self._database, log.warning)
        relay = RelayClient(home.relay_path, config.relay_settings, partial(log.warning, event="relay-replacement"))
        relay.connect()
        no_rules = config.firewall == Firewall.NONE
        redirect = Redirect(relay, enabled=config.relay_settings.redirect, host_addresses=no_rules)
        if redirect.unavailable and config.relay_settings.redirect:
            log.warning(f"redirect unavailable: {redirect.unavailable}: clients of loopback addresses are relayed")
        steering = Steering(relay, lambda: redirect.auto_bound_fd, deferred=True)
        self.dataplane = DataPlane(relay, steering, redirect, settings)
        self.dataplane.reuse_ports = config.relay_settings.tcp_tw_reuse
        self._links = Links()
        self._registry = registry = Registry(self._database)
        self.observer = Observer(
            config,
            self._database,
            self._links,
            self.dataplane,
            registry.adopted_bridges,
            lambda: leases.has_any,
            notices.rules.follow_filters,
            notices.changed_among,
            self._owned_forward_chains,
        )
        forwarding = ForwardingSwitch(settings, self._links, lambda family: self._controller.filters(family))
        no_driver = Driver(notices.rules, self._guard)
        self._executor = executor = Executor(no_driver, self._links, self.dataplane, forwarding, self.observer.alias)
        self._reserved_ports, self._limits = ReservedPorts(settings, log.warning), LimitWatch()
        self._source_ports = RecentCount()
        self._controller = controller = Controller(
            self.observer, registry, executor, self._reserved_ports, self._driver_for, log
        )
        controller.update_addresses()
        former_flows = partial(executor.delete_flows, former=True)
        leases = Leases(registry.index, self.dataplane, self.observer.lease_facts, former_flows)
        self.requests = requests = Requests(controller, registry, executor, leases)
        parts = requests.repair, controller, registry, executor, leases
        self._adoption = Adoption(*parts, log.warning, lambda *what: log.write(audit.adopted(*what)))
        files = DeclaredFiles(declared)
        self.down = Down(requests, registry, self._adoption, self.dataplane, settings, self._database, files)
        self.ports = DockerPorts(lambda: self.config.docker.socket, self.serves_docker, requests, self._adoption)
        self.declared = Declared(files, requests, self.ports, log)
        self.commands = Commands(files, requests, self.ports)

    @property
    def is_idle(self) -> bool:
        """True if there is nothing to look after, now or when a container comes into being."""
        return self.requests.is_idle and not self.declared

    @property
    def follows_docker(self) -> bool:
        """True if Docker's containers have to be followed, because gangway is to publish ports of some."""
        return self.requests.follows_docker or self.declared.has_dockers

    def adopt(self, found: Adopted) -> None:
        """Serve what Docker has, or let published ports follow its containers.  GangwayError: to be tried again."""
        (self._adoption.adopt if self.serves_docker else self._adoption.follow)(found)
        self.declared.serve_dockers(frozenset(one.endpoint.container for one in found.containers))

    def check(self, since_s: float | None = None) -> None:
        """Repair what other programs have changed, and serve containers that have come into being."""
        self.requests.check(since_s)
        self.declared.serve_new()

    def _owned_forward_chains(self) -> frozenset[int]:
        return self._executor.driver.owned_forward_chains()

    def _driver_for(self, firewall: Firewall) -> Driver:
        nft, prefix = self.observer.tools.nft, self.config.chain_prefix
        return driver_for(firewall, nft, self._notices.rules, self._guard, self._database, self._settings, prefix)

    def reload(self, loaded: Loaded) -> None:
        """Use other settings, and open the log files again.  GangwayError, OSError: the former settings are in use."""
        former, config = self.config, loaded.config
        with ExitStack() as stack:
            fd = None
            if config.log == former.log and is_file(config.log):
                fd = open_file(config.log)
                stack.callback(os.close, fd)
            self.observer.use(config)
            try:
                self._controller.reload()
            except GangwayError:
                self.observer.use(former)
                raise
            self.config, self._loaded = config, loaded
            if config.relay_settings != former.relay_settings:
                self._relay_before = self.dataplane.relay.pid
            self._home.set_groups(config.group_ids)
            self.dataplane.relay.settings = config.relay_settings
            self.dataplane.reuse_ports = config.relay_settings.tcp_tw_reuse
            self._log.level = LEVELS[config.log_level]
            if fd is not None:
                self._log.use(fd)
                self.dataplane.relay.use_log(fd)
        self._log.info("settings reloaded" + "".join(_later(former, config)), event="reloaded")
        self._log.write(audit.settings(config))
        for text in loaded.warnings:
            self._log.warning(text)

    def checks(self) -> Iterator[CheckAnswer]:
        facts, leases = self.requests.facts, len(self.requests.leases)
        yield from checks(self.observer.tools, facts, self.dataplane, self._guard, leases, self._executor.driver)
        yield docker_check(self.docker, self.serves_docker)
        yield from limit_checks(self._usages())
        yield from setting_checks(self._wanted_settings())
        if note := self._reserved_ports.refused:
            yield CheckAnswer(f"setting: {RESERVED}", False, note)
        orphans = self.observer.orphaned_links()
        note = f"{', '.join(orphans)}: gangway cleanup deletes them" if orphans else ""
        yield CheckAnswer("no links of a daemon whose database is lost", not orphans, note)
        mappings = [one.mapping for one in self._registry.mappings()]  # Docker has rules of its own for leases
        own = [without_zone(parse_address(one)) for one in self._links.addresses()]
        yield overlap_check(self.observer.tools, facts, mappings, own, self.config.chain_prefix)

    def status(self) -> StatusAnswer:
        """Return the daemon's and the relay's versions and processes, and how much they manage."""
        relay, registry = self.dataplane.relay, self._registry
        return StatusAnswer(
            version=__version__,
            pid=os.getpid(),
            started=self._started_s,
            is_service=supervisor.is_supervised(),
            on_demand=self._home.on_demand,
            folder=str(self._home.folder),
            socket=str(self._home.api_path),
            relay_version=relay.release,
            relay_pid=relay.pid,
            networks=len(registry.networks),
            containers=len(registry.containers),
            mappings=len(registry.mappings()),
            leases=len(self.requests.leases),
        )

    def settings(self) -> list[SettingAnswer]:
        """Return the settings in force, and of those that take effect later, what they are going to be."""
        return [*in_force(self._loaded_at_start, self._loaded, self._relay_before == self.dataplane.relay.pid)]

    def version(self) -> VersionAnswer:
        relay = self.dataplane.relay
        return VersionAnswer(__version__, relay.release if relay.pid is not None else "")

    def health(self) -> HealthAnswer:
        """Return whether everything that is wanted is applied, as far as is known: nobody is asked."""
        reasons = list(self._controller.problems)
        if self.requests.leases.is_incomplete:
            reasons.append("the relay does not serve all ports of docker-proxy launchers")
        if self.requests.orphans:
            reasons.append(f"the database is lost, and these links are left: {', '.join(self.requests.orphans)}")
        if self.docker is not None and self.docker.problem:
            reasons.append(self.docker.problem)
        reasons += self.declared.problems()
        return HealthAnswer(not reasons, reasons)

    def handover(self) -> "Handover":
        from gangway.daemon.docker_rules import DockerRules  # few daemons need these
        from gangway.daemon.handover import Handover

        nft, bridges = lambda: self.observer.tools.nft, self._registry.adopted_bridges
        rules = DockerRules(nft, self._database, self._settings, bridges)
        return Handover(lambda: self.config, rules, lambda: self.serves_docker)

    def _wanted_settings(self) -> Iterator[tuple[str, str, str]]:
        """Yield the sysctls that no road depends on: name, value, and the consequence of another value."""
        if self.dataplane.reuse_ports:
            yield TW_REUSE, "1", WITHOUT_TW_REUSE
        for network in (one for one in self._registry.networks if not one.is_adopted):
            for name, value in BRIDGE_SETTINGS.items():
                yield f"net/ipv6/conf/{network.bridge}/{name}", value, WITHOUT_BRIDGE_SETTING[name]

    def check_thoroughly(self) -> None:
        """Repair what other programs have changed, of which the kernel need not have notified us."""
        self.requests.check_thoroughly()
        self.declared.retry()
        if self.requests.is_ready:
            self._adoption.isolate()

    def check_limits(self) -> None:
        """Log limits of the kernel that are nearly reached, and those that no longer are."""
        for text in self._limits.update(self._usages(self._source_ports.busiest)):
            self._log.warning(text)

    def _usages(self, busiest_source: BusiestSource = busiest) -> Iterator[Usage]:
        ports = self._reserved_ports.local_ports()
        return usages(self.dataplane.relay.pid, ports, self._container_addresses, busiest_source)

    def _container_addresses(self) -> set[str]:
        return {str(one.container_address) for one in (*self._registry.mappings(), *self.requests.leases.planned())}

    def stop_if_idle(self) -> bool:
        """Stop the relay if there is nothing to look after.  False: there is, or it failed."""
        try:
            return self.is_idle and self.dataplane.stop_if_unused()
        except Exception as error:
            self._log.warning(f"the relay could not be stopped: {error}")
            return False

    def take_down(self) -> list[str]:
        """Remove everything of gangway's; return what was removed.  The daemon has to end then.

        Conflict, HostRefused: something is left, which is managed as before.
        """
        removed = self.down.carry_out()
        self.declared.end()
        self._database.delete()
        if self._database.path == Path(runtime.HOST_STATE):
            with suppress(OSError):  # it has something else
                self._database.path.parent.rmdir()
        self._home.leave_for_good()
        return removed

    def close(self) -> None:
        self.stop_if_idle()
        self._guard.stop()
        self._links.close()
        self.dataplane.close()
        self.observer.tools.close()
        self._database.close()


def _later(former: Config, now: Config) -> Iterator[str]:
    """Yield what to log about changed settings that take effect later."""
    by_time: dict[str, list[str]] = {}
    for name, when in later(former, now).items():
        table = name.rpartition(".")[0]
        by_time.setdefault(when, []).append(f"[{table}]" if table else name)
    for when, names in by_time.items():
        yield f"; {' and '.join(dict.fromkeys(names))}: {when}"
