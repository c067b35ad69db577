"""`gangway doctor`: what this host can do, and what follows from what it cannot."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from gangway.daemon.messages import CheckAnswer
from gangway.ebpf import requirements
from gangway.ebpf.steering import Steering
from gangway.facts import FORWARDING_SETTING, Firewall, HostFacts
from gangway.firewall.base import Driver
from gangway.firewall.nat_guard import NatGuard
from gangway.host import connected, conntrack, probe, sysctl
from gangway.limits import Level, Usage, describe, level
from gangway.model import Protocol
from gangway.reconcile.changes import ANSWERS_ELSEWHERE, OBEYS_INPUT, PASSES_INPUT, UNFORWARDABLE, said_of
from gangway.reconcile.dataplane import DataPlane
from gangway.reconcile.observe import Tools

if TYPE_CHECKING:
    from gangway.docker.watcher import Watcher

_CLOSE_WAIT = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"
_DETACHED = "another program detached it: it is attached again within seconds"


def checks(
    tools: Tools, facts: HostFacts, dataplane: DataPlane, guard: NatGuard, leases: int, driver: Driver
) -> Iterator[CheckAnswer]:
    """Yield every check; `leases` is how many there are."""
    is_root = probe.is_root()
    yield CheckAnswer("root", is_root, "" if is_root else "not root: only docker-proxy's ports, all by relay")
    for firewall in (Firewall.NFTABLES, Firewall.IPTABLES):
        reason = tools.unusable(firewall)
        in_use = "in use" if facts.firewall is firewall else ""
        yield CheckAnswer(f"firewall: {firewall}", reason is None, in_use if reason is None else reason)
    yield _guard(guard.unavailable)
    for family, setting in FORWARDING_SETTING.items():
        yield _forwarding(facts, family, setting)
    note = f"published ports {OBEYS_INPUT if facts.obey_input else PASSES_INPUT}"
    yield CheckAnswer("firewall: the chain INPUT", True, note)
    for detour in facts.detours:
        note = f"{said_of(detour.reason)}: these clients are relayed (IPv{detour.family})"
        yield CheckAnswer(f"clients by {detour.interface}", False, note)
    for address in sorted(facts.answers_elsewhere, key=str):
        yield CheckAnswer(f"container {address}", False, ANSWERS_ELSEWHERE)
    reason = probe.ipv6_off()
    yield CheckAnswer("IPv6", not reason, f"{reason}: new networks have IPv4 only" if reason else "")
    for protocol in Protocol:
        is_there = protocol not in facts.missing_protocols
        note = "" if is_there else "this kernel has no such sockets: clients that no rule serves are not served"
        yield CheckAnswer(f"relay: {protocol}", is_there, note)
    note = f"{facts.no_raw}: UDP ports that dockerd holds are not relayed" if facts.no_raw else ""
    yield CheckAnswer("relay: raw sockets", not note, note)
    for what, reason_of in requirements.NEEDS.items():
        reason = reason_of()
        yield CheckAnswer(f"eBPF: {what}", reason is None, reason or "")
    reason = dataplane.redirect.unavailable or ("" if dataplane.redirect.is_attached() else _DETACHED)
    yield CheckAnswer(
        "redirect: attached", not reason, f"{reason}: clients of loopback addresses are relayed" if reason else ""
    )
    reason = connected.unavailable() if is_root else ""
    note = f"{reason}: a redirected connection may survive unpublish" if reason else ""
    yield CheckAnswer("redirect: connections end", not reason, note)
    yield from _steering(facts, dataplane.steering)
    reason = conntrack.unavailable() if is_root else ""
    note = f"{reason}: connections by nat survive unpublish; UDP clients keep their former road" if reason else ""
    yield CheckAnswer("tracked connections", not reason, note)
    yield from _nat(driver)
    published = "1 port published by a lease" if leases == 1 else f"{leases} ports published by leases"
    yield CheckAnswer("docker-proxy launchers", True, published if leases else "none")


def _nat(driver: Driver) -> Iterator[CheckAnswer]:
    reason = driver.no_timeouts
    note = f"{reason}: they end {_CLOSE_WAIT} seconds after one end has closed and the other is silent"
    yield CheckAnswer("tracked connections: half-closed", not reason, note if reason else "")
    reason = driver.no_new_ports
    note = f"{reason}: by nat a UDP server's answer from a new port (TFTP) may come from another address"
    yield CheckAnswer("nat: UDP answers from new ports", not reason, note if reason else "")


def _guard(reason: str) -> CheckAnswer:
    note = f"{reason}: a flush of all rules by another program resets them" if reason else ""
    return CheckAnswer("firewall: connections outlive a flush", not reason, note)


def _steering(facts: HostFacts, steering: Steering) -> Iterator[CheckAnswer]:
    reason = steering.unavailable
    note = f"{reason}: each published port takes a socket; ports that dockerd holds are not relayed" if reason else ""
    if not reason and not steering.is_attached():
        note = f"{_DETACHED}: clients of the relay wait until then"
    yield CheckAnswer("steering: attached", not note, note)
    if facts.exclude:
        clients = f"clients wait at its socket: {reason}" if reason else "UDP clients wait at its socket"
        note = f"at a port that dockerd holds, {clients}"
        yield CheckAnswer("excluded addresses: connections are refused", not reason, note)


def docker_check(watcher: "Watcher | None", is_enabled: bool) -> CheckAnswer:
    """Return the check of what is served of Docker's: with `[docker] enabled` all, else what `publish` has added."""
    said = [] if is_enabled else ["left to Docker: [docker] enabled is false"]
    if watcher is not None:
        said += [watcher.problem, watcher.summary]
    is_served = watcher is None or not watcher.problem
    return CheckAnswer("Docker's networks and ports", is_served, "; ".join(filter(None, said)))


def limit_checks(usages: Iterable[Usage]) -> Iterator[CheckAnswer]:
    """Yield a check for each limit of the kernel: it holds unless the limit is nearly reached."""
    for usage in usages:
        yield CheckAnswer(f"limit: {usage.what}", level(usage) is Level.FREE, describe(usage))


def setting_checks(wanted: Iterable[tuple[str, str, str]]) -> Iterator[CheckAnswer]:
    """Yield a check for each sysctl that differs and cannot be written: its name, the value wanted, the consequence."""
    for name, value, consequence in wanted:
        now = sysctl.read(name)
        if now not in (None, value) and (reason := sysctl.unwritable(name)):
            note = f"it is {now} instead of {value} and cannot be written ({reason}): {consequence}"
            yield CheckAnswer(f"setting: {name.replace('/', '.')}", False, note)


def _forwarding(facts: HostFacts, family: int, setting: str) -> CheckAnswer:
    what = f"forwarding: IPv{family}"
    dropper = facts.dropper(family)
    if dropper is not None:
        return CheckAnswer(what, False, f"{dropper} drops forwarded traffic: it is relayed")
    if family in dict(facts.unforwardable):
        return CheckAnswer(what, False, f"{dict(facts.unforwardable)[family]}: {UNFORWARDABLE.format(family)}")
    if family in facts.forwarding:
        return CheckAnswer(what, True)
    if facts.may_forward and facts.firewall is not Firewall.NONE:
        return CheckAnswer(what, True, f"{setting} is off: it is switched on when a network needs it")
    return CheckAnswer(what, False, f"{setting} is off: traffic that needs it is relayed")
