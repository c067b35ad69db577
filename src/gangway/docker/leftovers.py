"""dockerd's rules in what iptables-save(8) prints, and how they are removed.

What this file knows: the rules that dockerd 20.10 to 29 writes (moby: libnetwork/drivers/bridge, and overlay for the
encrypted networks of Swarm), as iptables-save spells them.  What it must not know: how the text gets into the kernel.

Other programs' rules stay.  In built-in chains and in dockerd's own ones, only rules of a form that dockerd writes, for
one of its bridges, are dockerd's.  A chain of dockerd's that has another rule (as DOCKER-USER may), or that another
program's rule jumps to, stays, and so do the rules that lead to it.

DOCKER_OUTPUT and DOCKER_POSTROUTING are not removed: dockerd writes them into containers' namespaces, and where they
are listed, the listing is that of a container, whose DNS they carry.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_network
from typing import NamedTuple

USER_CHAIN = "DOCKER-USER"
"""The chain that dockerd leaves to the operator."""
_CHAINS = {
    "nat": {"DOCKER", "DOCKER-INGRESS"},
    "filter": {
        "DOCKER",
        "DOCKER-BRIDGE",
        "DOCKER-CT",
        "DOCKER-FORWARD",
        "DOCKER-INGRESS",
        "DOCKER-INTERNAL",
        "DOCKER-ISOLATION",
        "DOCKER-ISOLATION-STAGE-1",
        "DOCKER-ISOLATION-STAGE-2",
        USER_CHAIN,
    },
}
_ORDER = ("raw", "mangle", "nat", "filter")
"""The chains, by which dockerd's rules are told, come last: what a failure leaves is found again."""
NAMED = re.compile(r"docker0|docker_gwbridge|br-[0-9a-f]{12}")
"""The names that dockerd gives bridges."""
_RETURN = "-j RETURN"
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')  # a comment, for example

Rules = Mapping[str, Mapping[str, int]]
"""The rules of each table, `-A CHAIN …`, and how many there are of each."""


class Table(NamedTuple):
    """A table: the policies of its built-in chains, and the rules of every chain, without `-A CHAIN`."""

    name: str
    policies: dict[str, str]
    chains: dict[str, list[str]]


class Rule(NamedTuple):
    """A rule: its chain, and the rest."""

    chain: str
    text: str

    def __str__(self) -> str:
        return f"-A {self.chain} {self.text}"


class Leftovers(NamedTuple):
    """What dockerd has left in a table."""

    table: str
    rules: tuple[Rule, ...]  # to delete
    chains: tuple[str, ...]  # to delete, after those rules
    kept: tuple[str, ...]  # chains of dockerd's that stay
    users: tuple[Rule, ...]  # the rules because of which they stay
    is_forward_closed: bool  # the policy of FORWARD is DROP
    relying: tuple[Rule, ...]  # other programs' rules in FORWARD, which may rely on its policy


def parse(listing: str) -> list[Table]:
    """Return the tables that iptables-save has listed."""
    tables: list[Table] = []
    for line in listing.splitlines():
        if line.startswith("*"):
            tables.append(Table(line[1:], {}, {}))
        elif line.startswith(":"):
            chain, policy = line[1:].split()[:2]
            tables[-1].chains[chain] = []
            if policy != "-":
                tables[-1].policies[chain] = policy
        elif line.startswith("-A "):
            _, chain, *rule = line.split(" ", 2)
            tables[-1].chains[chain].append("".join(rule))
    return tables


def find(tables: Collection[Table], own: Rules) -> list[Leftovers]:
    """Return what dockerd has left, in the order in which it is to be removed.  `own` are gangway's rules."""
    known = _Known(tables)
    found = [_leftovers(table, known, own.get(table.name, {})) for table in tables if table.name in _ORDER]
    found.sort(key=lambda one: _ORDER.index(one.table))
    return [one for one in found if one.rules or one.chains or one.kept]


def removal(found: Leftovers, open_forward: bool = False) -> str:
    """Return the text for iptables-restore --noflush, one transaction; empty if there is nothing to do.

    Rules of DOCKER-USER are deleted one by one, so that the transaction fails if another one was added meanwhile.
    `open_forward` sets the policy of FORWARD to ACCEPT where no rule of another program relies on it.
    """
    emptied = [chain for chain in found.chains if chain != USER_CHAIN]
    lines = [f"-D {rule.chain} {rule.text}" for rule in found.rules if rule.chain not in emptied]
    lines += [*(f"-F {chain}" for chain in emptied), *(f"-X {chain}" for chain in found.chains)]
    if open_forward and found.is_forward_closed and not found.relying:
        lines.append("-P FORWARD ACCEPT")
    return "".join(f"{line}\n" for line in (f"*{found.table}", *lines, "COMMIT")) if lines else ""


