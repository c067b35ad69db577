"""Who may import whom, from the syntax trees: what is not allowed here is forbidden."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
# The parts of gangway, and the parts that each may import besides its own.
ALLOWED: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "inet": set(),
    "intervals": set(),
    "log": set(),
    "runtime": set(),
    "model": {"errors", "inet"},
    "roads": {"model"},
    "plan": {"model", "roads"},
    "host": {"errors", "inet", "runtime"},
    "ebpf": {"errors", "host", "inet", "runtime"},
    "firewall": {"errors", "host", "inet", "model", "plan", "roads"},
    "relay": {"errors", "inet", "intervals", "log"},
    "reconcile": {
        "daemon.config",
        "ebpf",
        "errors",
        "firewall",
        "host",
        "inet",
        "log",
        "model",
        "plan",
        "relay",
        "roads",
        "state.database",
        "state.registry",
    },
    "state": {
        "ebpf",
        "errors",
        "host",
        "inet",
        "intervals",
        "model",
        "plan",
        "reconcile",
        "relay.protocol",
        "relay.sockets",
        "roads",
        "runtime",
    },
    "docker": {"errors"},
    "daemon": {
        "docker",
        "ebpf",
        "errors",
        "firewall",
        "host",
        "inet",
        "log",
        "model",
        "plan",
        "reconcile",
        "relay",
        "roads",
        "runtime",
        "state",
    },
    # `run` makes the network namespace that its command lives in: only the command's own process can.
    "cli": {"daemon.config", "errors", "host.netns", "inet", "model", "plan", "roads", "runtime"},
}
PURE = (
    "inet.py",
    "model.py",
    "roads.py",
    "plan.py",
    "intervals.py",
    "firewall/nft/render.py",
    "firewall/iptables/render.py",
    "reconcile/diff.py",
    "state/port_index.py",
    "daemon/messages.py",
    "ebpf/keys.py",
    "relay/flow.py",
    "relay/settings.py",
)
# The relay's data plane, and what each of its modules may import besides `errors`, `intervals` and `log`.
RELAY_CORE: dict[str, set[str]] = {
    "flow": set(),
    "sockets": set(),
    "privilege": set(),
    "core.loop": set(),
    "core.batch": set(),
    "core.pktinfo": {"core.batch"},
    "core.pump": {"core.loop", "flow", "sockets"},
    "core.stream": {"core.loop", "core.pump", "flow", "settings", "sockets"},
    "core.listener": {"core.loop", "core.stream", "sockets"},
    "core.datagram": {"core.loop", "core.batch", "core.pktinfo", "settings", "sockets"},
    "core.worker": {"core.loop", "core.stream", "settings", "sockets"},
    "core.shared": {"core.datagram", "core.listener", "core.pktinfo", "core.stream", "sockets"},
}
IMPURE = {"socket", "select", "subprocess", "ctypes", "io", "pathlib", "tempfile", "asyncio"}


def imports(path: Path) -> Iterator[str]:
    """The full name of each module that is imported anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for name in node.names:
                yield f"{node.module}.{name.name}"


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
    outside = {part(name) for name in used if name.startswith("gangway.")} - {"relay"}
    assert outside <= {"errors", "intervals", "log"}


def test_every_module_of_the_relays_data_plane_is_in_the_table() -> None:
    found = {f"core.{path.stem}" for path in (SOURCE / "gangway/relay/core").glob("*.py") if path.stem != "__init__"}
    assert found == {module for module in RELAY_CORE if module.startswith("core.")}


def part(module: str) -> str:
    """The part of gangway that a module belongs to."""
    return [*module.split("."), ""][1]


def named(path: Path) -> str:
    """The module that a file is."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_go_the_allowed_way(path: Path) -> None:
    own = part(named(path))
    assert own in ALLOWED, f"{path}: say in {__file__} what {own} may import"
    used = {part(module) for module in imports(path) if module.split(".")[0] == "gangway"}
    assert used <= ALLOWED[own] | {own}


@pytest.mark.parametrize("name", PURE)
def test_what_is_pure_touches_nothing(name: str) -> None:
    path = SOURCE / "gangway" / name
    assert not {module.split(".")[0] for module in imports(path)} & IMPURE
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert "open" not in {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
