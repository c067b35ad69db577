"""The wheel: what is in it, which machines it is for, and a build without the compilers."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from gangway.cli.commands import COMMANDS
from lab.roots import copy_sources
from scripts.build_hook import COMPLETIONS
from scripts.build_man import page_name

_TOP = Path(__file__).parents[2]
_COMPILED = ("build/gangway-docker-proxy", "src/gangway/relay/core/flow_table.h", "src/gangway/relay/core/core.so")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository's files, and what `make build` has compiled of them: it is newer, and not compiled again."""
    folder = tmp_path_factory.mktemp("sources")
    copy_sources(folder)
    for name in _COMPILED:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy2(_TOP / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Iterator[ZipFile]:
    done = _build(sources, os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    with ZipFile(next(sources.glob("dist/*.whl"))) as archive:
        yield archive


def _build(sources: Path, path: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "hatchling", "build", "--target", "wheel")
    return subprocess.run(
        command, cwd=sources, env={"PATH": path}, text=True, capture_output=True, check=False, timeout=50
    )


def test_all_modules_and_compiled_parts_are_in_the_wheel(wheel: ZipFile, sources: Path) -> None:
    names = set(wheel.namelist())
    modules = {str(path.relative_to(sources / "src")) for path in (sources / "src").rglob("*.py")}
    assert modules <= names
    for name in ("relay/core/core.so", "ebpf/redirect.bpf.o", "ebpf/steering.bpf.o"):
        assert wheel.read(f"gangway/{name}") == (sources / "src/gangway" / name).read_bytes()
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_the_launcher_is_an_executable_command(wheel: ZipFile) -> None:
    (launcher,) = (one for one in wheel.infolist() if one.filename.endswith(".data/scripts/gangway-docker-proxy"))
    assert wheel.read(launcher).startswith(b"\x7fELF")
    assert launcher.external_attr >> 16 & 0o111 == 0o111


def test_units_are_in_the_wheel(wheel: ZipFile, sources: Path) -> None:
    units = {path.name for path in sources.glob("systemd/gangway*")}
    assert units == {name.rpartition("/")[2] for name in wheel.namelist() if "/share/gangway/systemd/" in name}


def test_manual_pages_and_completions_are_in_the_wheel(wheel: ZipFile) -> None:
    shared = {name.partition(".data/data/share/")[2] for name in wheel.namelist()}
    pages = {f"man/man1/{page_name(name)}.1" for name in COMMANDS}
    assert {"man/man1/gangway.1", "man/man5/gangway.toml.5", *pages, *COMPLETIONS.values()} <= shared


def test_the_tag_names_architecture_and_oldest_glibc(wheel: ZipFile) -> None:
    assert wheel.filename is not None
    tag = re.search(rf"-py3-none-(?:manylinux_2_(\d+)|linux)_{os.uname().machine}\.whl$", wheel.filename)
    assert tag
    needed = re.findall(rb"GLIBC_2\.(\d+)", wheel.read("gangway/relay/core/core.so"))
    assert not tag[1] or max(map(int, needed)) <= int(tag[1])


def test_a_build_without_compilers_names_the_packages(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "make").symlink_to("/bin/true")
    done = _build(sources, str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "gangway cannot be built without gcc, musl-gcc: apt-get install gcc libc6-dev musl-tools"
    ]
