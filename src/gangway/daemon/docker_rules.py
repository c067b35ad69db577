"""dockerd's rules on this host: what `gangway docker check` says of them, and their removal.

iptables' two variants have tables of their own, and dockerd may have used either; both are looked at.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from gangway.daemon.messages import CheckAnswer, DockerChange
from gangway.docker.leftovers import NAMED, USER_CHAIN, Leftovers, Rule, find, parse, removal, sets_of
from gangway.errors import GangwayError, HostRefused
from gangway.firewall.iptables.driver import policy_name, remembered_rules
from gangway.firewall.iptables.tool import Iptables, all_tools
from gangway.firewall.nft import kernel
from gangway.firewall.nft.library import Nftables
from gangway.host import sysctl
from gangway.host.saved_settings import SavedSettings, Storage

# dockerd 29, --firewall-backend nftables; `docker-overlay` has the rules of Swarm's encrypted networks.
_NFT_TABLES = tuple(f"{family} docker-{what}" for what in ("bridges", "overlay") for family in ("ip", "ip6"))
_CHECK = "dockerd's rules"
_FIREWALLD = Path("/etc/firewalld")
_PERMANENT = ("zones/docker.xml", "policies/docker-forwarding.xml")  # by dockerd, where firewalld runs
_IN_FIREWALLD = (
    "firewalld has a zone or policy of dockerd's, which lets the bridges' packets through firewalld's own rules: "
    "leave it there while firewalld runs"
)


class DockerRules:
    """The rules that dockerd has left.  `checks` changes nothing; `remove` is for one thread.

    `bridges` returns the names of Docker's bridges that are served; those that dockerd has named are known anyway.
    """

    def __init__(
        self,
        nft: Callable[[], Nftables | None],
        storage: Storage,
        saved: SavedSettings,
        bridges: Callable[[], Collection[str]],
    ) -> None:
        self._nft, self._storage, self._saved, self._bridges = nft, storage, saved, bridges

    def localnet_settings(self) -> list[str]:
        """Return the settings `route_localnet` of dockerd's bridges that are on, as without a proxy."""
        served = self._bridges()
        bridges = (name for name in sysctl.interfaces(4) if name in served or NAMED.fullmatch(name))
        settings = (f"net/ipv4/conf/{name}/route_localnet" for name in bridges)
        return [name for name in settings if sysctl.read(name) == "1"]

    def checks(self) -> Iterator[CheckAnswer]:
        """Yield a check for each tool that lists rules of dockerd's, or one that there are none."""
        rows = [row for tool in all_tools() for row in self._check(tool)]
        if tables := _nft_tables():
            rows.append(CheckAnswer(f"{_CHECK}: nftables", False, f"tables {', '.join(tables)}"))
        if any((_FIREWALLD / name).exists() for name in _PERMANENT):
            yield CheckAnswer(f"{_CHECK}: firewalld", True, _IN_FIREWALLD)
        yield from rows or [CheckAnswer(_CHECK, True, "none")]

    def remove(self, forward_accept: bool) -> DockerChange:
        """Remove them, table by table.  HostRefused: some were not removed; it says which were."""
        change, errors = DockerChange([], []), []
        steps: list[Callable[[DockerChange], None]] = [
            partial(self._remove_rules, tool, forward_accept) for tool in all_tools()
        ]
        for step in (*steps, self._remove_tables):
            try:
                step(change)
            except GangwayError as error:
                errors.append(str(error))
        if errors:
            raise HostRefused(f"{'; '.join(errors)} ({'; '.join(change.done) or 'nothing was removed'})")
        change.done = change.done or ["no rules of dockerd's were found: nothing was removed"]
        return change

    def user_chains(self) -> list[str]:
        """Return the tools that list rules of the operator's in DOCKER-USER."""
        with suppress(HostRefused):
            return [tool.command for tool in all_tools() for one in self._leftovers(tool) if USER_CHAIN in one.kept]
        return []

    def _remove_rules(self, tool: Iptables, forward_accept: bool, change: DockerChange) -> None:
        is_ours = self._saved.is_changed(policy_name(tool))
        for one in self._leftovers(tool):
            if text := removal(one, forward_accept and not is_ours):
                tool.apply(text)
            place = f"{tool.command} {one.table}"
            change.done += [f"{place}: {text}" for text in (_removed(one, "removed "), _kept(one)) if text]
            change.advice += [f"delete the set that these rules used: ipset destroy {name}" for name in sets_of(one)]
            if one.is_forward_closed and not is_ours:
                (change.done if forward_accept else change.advice).append(_policy(tool, one, forward_accept))

    def _remove_tables(self, change: DockerChange) -> None:
        if tables := _nft_tables():
            nft = self._nft() or Nftables()
            nft.apply("".join(f"delete table {name}\n" for name in tables))
            change.done += [f"nftables: removed the table {name}" for name in tables]

    def _check(self, tool: Iptables) -> Iterator[CheckAnswer]:
        try:
            found = self._leftovers(tool)
        except HostRefused as error:
            return (yield CheckAnswer(f"{_CHECK}: {tool.command}", False, str(error)))
        for one in found:
            closed = "FORWARD has the policy DROP" if one.is_forward_closed else ""
            note = "; ".join(filter(None, (_removed(one), _kept(one), closed)))
            yield CheckAnswer(f"{_CHECK}: {tool.command} {one.table}", not _is_left(one), note)

    def _leftovers(self, tool: Iptables) -> list[Leftovers]:
        own: dict[str, Counter[str]] = {}
        if tool.is_usual:  # gangway's rules are written by the variant that the host uses
            for table in remembered_rules(self._storage)[tool.family]:
                own.setdefault(table.name, Counter()).update(table.rules)
        return find(parse(tool.listing()), own)


def _nft_tables() -> list[str]:
    try:
        return [name for name in _NFT_TABLES if kernel.chains_and_rules(name)]
    except HostRefused:  # the kernel has no nftables
        return []


def _is_left(one: Leftovers) -> bool:
    return bool(one.rules or one.chains)


def _removed(one: Leftovers, verb: str = "") -> str:
    """Return what is removed, after a verb: `chains DOCKER, DOCKER-CT and 7 rules`; empty if nothing is."""
    chains = f"chain{'s' * (len(one.chains) > 1)} {', '.join(one.chains)}" if one.chains else ""
    rules = f"{len(one.rules)} rule{'s' * (len(one.rules) != 1)}" if one.rules else ""
    return verb * _is_left(one) + " and ".join(filter(None, (chains, rules)))


def _kept(one: Leftovers) -> str:
    """Return which chains stay, and because of which rules; empty if none does."""
    return f"kept {', '.join(one.kept)}, which rules of others use: {_some(one.users)}" if one.kept else ""


def _policy(tool: Iptables, one: Leftovers, accepts: bool) -> str:
    """Return what became of the policy of FORWARD, which was DROP."""
    if not accepts:
        command = f"{tool.command} -P FORWARD ACCEPT"
        return f"{tool.command} filter: FORWARD keeps the policy DROP; if dockerd has set it, {command} sets it back"
    if one.relying:
        return f"{tool.command} filter: FORWARD keeps the policy DROP, for rules of others: {_some(one.relying)}"
    return f"{tool.command} filter: the policy of FORWARD was set to ACCEPT"


def _some(rules: Sequence[Rule]) -> str:
    return "; ".join(map(str, rules[:3])) + "; …" * (len(rules) > 3)
