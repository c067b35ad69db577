"""The imports that are allowed; the syntax trees show the actual ones."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
PLANNING = {"facts", "model", "neighbours", "plan", "reasons"}
# What each package or module may import.  A package's modules may import each other; one with an entry of its own may
# import no more than that says.
ALLOWED: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "inet": set(),
    "limits": {"inet"},
    "intervals": set(),
    "log": set(),
    "log_targets": {"log"},
    "peers": set(),
    "runtime": set(),
    "model": {"errors", "inet"},
    "addressing": {"errors", "model"},
    "admission": {"errors", "model"},
    "exclusions": {"errors", "model"},
    "reasons": set(),
    "facts": {"model", "reasons"},
    "plan": {"facts", "model", "neighbours", "reasons"},
    "neighbours": {"model"},
    "reach": {"facts", "model", "plan", "reasons"},
    "host": {"errors", "inet", "limits", "runtime"},
    "ebpf": {"errors", "inet", "host.connected", "host.sockets", "runtime"},
    "ebpf.keys": {"inet"},
    "firewall": {"errors", "host.netlink", "inet", "host.rule_notices", "host.saved_settings", *PLANNING},
    "firewall.nft.asked": set(),
    "firewall.nft.transaction": set(),
    "firewall.nft.features": {"firewall.nft.asked", "firewall.nft.transaction"},
    "firewall.nft.answers": {"firewall.nft.transaction", *PLANNING},
    "firewall.nft.masquerade": {"firewall.nft.transaction", *PLANNING},
    "firewall.nft.restricted": {"firewall.nft.transaction", *PLANNING},
    "firewall.nft.routed": {"firewall.nft.transaction", *PLANNING},
    "firewall.nft.render": {"firewall.nft.answers", "firewall.nft.asked", "firewall.nft.features",
                            "firewall.nft.masquerade", "firewall.nft.restricted", "firewall.nft.routed",
                            "firewall.nft.transaction", *PLANNING},
    "firewall.iptables.tables": set(),
    "firewall.iptables.routed": PLANNING,
    "firewall.iptables.render": {"inet", "firewall.iptables.routed", "firewall.iptables.tables", *PLANNING},
    "relay": {"errors", "inet", "limits", "log", "log_targets", "peers"},
    "relay.protocol": {"inet", "relay.sockets"},
    "reconcile": set(),
    "reconcile.attempts": {"errors"},
    "reconcile.properties": {"model"},
    "reconcile.state": {"ebpf.keys", "reconcile.properties", "relay.protocol", *PLANNING},
    "reconcile.diff": {"ebpf.keys", "reconcile.properties", "reconcile.state", "relay.protocol", *PLANNING},
    "reconcile.changes": PLANNING,
    "reconcile.routing": {"errors", "host", "inet", *PLANNING},
    "reconcile.repairs": {"reconcile.diff", "reconcile.properties", "reconcile.state"},
    "reconcile.dataplane": {"ebpf", "errors", "host.connected", "host.saved_settings", "host.sockets", "inet",
                            "reconcile.repairs", "reconcile.state", "relay.client", "relay.protocol", "relay.sockets",
                            *PLANNING},
    "reconcile.executor": {"errors", "firewall.base", "host", "reconcile.dataplane", "reconcile.diff",
                           "reconcile.properties", "reconcile.state", *PLANNING},
    "reconcile.observe_links": {"host", "inet", "reconcile.properties"},
    "reconcile.containers": {"errors", "host", "inet", "model"},
    "reconcile.observe": {"daemon.config", "errors", "exclusions", "firewall", "host", "reconcile.containers",
                          "reconcile.dataplane", "reconcile.observe_links", "reconcile.routing", "reconcile.state",
                          "state.database", *PLANNING},
    "reconcile.liveness": {"errors", "host.netns", "state.database"},
    "reconcile.orphans": {"firewall.base", "facts", "host.links", "log", "reconcile.observe"},
    "reconcile.controller": {"errors", "firewall.base", "host", "log", "reconcile", "state.database", "state.registry",
                             *PLANNING},
    "state": set(),
    "state.adopted": {"model"},
    "state.adoption": {"errors", "host.netns", "reconcile.attempts", "reconcile.controller", "reconcile.executor",
                       "reconcile.state", "state", *PLANNING},
    "state.checks": {"errors", "host.netns", "state.database", *PLANNING},
    "state.database": {"errors", "model"},
    "state.parked": {"admission", "errors", "model", "state.database"},
    "state.port_index": {"errors", "inet", "intervals", "model"},
    "state.publication": {"reconcile.controller", "reconcile.executor", "reconcile.state", "state.allocate",
                          "state.registry", *PLANNING},
    "state.registry": {"addressing", "errors", "reconcile.properties", "reconcile.state", "state.database",
                       "state.parked", "state.port_index", *PLANNING},
    "state.families": {"errors", "host", *PLANNING},
    "state.allocate": {"ebpf.steering", "errors", "host.sockets", "reconcile.state", "relay.protocol",
                       "state.port_index", *PLANNING},
    "state.joining": {"errors", "host.netns", "reconcile.controller", "reconcile.state", "state.checks",
                      "state.database", "state.registry", *PLANNING},
    "state.leases": {"ebpf.keys", "errors", "host.sockets", "inet", "reconcile.dataplane", "reconcile.state",
                     "relay.protocol", "relay.sockets", "runtime", "state.port_index", *PLANNING},
    "state.requests": {"addressing", "errors", "host", "inet", "reach", "reconcile.changes", "reconcile.controller",
                       "reconcile.executor", "reconcile.state", "state", *PLANNING},
    "docker.running": {"docker.client", "peers"},
    "docker": {"addressing", "admission", "errors", "log", "model", "state.adopted"},
    "daemon": {"addressing", "admission", "docker", "ebpf", "errors", "firewall", "host", "inet", "limits", "log",
               "log_targets", "peers", "reconcile", "relay", "runtime", "state", *PLANNING},
    "daemon.config": {"errors", "exclusions", "log", "log_targets", "model", "relay.settings"},
    "daemon.declaration": {"admission", "daemon.messages", "errors", "inet", "model"},
    "daemon.difference": {"daemon.declaration", "errors", "model", "state.port_index"},
    "daemon.kept": {"daemon.declaration", "daemon.messages", "model"},
    "daemon.declared_files": {"daemon.declaration", "errors", "runtime"},
    "daemon.mounts": set(),
    "daemon.messages": {"addressing", "admission", "errors", "relay.sockets", *PLANNING},
    "daemon.in_force": {"daemon.config", "daemon.messages"},
    "daemon.start": {"daemon.config", "runtime"},
    # `run` makes the network namespace that its command lives in: only the command's own process can.
    # `config` reads the settings where no daemon runs, and `uninstall-check` the host.
    "cli": {"daemon.config", "daemon.declared_files", "daemon.in_force", "daemon.remains", "daemon.start", "errors",
            "host.netns", "inet", "runtime"},
}  # fmt: skip
PURE = (
    "inet.py",
    "facts.py",
    "model.py",
    "addressing.py",
    "admission.py",
    "exclusions.py",
    "plan.py",
    "neighbours.py",
    "reasons.py",
    "reach.py",
    "intervals.py",
    "limits.py",
    "firewall/nft/transaction.py",
    "firewall/nft/answers.py",
    "firewall/nft/asked.py",
    "firewall/nft/masquerade.py",
    "firewall/nft/restricted.py",
    "firewall/nft/routed.py",
    "firewall/nft/render.py",
    "firewall/iptables/render.py",
    "firewall/iptables/routed.py",
    "firewall/iptables/tables.py",
    "reconcile/properties.py",
    "reconcile/repairs.py",
    "reconcile/state.py",
    "reconcile/diff.py",
    "state/adopted.py",
    "state/port_index.py",
    "daemon/declaration.py",
    "daemon/difference.py",
    "daemon/kept.py",
    "daemon/messages.py",
    "docker/daemon_json.py",
    "docker/leftovers.py",
    "docker/wanted.py",
    "ebpf/keys.py",
    "relay/flow.py",
    "relay/settings.py",
)
# The relay's data plane, and what each of its modules may import besides `errors`, `inet`, `limits` and `log`.
RELAY_CORE: dict[str, set[str]] = {
    "flow": set(),
    "sockets": set(),
    "privilege": set(),
    "core.loop": set(),
    "core.library": {"sockets"},
    "core.table": {"flow"},
    "core.serving": {"core.library", "core.loop", "settings", "sockets"},
}
IMPURE = {"socket", "select", "subprocess", "ctypes", "io", "pathlib", "tempfile", "asyncio"}


def imports(path: Path, at_once: bool = False) -> Iterator[str]:
    """Yield the full name of each module, or name in a module, that is imported in a file: anywhere, or `at_once`."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for name in node.names:
                yield f"{node.module}.{name.name}"


