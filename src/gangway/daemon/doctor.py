"""What this host can do, and what follows from what it cannot: `gangway doctor`.

What this file knows: every assumption about the host that a road depends on, and in whose words to tell of it.  What it
must not know: how each is found out.
"""

from collections.abc import Iterator
from typing import NamedTuple

from gangway.ebpf import requirements as bpf_probe
from gangway.model import Protocol
from gangway.plan import FORWARDING_SETTING, Firewall, HostFacts
from gangway.reconcile.observe import Tools

_DETACHED = "somebody has detached it; it is attached again soon"


class Check(NamedTuple):
    """One assumption: whether it holds; if not, why and what follows."""

    what: str
    holds: bool
    note: str = ""


def checks(tools: Tools, facts: HostFacts, is_redirecting: bool, is_steering: bool) -> Iterator[Check]:
    """All of them; of the redirect and of steering, as the daemon has them."""
    for firewall in (Firewall.NFTABLES, Firewall.IPTABLES):
        why = tools.unusable(firewall)
        in_use = "in use" if facts.firewall is firewall else ""
        yield Check(f"firewall: {firewall}", why is None, in_use if why is None else why)
    for family, setting in FORWARDING_SETTING.items():
        yield _forwarding(facts, family, setting)
    for protocol in Protocol:
        there = protocol not in facts.missing_protocols
        note = "" if there else "this kernel has no such sockets: what rules cannot carry is not carried"
        yield Check(f"relay: {protocol}", there, note)
    for what, needs in bpf_probe.NEEDS.items():
        why = needs()
        yield Check(f"programs: {what}", why is None, why or "")
    why = facts.no_redirect or ("" if is_redirecting else _DETACHED)
    yield Check("redirect: attached", not why, f"{why}: who asks a loopback address is relayed" if why else "")
    without = f"{facts.no_steering}: each published port takes a socket" if facts.no_steering else ""
    why = without or ("" if is_steering else f"{_DETACHED}: what the relay would carry has to wait")
    yield Check("steering: attached", not why, why)


def _forwarding(facts: HostFacts, family: int, setting: str) -> Check:
    what = f"forwarding: IPv{family}"
    dropper = facts.dropper(family)
    if dropper is not None:
        return Check(what, False, f"{dropper} drops what is forwarded: it is relayed")
    if family in facts.forwarding:
        return Check(what, True)
    if facts.may_forward and facts.firewall is not Firewall.NONE:
        return Check(what, True, f"{setting} is off, and is switched on when a network needs it")
    return Check(what, False, f"{setting} is off: what needs it is relayed")