def sets_of(found: Leftovers) -> list[str]:
    """Return the sets of dockerd's that the rules to delete match."""
    names = (re.search(r"--match-set (\S+)", rule.text) for rule in found.rules)
    return sorted({name[1] for name in names if name})


def _leftovers(table: Table, known: "_Known", own: Mapping[str, int]) -> Leftovers:
    theirs, others = _sorted_out(table, known, own)
    chains = [chain for chain in table.chains if chain in _CHAINS.get(table.name, ())]
    kept = _kept(chains, theirs, others)
    rules = [rule for rule in theirs if rule.chain not in kept or rule.chain != USER_CHAIN]
    rules = [rule for rule in rules if _target(rule) not in kept]
    left = [rule for rule in theirs if _target(rule) in kept]
    users = [rule for rule in others if rule.chain in kept or _target(rule) in kept]
    relying = [rule for rule in (*others, *left) if rule.chain == "FORWARD"]
    is_closed = table.name == "filter" and table.policies.get("FORWARD") == "DROP"
    deleted = tuple(chain for chain in chains if chain not in kept)
    return Leftovers(table.name, tuple(rules), deleted, kept, tuple(users), is_closed, tuple(relying))


def _sorted_out(table: Table, known: "_Known", own: Mapping[str, int]) -> tuple[list[Rule], list[Rule]]:
    """Return dockerd's rules, and other programs' ones; gangway's own are left out."""
    theirs: list[Rule] = []
    others: list[Rule] = []
    ours = Counter(own)
    for rule in (Rule(chain, text) for chain, found in table.chains.items() for text in found):
        if ours[str(rule)] > 0:
            ours[str(rule)] -= 1
        else:
            (theirs if known.is_dockers(table.name, rule) else others).append(rule)
    return theirs, others


def _kept(chains: Collection[str], theirs: Iterable[Rule], others: Iterable[Rule]) -> tuple[str, ...]:
    """Return the chains that have to stay: for other programs' rules, or because one that stays jumps to them."""
    kept = {name for rule in others for name in (rule.chain, _target(rule)) if name in chains}
    while more := {rule.chain for rule in theirs if _target(rule) in kept and rule.chain in chains} - kept:
        kept |= more
    return tuple(chain for chain in chains if chain in kept)


def _target(rule: Rule) -> str:
    """Return what a rule jumps or goes to."""
    found = re.search(r"(?:^| )-[jg] (\S+)", _QUOTED.sub("", rule.text))
    return found[1] if found else ""


def _patterns(*forms: str) -> tuple[re.Pattern[str], ...]:
    """Compile forms of rules.  BR: a bridge, the same everywhere in a rule; NET: addresses; PORT: a protocol's port."""

    def compiled(form: str) -> re.Pattern[str]:
        form = form.replace("NET", r"[0-9a-f.:]+/\d+").replace("PORT", _PORT)
        first, *others = re.split(r"\bBR\b", form, maxsplit=1)
        return re.compile(r"(?P<bridge>\S+)".join((first, *(re.sub(r"\bBR\b", "(?P=bridge)", one) for one in others))))

    return tuple(map(compiled, forms))


