"""What the kernel, and other programs on this host, are found to do: one function for each assumption.

What this file knows: where to look.  What it must not know: what is decided by it.
"""

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from gangway.host import sysctl

FORWARDING = {4: ("net.ipv4.ip_forward",), 6: ("net.ipv6.conf.default.forwarding", "net.ipv6.conf.all.forwarding")}
"""The settings that make the kernel forward a family; the last one tells whether it does.  In this order: setting
`all` sets every interface that there is, `default` those to come."""
_FAMILIES = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
_LEGACY = {4: ("iptables-legacy", "ip_tables_names"), 6: ("ip6tables-legacy", "ip6_tables_names")}


def forwards(family: int) -> bool:
    """Whether the kernel forwards packets of a family."""
    return sysctl.read(FORWARDING[family][-1]) not in (None, "0")


def bridge_filtered(family: int) -> bool:
    """Whether br_netfilter shows bridged frames of a family to the firewall (ip-sysctl.rst)."""
    return (
        sysctl.read({4: "net.bridge.bridge-nf-call-iptables", 6: "net.bridge.bridge-nf-call-ip6tables"}[family]) == "1"
    )


def forward_chains(listing: str, own_table: str) -> dict[int, dict[str, str]]:
    """Other programs' base chains that filter what is forwarded: by family, the policy of each.

    `listing` is libnftables' JSON of all chains.
    """
    found: dict[int, dict[str, str]] = {4: {}, 6: {}}
    for entry in json.loads(listing)["nftables"]:
        chain = entry.get("chain", {})
        table = f"{chain.get('family')} {chain.get('table')}"
        if chain.get("hook") == "forward" and chain.get("type") == "filter" and table != own_table:
            for family in _FAMILIES.get(chain["family"], ()):
                found[family][f"{table} {chain['name']}"] = chain.get("policy", "accept")
    return found


def drops_all(rule: list[dict[str, object]]) -> bool:
    """Whether a rule, as libnftables' JSON has it, drops or rejects whatever comes to it."""
    said = [expression for expression in rule if "counter" not in expression]
    return len(said) == 1 and (bool({"drop", "reject"} & said[0].keys()) or _is_target(said[0], ("DROP", "REJECT")))


def legacy_forward_policy(family: int) -> str | None:
    """What the legacy iptables' FORWARD does with what no rule accepts: `accept` or `drop`; None: it says nothing."""
    program, names = _LEGACY[family]
    try:
        in_use = "filter" in Path("/proc/thread-self/net", names).read_text().split()
    except OSError:
        return None
    if not in_use or shutil.which(program) is None:
        return None
    done = subprocess.run([program, "-S", "FORWARD"], text=True, capture_output=True, check=False)
    if done.returncode:
        return None
    policy, *rules = done.stdout.splitlines()
    if policy.endswith("DROP") or (rules and rules[-1].startswith(("-A FORWARD -j DROP", "-A FORWARD -j REJECT"))):
        return "drop"
    return "accept" if rules else None


def _is_target(expression: dict[str, object], names: tuple[str, ...]) -> bool:
    """iptables' targets that nftables has no word for."""
    said = expression.get("xt")
    return isinstance(said, dict) and said.get("name") in names


@cache
def boot_id() -> str:
    """This start of the machine (random(4)): settings that were changed before it are as they were."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def is_root() -> bool:
    """Whether this process may change anything at all."""
    return os.geteuid() == 0