def module_of(path: Path) -> str:
    """Return the module that a file is, without `gangway.`."""
    words = path.relative_to(SOURCE / "gangway").with_suffix("").parts
    return ".".join(words).removesuffix("__init__").removesuffix(".")


MODULES = {module_of(path): path for path in FILES}


def used_modules(path: Path, at_once: bool = False) -> set[str]:
    """Return the modules of gangway that a file imports; of a name in a module, the module."""
    names = (name.removeprefix("gangway.") for name in imports(path, at_once) if name.split(".")[0] == "gangway")
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} - {""}  # that has the version


def parents(module: str) -> Iterator[str]:
    """Yield a module and the packages that it is in, the innermost first."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def allowed(module: str) -> set[str]:
    """Return the packages and modules that a module may import."""
    entry = next((one for one in parents(module) if one in ALLOWED), "")
    package = set() if entry == module and module.count(".") else {module.split(".")[0]}
    return ALLOWED[entry] | package


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_the_allowed_way(module: str) -> None:
    assert module.split(".")[0] in ALLOWED, f"say in {__file__} what {module} may import"
    forbidden = {used for used in used_modules(MODULES[module]) if not allowed(module) & set(parents(used))}
    assert not forbidden


def test_table_names_existing_modules() -> None:
    assert {*ALLOWED, *(one for names in ALLOWED.values() for one in names)} <= MODULES.keys()


def test_no_module_imports_itself_by_a_detour() -> None:
    left = {module: used_modules(path, at_once=True) - {module} for module, path in MODULES.items()}
    while leaves := {module for module, used in left.items() if not used & left.keys()}:
        left = {module: used for module, used in left.items() if module not in leaves}
    assert not left


def relay_module(imported: str) -> str:
    """Return the module of the relay that an import refers to, as the table names it; empty for others."""
    path = imported.removeprefix("gangway.relay.")
    known = [module for module in RELAY_CORE if path == module or path.startswith(f"{module}.")]
    return "" if path == imported else (known or [path.split(".")[0]])[0]


@pytest.mark.parametrize("module", RELAY_CORE)
def test_the_relays_data_plane_imports_no_control_code(module: str) -> None:
    """Imports for type checking only count, too: no two modules need each other."""
    used = set(imports(SOURCE / "gangway/relay" / f"{module.replace('.', '/')}.py"))
    assert {relay_module(name) for name in used} - {""} <= RELAY_CORE[module]
    outside = {name.split(".")[1] for name in used if name.startswith("gangway.")} - {"relay"}
    assert outside <= {"errors", "inet", "limits", "log"}


def test_every_module_of_the_relays_data_plane_is_in_the_table() -> None:
    found = {f"core.{path.stem}" for path in (SOURCE / "gangway/relay/core").glob("*.py") if path.stem != "__init__"}
    assert found == {module for module in RELAY_CORE if module.startswith("core.")}


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_no_io(name: str) -> None:
    path = SOURCE / "gangway" / name
    assert not {module.split(".")[0] for module in imports(path)} & IMPURE
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert "open" not in {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}


def test_wire_protocol_opens_no_sockets() -> None:
    """It needs the module `socket` for the kernel's spelling of addresses, and for the numbers of families."""
    tree = ast.parse((SOURCE / "gangway/relay/protocol.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "socket"
    }
    assert used <= {"AF_INET", "AF_INET6", "inet_ntop", "inet_pton"}


def test_daemon_starts_without_what_few_daemons_need() -> None:
    """Each of these takes longer to import, and more memory, than a daemon that serves a launcher needs itself."""
    program = "import sys, gangway.daemon.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "asyncio" in loaded
    assert not loaded & {"aiohttp", "psutil", "pyroute2.iproute", "rich"}
