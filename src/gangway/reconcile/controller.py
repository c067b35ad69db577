"""This host, as it is found and as it is kept: the facts, the rules that stand, and putting right what is not.

What this file knows: when everything is to be decided and compared anew.  What it must not know: requests, how a step
is carried out.

How it works.  `reconcile` compares all that is wanted with all that there is, and may be called at any time.  `check`
only looks whether it should be: after a notice of the kernel's, unless it is of rules of our own (`check_rules`), and,
`thorough`, now and then, for what gives no notice.  Both do what they can: what fails is logged, and the next one tries
again.  A request first has put right what others did (`prepare`: the rules, the relay, the container that it is about),
then carries out its own small difference, and settles what it decided.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from secrets import token_hex

from gangway.daemon.config import Config
from gangway.daemon.doctor import Check, checks
from gangway.ebpf.daemon_redirect import Redirects
from gangway.ebpf.daemon_steering import Steered
from gangway.errors import GangwayError, HostRefused
from gangway.firewall.base import driver_for
from gangway.host import events, netns
from gangway.host.forwarding import ForwardingSwitch
from gangway.host.links import Link, Links
from gangway.host.reserved_ports import ReservedPorts
from gangway.host.saved_settings import SavedSettings
from gangway.log import Log
from gangway.plan import FORWARDING_SETTING, Firewall, HostFacts, MappingPlan, Plan
from gangway.reconcile import observe as facts
from gangway.reconcile.diff import (
    Entries,
    Ports,
    State,
    Step,
    Verb,
    diff,
    link_name,
    ports_of,
    redirects_of,
    steered_of,
)
from gangway.reconcile.executor import Executor
from gangway.relay.client import Relay
from gangway.state.database import Database
from gangway.state.registry import Registry


class Controller:
    """The host of one daemon."""

    def __init__(self, config: Config, store: Database, relay: Relay, log: Log) -> None:
        self._config = config
        self._database = store
        self._relay = relay
        self._log = log
        self._tools = facts.Tools()
        self._links = Links()
        self._alias = f"gangway {_identity(store)}"
        self._saved = SavedSettings(store, self._warn)
        self._reserved_ports = ReservedPorts(self._saved, self._warn)
        self._forwarding = ForwardingSwitch(self._saved, self._links, self._filters)
        self._chains = facts.others(self._tools.nft)
        relay.find()
        self.steered = Steered(relay)
        wanted, of_host = config.relay_settings.redirect, config.firewall == Firewall.NONE
        self._redirects = Redirects(relay, wanted, of_host, lambda: self.steered.lent_fd)
        self.facts = self._gather()
        self._plan: Plan | None = None
        """Whose rules stand, as far as networks and facts go."""
        self._unfinished = False
        """Something could not be done when it was tried last."""
        self._told: set[str] = set()
        """What was said about that."""
        rules = driver_for(self.facts.firewall, self._tools.nft, store, self._saved, config.chain_prefix)
        self.executor = Executor(
            rules, self._redirects, self.steered, self._links, relay, self._saved, self._forwarding, self._alias
        )
        self.executor.reuse_ports = config.relay_settings.tcp_tw_reuse
        self.registry = Registry(store, self.facts)

    def close(self) -> None:
        """Lets go of sockets; changes nothing."""
        self._links.close()
        self._redirects.close()
        self.steered.close()
        self._relay.close()
        if self._tools.nft is not None:
            self._tools.nft.close()

    def checks(self) -> tuple[Check, ...]:
        """What this host can do."""
        return tuple(checks(self._tools, self.facts, self._redirects.is_intact(), self.steered.is_intact()))

    def prepare(self, container: str | None = None) -> None:
        """What others have done meanwhile is put right before a request, about a container perhaps, adds to it."""
        if container is not None and self.registry.has_endpoint(container) and self.is_gone(container):
            self._withdraw(container)
        changed = events.generation() != self.executor.rules.generation or not self._relay.lives()
        if (changed or self._plan is None) and self.registry.networks:
            self.check()

    def carry_out(self, before: State, after: State) -> None:
        """The difference, all of it or nothing."""
        self._reserved_ports.add(_steered(after.mappings.values()))  # first: the kernel may choose at any moment
        try:
            self.executor.carry_out(diff(before, after))
        except BaseException:
            self._no_more(after)
            raise
        self._no_more(before)

    def _no_more(self, withdrawn: State) -> None:
        """What is published by some mappings is not any more."""
        if withdrawn.steered:
            left = (one for one in self.registry.mappings() if str(one.mapping) not in withdrawn.mappings)
            self._reserved_ports.set(_steered(left))

    def take_down(self, before: State) -> None:
        """The same, to nothing.  What is not there any more as it should be is made so first: then it can go."""
        try:
            self.carry_out(before, State())
        except HostRefused:
            self._plan = None
            self.reconcile()
            self.carry_out(before, State())

    def settle(self, whole: Plan | None) -> None:
        """The rules of a plan stand now."""
        self._plan = whole
        self._learn_addresses()
        self.facts = self._gather()
        self.registry.decide(self.facts)
        if whole is None:
            self._attempt(self.executor.put_back_ports)

    def check(self, thorough: bool = False) -> None:
        """Looks whether somebody else has changed something, and if so puts it right."""
        if self.registry.networks:
            if thorough:
                self._attempt(self.steered.take_back)
            self._look_at_others(thorough)
            self._learn_addresses()
            self.withdraw_what_is_gone()
            if self._unfinished or self._gather() != self.facts or self._is_disturbed(thorough):
                self.reconcile()

    def check_rules(self) -> None:
        """The same, if the rules are not as our last change has left them: each of ours gives notice, too."""
        if self._unfinished or events.generation() != self.executor.rules.generation:
            self.check()

    def reconcile(self) -> None:
        """Makes what is what should be."""
        self._unfinished = False
        told, self._told = self._told, set()
        self._attempt(self.steered.mend, told)
        self._attempt(self._redirects.mend, told)
        self._look_at_others()
        self._refresh()
        self.withdraw_what_is_gone()
        for network in [network.name for network in self.registry.networks if self.registry.is_unneeded(network.name)]:
            self.registry.remove_network(network)
            self._plan = None
        whole = self.registry.plan()
        stand = self._plan is not None and self.executor.rules.is_intact(lambda: whole)
        before = replace(self.executor.found(), plan=whole if stand else None, forwarding=self._ours(whole))
        wanted = self.registry.state(whole) if whole is not None else State()
        undone: list[Step] = []
        for step in diff(before, wanted):
            for part in _parts(step, self._lost(undone, whole)):
                if not self._attempt(partial(self.executor.do, part), told):
                    undone.append(part)
        for lost in self._lost(undone, whole):
            self._redirects.erase(redirects_of(lost))
            self.steered.unsteer(steered_of(lost))
        self._reserved_ports.set(_steered(self.registry.mappings()))
        if whole is None:
            self._attempt(self.executor.rules.remove, told)
        self.settle(whole)

    def is_gone(self, container: str) -> bool:
        """Its namespace has ended, and the attachment with it; or its name is another's now."""
        return bool(self._gone([container]))

    def withdraw_what_is_gone(self) -> bool:
        """Withdraws the containers whose namespace has ended; whether there was one."""
        gone = self._gone([one.container for one in self.registry.endpoints()])
        for container in gone:
            self._withdraw(container)
        return bool(gone)

    def _gone(self, containers: Iterable[str]) -> list[str]:
        away = [one for one in containers if not netns.is_there(*self.registry.place(one))]
        attached = self._links.all() if away else {}
        return [one for one in away if netns.is_another(*self.registry.place(one)) or link_name(one) not in attached]

    def _withdraw(self, container: str) -> None:
        self._warn(f"container {container} is gone: its ports are withdrawn")
        state = self.registry.state_of_container(container)
        try:
            self.executor.carry_out(diff(state, State()))
        except (GangwayError, ExceptionGroup):
            self._plan = None  # what is left of it goes when everything is compared
        self._no_more(state)
        network = self.registry.network_of(container).name
        self.registry.remove_endpoint(container)
        if self.registry.is_unneeded(network):
            self._plan = None

    def _look_at_others(self, thorough: bool = False) -> None:
        """Only if the rules were changed by somebody else, or may have been unnoticed: it takes a while."""
        if thorough or events.generation() != self.executor.rules.generation:
            self._chains = facts.others(self._tools.nft)

    def _filters(self, family: int) -> Collection[str]:
        """Other programs' chains for what is forwarded; one that has our rules only is not another's."""
        found = set(self._chains[family])
        if self.facts.firewall is Firewall.IPTABLES:
            found -= set(facts.shared_chains(family))
            if self.executor.rules.shares_forward_chain(family):
                found.add(facts.shared_chains(family)[0])
        return found

    def _gather(self) -> HostFacts:
        switched_on, lacking = self._forwarding.enabled_by_us, (self._redirects.lacking, self.steered.lacking)
        return facts.gather(self._config, self._tools, self._chains, self._foreign_bridges, switched_on, *lacking)

    def _foreign_bridges(self) -> list[Link]:
        return [link for link in self._links.bridges() if not link.alias.startswith(self._alias)]

    def _refresh(self) -> None:
        """Looks at the host again; with other facts everything is decided anew, another firewall perhaps."""
        now = self._gather()
        if now == self.facts and self._plan is not None:
            return
        for text in _notes(self.facts, now, self._plan):
            self._warn(text)
        if now.firewall is not self.facts.firewall:
            prefix = self._config.chain_prefix
            self.executor.rules = driver_for(now.firewall, self._tools.nft, self._database, self._saved, prefix)
        self.facts, self._plan = now, None
        self.registry.decide(now)

    def _is_disturbed(self, thorough: bool) -> bool:
        """Something of ours is not there any more, or not as it was."""
        if self._plan is None or not self._relay.lives():
            return True
        if not self.executor.rules.is_intact(self.registry.plan, thorough):
            return True
        if thorough and not (
            self._redirects.is_intact() and self.steered.is_intact() and self._reserved_ports.is_intact()
        ):
            return True
        bridges = {network.bridge for network in self.registry.networks}
        return self.executor.links() != bridges | {link_name(one.container) for one in self.registry.endpoints()}

    def _ours(self, whole: Plan | None) -> frozenset[int]:
        """The families that are forwarded and that it is ours to stop: others may need what we have no need of."""
        wanted = whole.forwarding if whole is not None else frozenset()
        return self.facts.forwarding & (self.facts.switched_on | wanted)

    def _lost(self, undone: Sequence[Step], whole: Plan | None) -> list[MappingPlan]:
        """The mappings of which a port could not be had.  It is somebody else's, and so are those who ask it."""
        lost = {ports for step in undone if isinstance(step.what, Ports) for ports, _ in step.what.of}
        if whole is None or not lost:
            return []
        return [planned for planned in whole.mappings if any(ports in lost for ports, _ in ports_of(planned))]

    def _learn_addresses(self) -> None:
        self._attempt(lambda: self._redirects.learn_addresses(self._links.addresses))

    def _attempt(self, call: Callable[[], None], told: Collection[str] = ()) -> bool:
        """Whether it could be done.  What cannot be is tried again; what was told before is not told again."""
        done = True
        try:
            call()
        except* GangwayError as errors:
            self._unfinished, done = True, False
            for text in map(str, _flat(errors)):
                if text not in told:
                    self._warn(text)
                self._told.add(text)
        return done

    def _warn(self, text: str) -> None:
        self._log.warning(text.replace("%", "%%"))


