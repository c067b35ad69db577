"""The wheel, installed with pip on minimal systems without compilers: the commands and the launcher work."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.roots import Root, fresh_root

_TOP = Path(__file__).parents[2]
_BIN = "/opt/gangway/bin"
_SERVE = "python3 -m http.server --bind 127.0.0.9 80"
_LAUNCHER = "-proto tcp -host-ip 127.0.0.1 -host-port 8001 -container-ip 127.0.0.9 -container-port 80"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(folder))
    subprocess.run((*command, str(_TOP)), check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def root(request: pytest.FixtureRequest, wheel: Path) -> Iterator[Root]:
    """A minimal system with gangway in /opt/gangway."""
    with fresh_root(request.param) as made:
        made.install("python3-venv")
        before_mb, start_s = made.size_mb(), time.monotonic()
        target = made.path / "root" / wheel.name
        target.write_bytes(wheel.read_bytes())
        made.run("python3", "-m", "venv", "/opt/gangway")
        made.run(f"{_BIN}/pip", "install", "--quiet", f"/root/{wheel.name}")
        took_s, grew_mb = time.monotonic() - start_s, made.size_mb() - before_mb
        print(f"\npip install on {request.param} took {took_s:.0f} s and {grew_mb} MB")
        assert made.run("sh", "-c", "command -v gcc cc clang make", check=False).stdout == ""
        yield made


def test_what_is_missing_is_named_with_its_package(root: Root) -> None:
    create = ("network", "create", "web", "--subnet", "172.30.0.0/24")
    done = root.run("unshare", "--net", f"{_BIN}/gangway", *create, check=False)
    assert done.returncode == 1
    assert "Debian: nftables" in done.stderr


def test_commands_and_launcher_work(root: Root) -> None:
    root.install("iproute2", "libbpf1", "netbase", "nftables")
    run = f"{_BIN}/gangway run -p 8000:8000 -- python3 -m http.server 8000"
    assert root.answer(run, "http://127.0.0.1:8000") == "200"
    launcher = f"{_SERVE} & exec {_BIN}/gangway-docker-proxy {_LAUNCHER} 3>/dev/null"
    assert root.answer(f"({launcher})", "http://127.0.0.1:8001") == "200"
