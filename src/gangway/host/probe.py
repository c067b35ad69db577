"""Checks what the kernel and other programs on this host do: one function for each assumption."""

import os
import shutil
import subprocess
from pathlib import Path

from gangway.errors import TimedOut
from gangway.host import sysctl

FORWARDING = {4: ("net.ipv4.ip_forward",), 6: ("net.ipv6.conf.default.forwarding", "net.ipv6.conf.all.forwarding")}
"""The settings that make the kernel forward a family; the last one says whether it does.  The order matters: `all` sets
every interface that exists, `default` every later one."""
_LEGACY = {4: ("iptables-legacy-save", "ip_tables_names"), 6: ("ip6tables-legacy-save", "ip6_tables_names")}
_LIMIT_S = 10.0
_DROPS_ALL = ("-A FORWARD -j DROP", "-A FORWARD -j REJECT")


def forwards(family: int) -> bool:
    """True if the kernel forwards packets of a family: 4 or 6."""
    return sysctl.read(FORWARDING[family][-1]) not in (None, "0")


def ipv6_off(interface: str = "") -> str:
    """Return why an interface of the calling thread's namespace cannot have IPv6 addresses; empty if it can.

    Without a name: one that has yet to be created.  It takes the value of `default` then; who has written `all` did not
    want any IPv6 either (ip-sysctl.rst, disable_ipv6).
    """
    for one in (interface,) if interface else ("all", "default"):
        name = f"net/ipv6/conf/{one}/disable_ipv6"
        value = sysctl.read(name)
        if value is None:
            return "the kernel has no IPv6"
        if value != "0":
            return f"IPv6 is switched off ({name.replace('/', '.')} = {value})"
    return ""


def bridge_filtered(family: int) -> bool:
    """True if br_netfilter passes bridged frames of a family through the firewall (ip-sysctl.rst)."""
    tool = {4: "iptables", 6: "ip6tables"}[family]
    return sysctl.read(f"net.bridge.bridge-nf-call-{tool}") == "1"


def legacy_forward_policy(family: int) -> str | None:
    """Return what legacy iptables' FORWARD does with packets that no rule accepts: `accept` or `drop`.

    None: it is not in use, or has no rules and accepts everything.  TimedOut: it could not be read.
    """
    program, names = _LEGACY[family]
    try:
        is_used = "filter" in Path("/proc/thread-self/net", names).read_text().split()
    except OSError:
        return None
    if not is_used or shutil.which(program) is None:
        return None
    try:  # unlike iptables -S it does not wait for the lock, which another program may hold
        done = subprocess.run([program, "-t", "filter"], text=True, capture_output=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise TimedOut(f"{program} timed out after {_LIMIT_S:.0f} s and was ended") from None
    if done.returncode:
        return None
    policy, *rules = [line for line in done.stdout.splitlines() if line.startswith((":FORWARD ", "-A FORWARD "))]
    if policy.startswith(":FORWARD DROP") or (rules and rules[-1].startswith(_DROPS_ALL)):
        return "drop"
    return "accept" if rules else None


def boot_id() -> str:
    """Return the id of the current boot (random(4)): settings changed before it have been reset since."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def is_root() -> bool:
    return os.geteuid() == 0