def _identity(store: Database) -> str:
    """What tells the links of a daemon with this state from another's."""
    found = store.recall("identity")
    if found is None:
        found = token_hex(4)
        store.remember("identity", found)
    return found


def _flat(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        else:
            yield error


def _steered(plans: Iterable[MappingPlan]) -> Iterator[tuple[int, int]]:
    """The host ports of those that no socket keeps from being anybody's."""
    return ((one.mapping.host_ports.first, one.mapping.host_ports.last) for one in plans if one.is_steered)


def _notes(before: HostFacts, now: HostFacts, whole: Plan | None) -> Iterable[str]:
    """What an operator should know of a change that somebody else has made."""
    needed = whole.forwarding if whole is not None and now.may_forward else before.forwarding
    for family in sorted((before.forwarding - now.forwarding) & needed):
        then = "it is switched on again" if now.may_forward else "what it carried goes by relay"
        yield f"{FORWARDING_SETTING[family]} was switched off by somebody else: {then}"
    for family, who in now.forward_droppers:
        if before.dropper(family) != who:
            yield f"{who} drops what is forwarded (IPv{family}): what it carried goes by relay"
    if before.firewall is not now.firewall:
        yield f"the firewall is {now.firewall} from now on: another program's rules leave no other way"


def _parts(step: Step, lost: Sequence[MappingPlan]) -> Iterator[Step]:
    """Ports one by one: that one cannot be had is no reason to do without the others.  Nobody is led to those that are
    lost."""
    match step.verb, step.what:
        case _, Ports(of):
            yield from (Step(step.verb, Ports((one,))) for one in of)
        case ((Verb.STEER | Verb.ENTER), Entries(of)):
            nobody = {key for planned in lost for key, _ in (*steered_of(planned), *redirects_of(planned))}
            yield Step(step.verb, Entries(tuple(entry for entry in of if entry[0] not in nobody)))
        case _:
            yield step
