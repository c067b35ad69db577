"""`gangway uninstall-check`: what there is of gangway's in this network namespace, found without a daemon.

Nothing is changed, so that it may be asked at any time.  What a daemon's database remembers is taken from there; all
else shows by itself whose it is.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from gangway import runtime
from gangway.daemon import detach
from gangway.daemon.config import Config
from gangway.daemon.declared_files import folder_for, read_files
from gangway.daemon.processes import DAEMON, LAUNCHER, Process, running
from gangway.daemon.start import Start
from gangway.docker import settings_file
from gangway.ebpf.attached import attached
from gangway.errors import Forbidden, HostRefused, InvalidRequest, Unsupported
from gangway.firewall import nat_guard
from gangway.firewall.iptables import timeouts
from gangway.firewall.iptables.driver import policy_name, prefix_of_rules, remembered_rules
from gangway.firewall.iptables.render import DOCKERS_PREFIX
from gangway.firewall.iptables.tables import chain_of, deletion, parse_listing
from gangway.firewall.iptables.tool import Iptables, all_tools
from gangway.firewall.nft import kernel, transaction
from gangway.host import probe, sysctl
from gangway.host.links import Links
from gangway.host.reserved_ports import ReservedPorts
from gangway.host.saved_settings import SavedSettings, Setting
from gangway.reconcile.observe import MARK
from gangway.state.database import copies_of
from gangway.state.memory import Memory

_DOWN = "gangway down --yes"


class Remain(NamedTuple):
    """Something of gangway's, and the command that removes it."""

    what: str
    removal: str


def remains() -> list[Remain]:
    """Return everything of gangway's in this network namespace.  Forbidden: only root sees it all."""
    if not probe.is_root():
        raise Forbidden("only root sees all that is left: run as root")
    start, processes = Start(), list(running())
    start.apply_last()
    config = _config(start)
    state = Path(config.state or runtime.default_state())
    memory = Memory(state)
    links = Links()
    marked = [one.name for one in links.all().values() if one.alias.startswith(MARK)]
    found = [
        *map(_of_process, processes),
        *_settings(memory),  # before the interfaces that have some
        *(Remain(f"interface {one}", f"ip link delete {one}") for one in (*marked, *links.unfinished())),
        *_nftables(),
        *_iptables(memory, marked, config.chain_prefix),
        *_programs([one.pid for one in processes]),
        *_files(state),
        *(
            Remain(f"cgroup {one}", f"rmdir {one}")
            for one in detach.groups(f"gangway-{os.path.basename(runtime.folder())}")
        ),
    ]
    if names := timeouts.existing():  # last: the rules that name them have to go first, and few have nfct(8)
        found.append(Remain(f"conntrack: timeout policies {', '.join(names)}", _DOWN))
    if any(one.kind == DAEMON for one in processes):  # it would repair what is removed by hand
        found = [one if "docker " in one.removal else one._replace(removal=_DOWN) for one in found]
    return [*_declared(folder_for(start.config)), *found]  # first: the runtime folder may be around these files


def _config(start: Start) -> Config:
    """Return the settings that a daemon would start with."""
    with suppress(InvalidRequest):
        return start.load(os.environ).config
    return Config()


def _declared(folder: Path) -> Iterator[Remain]:
    """Yield the files that declare what the next daemon serves, or may when they are mended; `down` keeps them."""
    for path in sorted({path for what in read_files(folder, {}) for path in what}):
        yield Remain(f"file {path}, which the next daemon reads", f"rm {quote(path)}")


def _of_process(process: Process) -> Remain:
    if process.kind == LAUNCHER:
        flags = dict(zip(process.words[1::2], process.words[2::2], strict=False))
        port = f"{flags.get('-host-port', '?')}/{flags.get('-proto', 'tcp')}"
        return Remain(f"{LAUNCHER} (pid {process.pid})", f"docker stop $(docker ps --quiet --filter publish={port})")
    name = process.kind.rpartition(".")[2]
    return Remain(f"{name} (pid {process.pid})", f"kill {process.pid}")