_PORT = r"-p (?:tcp|udp|sctp) -m (?:tcp|udp|sctp) --dport \d+"
_ESTABLISHED = "-m conntrack --ctstate RELATED,ESTABLISHED"
_SET = r"-m set --match-set docker-ext-bridges-v[46] dst"  # 28.0.0
_ACCEPTED_BRIDGE = r"-i BR -j ACCEPT"
_MARK = "0xd0c4e3"  # of what encrypted networks send
_NUMBER = r"0x[0-9a-f]+00"  # of such a network, behind the VXLAN header's flags
_VNI = rf'-m (?:u32 --u32 "0x0>>0x16&0x3c@0xc&0xffffff00={_NUMBER}"|bpf --bytecode "[0-9 ,]+")'
_VXLAN = rf"-m udp --dport \d+ {_VNI}"
_NO_SOCKET = "(?:-m owner ! --socket-exists )?"
_SOURCE = r"(?:MASQUERADE|SNAT --to-source \S+)"
_FORWARD = (
    r"-j DOCKER-(?:USER|FORWARD|INGRESS|ISOLATION|ISOLATION-STAGE-1)",
    rf"{_SET} -j DOCKER",
    rf"{_SET} {_ESTABLISHED} -j ACCEPT",
    r"-o BR -j DOCKER",
    rf"-o BR {_ESTABLISHED} -j ACCEPT",
    r"-i BR ! -o BR -j ACCEPT",
    r"-i BR -o BR -j (?:ACCEPT|DROP)",
)
_BRIDGES = _patterns(  # in the table `filter`: they tell which bridges are dockerd's
    r"-o BR -j DOCKER",
    r"-i BR ! -o BR -j DOCKER-ISOLATION-STAGE-2",
    r"! -s NET(?: ! -i \S+)? -o BR -j DROP",
    r"! -d NET -i BR(?: ! -o \S+)? -j DROP",
)
_BUILT_IN = {
    ("filter", "FORWARD"): _patterns(*_FORWARD),
    ("filter", "INPUT"): _patterns(
        rf"-p udp -m policy --dir in --pol (?:none|ipsec) {_VXLAN} -j (?:DROP|ACCEPT)",
        rf'-p udp -m udp --dport \d+ -m u32 --u32 "0x0>>0x16&0x3c@0xc&0xffffff00={_NUMBER}" -j DROP',
    ),
    ("mangle", "OUTPUT"): _patterns(
        rf"-p udp {_NO_SOCKET}{_VXLAN} {_NO_SOCKET}-j MARK --set-xmark {_MARK}/0xffffffff",
        rf"-p udp (?=.*{_MARK})(?:-m (?:owner --socket-exists|mark --mark {_MARK}|udp --dport \d+) )+"
        r"-j MARK --set-xmark 0x0/0xffffffff",
    ),
    ("nat", "PREROUTING"): _patterns(r"-m addrtype --dst-type LOCAL -j DOCKER(?:-INGRESS)?"),
    ("nat", "OUTPUT"): _patterns(
        r"(?:! -d (?:127\.0\.0\.0/8|::1/128) )?-m addrtype --dst-type LOCAL -j DOCKER(?:-INGRESS)?"
    ),
    ("nat", "POSTROUTING"): _patterns(
        rf"-s NET ! -o BR -j {_SOURCE}",
        rf"-o BR -m addrtype --src-type LOCAL -j {_SOURCE}",
        r"-s (?P<container>NET) -d (?P=container) PORT -j MASQUERADE",
    ),
    ("mangle", "POSTROUTING"): _patterns(
        r"-s (?P<container>NET) -p sctp -m sctp --sport \d+ -j CHECKSUM --checksum-fill"
    ),
    ("raw", "PREROUTING"): _patterns(
        r"-d NET ! -i BR(?: PORT)? -j DROP",
        r"-d (?P<subnet>NET) -i lo -j ACCEPT",
        r"-d (?P<published>NET) (?:! -i lo|-i loopback0) (?P<port>PORT) -j (?:DROP|ACCEPT)",
    ),
}
_OWN = {
    "filter": _patterns(
        *_FORWARD,
        rf"{_RETURN}|-j (?:{'|'.join(sorted(_CHAINS['filter']))})",
        _ACCEPTED_BRIDGE,
        r"-i BR ! -o BR -j DOCKER-ISOLATION-STAGE-2",
        r"-o BR -j (?:DROP|RETURN)",
        rf"-i BR {_ESTABLISHED} -j ACCEPT",
        r"! -i BR -o BR -j (?:ACCEPT|DROP)",
        r"! -s NET -o BR -j DROP",
        r"! -s NET ! -i BR -o BR -j DROP",
        r"! -d NET -i BR(?: ! -o BR)? -j DROP",
        r"(?:-s NET )?-d NET (?:! )?-i BR -o BR PORT(?: -m conntrack ! --ctorigdst \S+)? -j ACCEPT",
        r"-s NET -d NET -i BR -o BR -p (?:tcp|udp|sctp) -m (?:tcp|udp|sctp) --sport \d+ -j ACCEPT",
        r"-o BR -p (?:icmp|ipv6-icmp) -j ACCEPT",
        r"-i BR -o BR -p ipv6-icmp -m icmp6 --icmpv6-type \d+ -j ACCEPT",
        r"-m mark --mark \S+ -j ACCEPT",
        rf"-p (?:tcp|udp|sctp) -m (?:tcp|udp|sctp) (?:--dport \d+|--sport \d+ {_ESTABLISHED}) -j ACCEPT",
    ),
    "nat": _patterns(
        _RETURN,
        r"-i BR -j RETURN",
        r"-d 127\.0\.0\.0/8 -i loopback0 -j RETURN",
        r"(?:! -s fe80::/10 )?(?:-d NET )?(?:! -i BR )?PORT -j DNAT --to-destination \S+",
    ),
}
_BESIDE_SET = {("filter", "FORWARD"): _patterns(_ACCEPTED_BRIDGE)}
"""What only 28.0.0 writes, whose rules there match a set of bridges."""
_PUBLISHED = re.compile(rf"(?:-d (?P<host>\S+) )?(?:! -i \S+ )?(?P<port>{_PORT}) -j DNAT --to-destination (?P<to>\S+)")
_MASQUERADED = re.compile(r"-s (?P<subnet>\S+) ! -o (?P<bridge>\S+) -j ")
_PROTECTED = re.compile(r"-d (?P<subnet>\S+) ! -i (?P<bridge>\S+) -j DROP")


