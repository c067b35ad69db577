"""This host, as it is found and as it is kept: the facts, the rules that stand, and putting right what is not.

What this file knows: when everything is to be decided and compared anew.  What it must not know: requests, how a step
is carried out.

How it works.  `reconcile` compares all that is wanted with all that there is, and may be called at any time.  `check`
only looks whether it should be, after each notice of the kernel's.  Both do what they can: what fails is logged, and
the next one tries again.  Requests `carry_out` their own small differences, and `settle` what they decided.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from gangway.daemon import facts
from gangway.daemon.borrowed import Borrowed
from gangway.daemon.config import Config
from gangway.daemon.hands import Hands
from gangway.daemon.ledger import Ledger
from gangway.daemon.reconcile import Ports, State, Step, diff, link_name
from gangway.daemon.relay import Relay
from gangway.daemon.rules import rules_for
from gangway.daemon.store import Store
from gangway.errors import GangwayError
from gangway.firewall import apply
from gangway.kernel import events, netns, probe
from gangway.kernel.netlink import Links
from gangway.plan import FORWARDING_SETTING, HostFacts, Plan
from gangway.relay.log import Log


class Upkeep:
    """The host of one daemon."""

    def __init__(self, config: Config, store: Store, relay: Relay, log: Log) -> None:
        self._config = config
        self._store = store
        self._relay = relay
        self._log = log
        self._borrowed = Borrowed(store)
        self._nft = apply.Nftables.if_there()
        self._links = Links()
        self._chains = facts.others(self._nft)
        self.facts = self._gather()
        self._plan: Plan | None = None
        """Whose rules stand, as far as networks and facts go."""
        relay.find()
        rules = rules_for(self.facts.firewall, self._nft, store, config.chain_prefix)
        self.hands = Hands(rules, self._links, relay, self._borrowed, config.relay_settings.tcp_tw_reuse)
        self.ledger = Ledger(store, self.facts)

    def close(self) -> None:
        """Lets go of sockets; changes nothing."""
        self._links.close()
        self._relay.close()
        if self._nft is not None:
            self._nft.close()

    def carry_out(self, before: State, after: State) -> None:
        """The difference, all of it or nothing.  Rules that somebody else has taken away are put back before."""
        if self._plan is not None and not self.hands.rules.are_intact():
            self.reconcile()
        self.hands.carry_out(diff(before, after))

    def settle(self, whole: Plan | None) -> None:
        """The rules of a plan stand now."""
        self._plan = whole
        self.facts = self._gather()
        self.ledger.decide(self.facts)
        if whole is None:
            self._attempt(self.hands.put_back_ports)

    def check(self) -> None:
        """Looks whether somebody else has changed something, and if so puts it right."""
        if self.ledger.networks:
            self._look_at_others()
            self._withdraw_what_is_gone()
            if self._gather() != self.facts or self._is_disturbed():
                self.reconcile()

    def reconcile(self) -> None:
        """Makes what is what should be."""
        self._look_at_others()
        self._refresh()
        self._withdraw_what_is_gone()
        whole = self.ledger.plan()
        stand = self._plan is not None and self.hands.rules.are_intact()
        before = replace(self.hands.found(), plan=whole if stand else None, forwarding=self._ours(whole))
        wanted = self.ledger.state(whole) if whole is not None else State()
        for step in diff(before, wanted):
            for part in _single(step):
                self._attempt(partial(self.hands.do, part))
        if whole is None:
            self._attempt(self.hands.rules.remove)
        self.settle(whole)

    def is_gone(self, container: str) -> bool:
        """Its namespace has ended, and the attachment with it."""
        return not netns.is_there(*self.ledger.place(container)) and not self.hands.is_attached(link_name(container))

    def _withdraw_what_is_gone(self) -> None:
        """Containers whose namespace has ended, and the network on demand when the last of them was on it."""
        for container in [one.container for one in self.ledger.endpoints() if self.is_gone(one.container)]:
            self._log.warning("container %s is gone: its ports are withdrawn", container)
            network = self.ledger.network_of(container).name
            try:
                self.hands.carry_out(diff(self.ledger.state_of_container(container), State()))
            except (GangwayError, ExceptionGroup):
                self._plan = None  # what is left of it goes when everything is compared
            self.ledger.remove_endpoint(container)
            if self.ledger.is_unneeded(network):
                self.ledger.remove_network(network)
                self._plan = None

    def _look_at_others(self) -> None:
        """Only if the rules were changed by somebody else: it takes a while."""
        if events.generation() != self.hands.rules.generation:
            self._chains = facts.others(self._nft)

    def _gather(self) -> HostFacts:
        switched_on = frozenset(
            family for family, names in probe.FORWARDING.items() if any(map(self._borrowed.has, names))
        )
        return facts.gather(self._config, self._nft, self._chains, self._links, switched_on)

    def _refresh(self) -> None:
        """Looks at the host again; with other facts everything is decided anew, another firewall perhaps."""
        now = self._gather()
        if now == self.facts and self._plan is not None:
            return
        for text in _notes(self.facts, now, self._plan):
            self._log.warning("%s", text)
        if now.firewall is not self.facts.firewall:
            self.hands.rules = rules_for(now.firewall, self._nft, self._store, self._config.chain_prefix)
        self.facts, self._plan = now, None
        self.ledger.decide(now)

    def _is_disturbed(self) -> bool:
        """Something of ours is not there any more, or not as it was."""
        if self._plan is None or not self.hands.rules.are_intact() or not self._relay.lives():
            return True
        bridges = {network.bridge for network in self.ledger.networks}
        return self.hands.links() != bridges | {link_name(one.container) for one in self.ledger.endpoints()}

    def _ours(self, whole: Plan | None) -> frozenset[int]:
        """The families that are forwarded and that it is ours to stop: others may need what we have no need of."""
        wanted = whole.forwarding if whole is not None else frozenset()
        return self.facts.forwarding & (self.facts.switched_on | wanted)

    def _attempt(self, call: Callable[[], None]) -> None:
        """What cannot be done now is tried again by the next reconcile."""
        try:
            call()
        except* GangwayError as errors:
            for error in _flat(errors):
                self._log.warning("%s", error)


def _flat(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        else:
            yield error


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


def _single(step: Step) -> Iterator[Step]:
    """Ports one by one: that one cannot be had is no reason to do without the others."""
    if isinstance(step.what, Ports):
        yield from (Step(step.verb, Ports((one,))) for one in step.what.of)
    else:
        yield step