def _nftables() -> Iterator[Remain]:
    for table in (transaction.TABLE, f"inet {nat_guard.TABLE}"):
        with suppress(HostRefused):  # the kernel has no nftables
            if kernel.chains_and_rules(table):
                yield Remain(f"nftables: table {table}", f"nft delete table {table}")


def _iptables(memory: Memory, interfaces: Collection[str], configured: str) -> Iterator[Remain]:
    """Yield the rules that are remembered, or about these interfaces, and the chains that have gangway's prefix."""
    former = prefix_of_rules(memory)
    prefix = former if former is not None else "" if configured == DOCKERS_PREFIX else configured
    remembered = {
        (family, table.name, rule)
        for family, tables in remembered_rules(memory).items()
        for table in tables
        for rule in table.rules
    }
    for tool in all_tools():
        for table, rules in parse_listing(tool.listing()).items():
            command = f"{tool.command} -t {table}"
            for rule in (one for one in rules if one.startswith("-A") and chain_of(one) != prefix):
                if (tool.family, table, rule) in remembered or {prefix, *interfaces} & set(rule.split()[2:]):
                    yield Remain(f"{command}: {rule}", f"{command} {deletion(rule)}")
            for chain in (one for one in (prefix, timeouts.PROBE) if f":{one}" in rules):
                count = sum(one.startswith(f"-A {chain} ") for one in rules)
                yield Remain(
                    f"{command}: chain {chain}, {count} rules", f"{command} -F {chain} && {command} -X {chain}"
                )


def _settings(memory: Memory) -> Iterator[Remain]:
    """Yield the settings that differ from what was there before gangway changed them."""
    saved, policies = SavedSettings(memory, lambda _: None), dict[str, str]()
    ReservedPorts(saved, lambda _: None)  # which knows how to restore that list
    for family in (4, 6):
        with suppress(Unsupported):  # iptables is not installed
            tool = Iptables(family)
            policies[policy_name(tool)] = f"{tool.command} -P FORWARD"
            saved.register(Setting(policy_name(tool), tool.policy, tool.set_policy))
    for name, values in saved.unrestored().items():
        commands = (
            f"{policies[one]} {value}" if one in policies else f"echo {quote(value)} > {sysctl.path(one)}"
            for one, value in values.items()
        )
        beside = len(values) - (name in values)
        more = f", and {beside} that were changed with it" if beside else ""
        yield Remain(f"setting {name}, not restored{more}", " && ".join(commands))


def _programs(holders: Collection[int]) -> Iterator[Remain]:
    """Yield the eBPF programs: each ends with the last process that holds it."""
    names = attached()
    if names:
        kill = f"kill {' '.join(map(str, holders))}" if holders else "kill the process that holds them: bpftool link"
        yield Remain(f"eBPF programs: {', '.join(sorted(set(names)))}", kill)


def _files(state: Path) -> Iterator[Remain]:
    folder = Path(runtime.folder())
    if folder.exists():
        with suppress(OSError, IndexError):  # no daemon has written the file to its end
            socket = Path((folder / runtime.LOCK).read_text().splitlines()[0].partition(" ")[2])
            if socket.parent != folder and socket.is_socket():
                yield Remain(f"socket {socket}", f"rm {quote(str(socket))}")
        names = ", ".join(sorted(one.name for one in folder.iterdir()))
        yield Remain(f"folder {folder} ({names or 'empty'})", f"rm -r {folder}")
    for path in (state, *copies_of(state)):
        if path.parent != folder and path.exists():
            yield Remain(f"database {path}", f"rm {quote(str(path))}*")
    home = Path(runtime.HOST_STATE).parent
    if runtime.default_state() == runtime.HOST_STATE:  # in other network namespaces these are not ours to judge
        if home.exists():
            yield Remain(f"folder {home}", f"rm -r {home}")
        if (backup := settings_file.SettingsFile(settings_file.DEFAULT).backup).exists():
            yield Remain(f"{settings_file.DEFAULT}, edited by gangway; {backup}", "gangway docker disable")
