"""What to log when facts about the host have changed; `doctor` says the same of those that hold."""

from collections.abc import Iterable

from gangway.facts import FORWARDING_SETTING, HostFacts
from gangway.plan import Plan
from gangway.reasons import Code, Reason

UNFORWARDABLE = "clients elsewhere are relayed, and containers reach no other network (IPv{})"
ANSWERS_ELSEWHERE = (
    "its default route does not lead to the gateway of its network, so its clients are masqueraded: it sees the gateway"
)

OBEYS_INPUT = "obey the host's chain INPUT (obey-input): clients elsewhere are relayed"
PASSES_INPUT = "do not pass the host's chain INPUT, as Docker's do not: obey-input = true changes that"
_REROUTING = ("detours", "lost_sources", "answers_elsewhere", "unforwardable", "excluded", "obey_input")


def changes(before: HostFacts, now: HostFacts, plan: Plan | None) -> Iterable[str]:
    """Yield what to log about facts that another program has changed."""
    needed = plan.forwarding if plan is not None and now.may_forward else before.forwarding
    for family in sorted((before.forwarding - now.forwarding) & needed):
        is_possible = now.may_forward and family not in dict(now.unforwardable)
        then = "switched on again" if is_possible else "traffic that needs it is relayed"
        yield f"{FORWARDING_SETTING[family]} was switched off by another program: {then}"
    yield from now_unforwardable(before, now)
    for family, chain in now.forward_droppers:
        if before.dropper(family) != chain:
            yield f"{chain} drops forwarded traffic (IPv{family}): traffic that it carried is relayed"
    for detour in now.detours:
        if detour not in before.detours:
            yield f"clients that come in by {detour.interface} are relayed: {said_of(detour.reason)}"
    for detour in before.detours:
        if detour not in now.detours:
            yield f"clients that come in by {detour.interface} are no longer relayed because {said_of(detour.reason)}"
    for address in sorted(now.answers_elsewhere - before.answers_elsewhere, key=str):
        yield f"container address {address}: {ANSWERS_ELSEWHERE}"
    for address in sorted(before.excluded ^ now.excluded, key=str):
        what = "excluded: nothing is published there" if address in now.excluded else "no longer excluded"
        yield f"address {address} is {what}"
    if before.obey_input is not now.obey_input:
        yield f"published ports {OBEYS_INPUT if now.obey_input else PASSES_INPUT}"
    if before.firewall is not now.firewall:
        yield f"switching to {now.firewall}: another program's chain drops forwarded traffic"


def now_unforwardable(before: HostFacts | None, now: HostFacts) -> Iterable[str]:
    """Yield what to log about families that can no longer be forwarded; `before` is None at a daemon's start."""
    for family, fact in now.unforwardable:
        if before is None or (family, fact) not in before.unforwardable:
            yield f"{fact}: {UNFORWARDABLE.format(family)}"


def is_rerouted(before: HostFacts, now: HostFacts) -> bool:
    """True if connections that began before may have to take another road."""
    return any(getattr(before, name) != getattr(now, name) for name in _REROUTING)


def has_other_rules(before: Plan, now: Plan | None) -> bool:
    """True if other facts about the host call for other rules."""
    if now is None or is_rerouted(before.facts, now.facts):
        return True
    return (before.translated, before.closed) != (now.translated, now.closed)


def said_of(reason: Reason) -> str:
    """Say why no rule can serve the clients of a Detour."""
    if reason.code is Code.NOT_FORWARDED_FROM:
        return f"{reason.fact} is off"
    return f"a policy rule ({reason.fact}) routes the host's answers to them"
