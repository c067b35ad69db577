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
    "intervals": set(),
    "log": set(),
    "runtime": set(),
    "model": {"errors"},
    "plan": {"errors", "model"},
    "firewall": {"errors", "model", "plan", "host", "state", "daemon"},
    "host": {"errors", "state"},
    "ebpf": {"errors", "host", "model", "plan", "reconcile", "relay"},
    "redirect": {"errors", "ebpf"},
    "relay": {"errors", "intervals", "log"},
    "docker_proxy": {"errors", "ebpf", "redirect", "relay", "log"},
    "reconcile": {"errors", "model", "plan", "firewall", "host", "ebpf", "relay", "state", "daemon", "log"},
    "state": {"errors", "model", "plan", "host", "ebpf", "reconcile", "relay", "daemon", "log", "intervals"},
    "daemon": {"errors", "model", "plan", "host", "ebpf", "relay", "reconcile", "state", "log"},
    # `run` makes the namespace that its command lives in: only the command's own process can.
    "cli": {"errors", "plan", "host", "runtime"},
}
PURE = (
    "model.py",
    "plan.py",
    "intervals.py",
    "firewall/nft/render.py",
    "firewall/iptables/render.py",
    "reconcile/diff.py",
    "state/port_index.py",
    "daemon/messages.py",
    "ebpf/keys.py",
    "ebpf/redirect_entries.py",
    "ebpf/steering_entries.py",
    "relay/flow.py",
    "relay/settings.py",
)
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