class _Known:
    """What the rules of all tables tell about dockerd's networks and ports."""

    def __init__(self, tables: Collection[Table]) -> None:
        self._is_user_chain_alone = not any(
            _CHAINS.get(table.name, set()) & table.chains.keys() - {USER_CHAIN} for table in tables
        )
        named = {table.name: table.chains for table in tables}
        filters, nat, raw = (named.get(name, {}) for name in ("filter", "nat", "raw"))
        own = [rule for chain in _CHAINS["filter"] - {USER_CHAIN} for rule in filters.get(chain, ())]
        jumps = [rule for rule in filters.get("FORWARD", ()) if rule.endswith(" -j DOCKER")]
        self._bridges = {found["bridge"] for found in _matches(_BRIDGES, [*own, *jumps])}
        published = [*_matches([_PUBLISHED], nat.get("DOCKER", ()))]
        self._has_set = any(_matches(_patterns(rf"{_SET} -j DOCKER"), filters.get("FORWARD", ())))
        self._published = {(found["host"], found["port"]) for found in published}
        self._containers = {found["to"].rpartition(":")[0].strip("[]") for found in published}
        self._subnets = {one["subnet"] for one in self._of_bridges(_MASQUERADED, nat.get("POSTROUTING", ()))}
        self._protected = {one["subnet"] for one in self._of_bridges(_PROTECTED, raw.get("PREROUTING", ()))}

    def is_dockers(self, table: str, rule: Rule) -> bool:
        """True if a rule is one that dockerd writes.

        Without its chains, the same rules in built-in chains are the operator's, who may have copied them.
        """
        if rule.chain == USER_CHAIN:
            return rule.text == _RETURN
        if self._is_user_chain_alone:
            return table == "filter" and rule == ("FORWARD", f"-j {USER_CHAIN}")
        place = table, rule.chain
        forms = _OWN[table] if rule.chain in _CHAINS.get(table, ()) else _BUILT_IN.get(place, ())
        if self._has_set:
            forms += _BESIDE_SET.get(place, ())
        return any(self._fits(found.groupdict()) for found in _matches(forms, [rule.text]))

    def _fits(self, found: Mapping[str, str | None]) -> bool:
        """True if what a rule names is dockerd's."""
        bridge, container = found.get("bridge"), found.get("container")
        if bridge is not None and not self._is_bridge(bridge):
            return False
        if container is not None and not self._is_container(container):
            return False
        if "subnet" in found:
            return found["subnet"] in self._protected
        return "published" not in found or (found["published"], found["port"]) in self._published

    def _is_bridge(self, name: str) -> bool:
        return name in self._bridges or NAMED.fullmatch(name) is not None

    def _is_container(self, address: str) -> bool:
        found = ip_address(address.partition("/")[0])
        networks = map(ip_network, self._subnets)
        return str(found) in self._containers or any(found in network for network in networks)

    def _of_bridges(self, form: re.Pattern[str], rules: Iterable[str]) -> Iterator[re.Match[str]]:
        found = (form.match(rule) for rule in rules)
        return (one for one in found if one and self._is_bridge(one["bridge"]))


def _matches(forms: Iterable[re.Pattern[str]], rules: Iterable[str]) -> Iterator[re.Match[str]]:
    return (found for rule in rules for form in forms if (found := form.fullmatch(rule)))
