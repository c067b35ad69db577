"""Build a Debian package of gangway for one release, from the wheel.

    python3 scripts/build_deb.py bookworm build/dist/gangway-0.1.0-py3-none-manylinux_2_36_x86_64.whl

/usr/lib/gangway is a virtual environment that sees Debian's Python packages, too. It holds gangway, and those of its
dependencies that the release does not have or not new enough (packaging/SUITE.txt). /usr/bin has links to its commands,
so that the launcher finds the python3 beside it. Prints the package's path.
"""

import gzip
import os
import re
import shutil
import subprocess
import sys
from email.utils import formatdate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from zipfile import ZipFile

_TOP = Path(__file__).resolve().parents[1]
_FROM = _TOP / "packaging"
_COMMANDS = ("gangway", "gangway-docker-proxy")
_PROGRAM = """\
#!/usr/lib/gangway/bin/python3 -I
from gangway.cli import main

main()
"""
_ENVIRONMENT = "home = /usr/bin\ninclude-system-site-packages = true\nversion = {python}\n"


class Release(NamedTuple):
    """A release of Debian."""

    number: int
    python: str
    packages: tuple[str, ...]  # Debian's own of gangway's dependencies


RELEASES = {
    "bookworm": Release(12, "3.11", ("python3-rich",)),
    "trixie": Release(13, "3.13", ("python3-aiohttp", "python3-msgspec", "python3-psutil", "python3-rich")),
}


def main() -> None:
    """Build the package."""
    suite, wheel = sys.argv[1], Path(sys.argv[2])
    release = RELEASES[suite]
    version = f"{wheel.name.split('-')[1]}-1~deb{release.number}u1"
    with TemporaryDirectory() as folder:
        tree = Path(folder) / "gangway"
        tree.mkdir(mode=0o755)
        _install_environment(tree / "usr/lib/gangway", release, wheel, _FROM / f"{suite}.txt")
        for command in _COMMANDS:
            _link(tree / "usr/bin" / command, f"../lib/gangway/bin/{command}")
        _install_files(tree, version)
        _strip(tree)
        print(_pack(tree, version, release, wheel))


def _install_environment(target: Path, release: Release, wheel: Path, carried: Path) -> None:
    packages = target / f"lib/python{release.python}/site-packages"
    packages.mkdir(parents=True)
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    )
    subprocess.run((*pip, "--only-binary=:all:", "--target", packages, "--requirement", carried), check=True)
    shutil.rmtree(packages / "bin", ignore_errors=True)
    with ZipFile(wheel) as archive:
        archive.extractall(packages)
    (data,) = packages.glob("gangway-*.data")
    _write(target / "bin/gangway", _PROGRAM, 0o755)
    _copy(data / "scripts/gangway-docker-proxy", target / "bin/gangway-docker-proxy", 0o755)
    _install_shared(data / "data/share", target.parents[1] / "share")
    shutil.rmtree(data)
    _link(target / "bin/python3", "../../../bin/python3")
    _write(target / "pyvenv.cfg", _ENVIRONMENT.format(python=release.python))


def _install_shared(source: Path, target: Path) -> None:
    """Install what the wheel has for other programs: manual pages and completions."""
    for page in source.glob("man/*/*"):
        packed = target / page.relative_to(source).with_name(f"{page.name}.gz")
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(gzip.compress(page.read_bytes(), 9, mtime=0))
    for folder in ("bash-completion", "fish"):
        shutil.copytree(source / folder, target / folder)
    _copy(source / "zsh/site-functions/_gangway", target / "zsh/vendor-completions/_gangway")


def _install_files(tree: Path, version: str) -> None:
    documents = tree / "usr/share/doc/gangway"
    for unit in _TOP.glob("systemd/gangway*"):
        _copy(unit, tree / "usr/lib/systemd/system" / unit.name)
    _copy(_FROM / "sysusers.conf", tree / "usr/lib/sysusers.d/gangway.conf")
    _copy(_FROM / "tmpfiles.conf", tree / "usr/lib/tmpfiles.d/gangway.conf")
    _copy(_FROM / "lintian-overrides", tree / "usr/share/lintian/overrides/gangway")
    _copy(_FROM / "gangway.toml", documents / "examples/gangway.toml")
    _copy(_TOP / "README.md", documents / "README.md")
    _copy(_FROM / "copyright", documents / "copyright")
    changes = f"gangway ({version}) unstable; urgency=medium\n\n  * Version {version.partition('-')[0]}.\n\n"
    changes += f" -- {_maintainer()}  {formatdate(_epoch())}\n"
    (documents / "changelog.Debian.gz").write_bytes(gzip.compress(changes.encode(), 9, mtime=0))


def _pack(tree: Path, version: str, release: Release, wheel: Path) -> Path:
    major, minor = map(int, release.python.split("."))
    architecture = _output("dpkg", "--print-architecture")
    depends = [f"libc6 (>= {_glibc(wheel)})", f"python3 (>= {release.python})", f"python3 (<< {major}.{minor + 1})"]
    depends += [*release.packages, "iproute2", "libbpf1", "libnftables1", "netbase", "passwd"]
    sizes = [path.lstat().st_size for path in tree.rglob("*") if path.is_file()]
    template = (_FROM / "control").read_text()
    control = template.format(
        version=version,
        maintainer=_maintainer(),
        architecture=architecture,
        installed_kib=sum((size + 1023) // 1024 for size in sizes),
        depends=", ".join(depends),
    )
    _write(tree / "DEBIAN/control", control)
    for script in ("postinst", "prerm", "postrm"):
        _copy(_FROM / script, tree / "DEBIAN" / script, 0o755)
    package = wheel.parent / f"gangway_{version}_{architecture}.deb"
    subprocess.run(("dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, package), check=True, stdout=2)
    return package


def _strip(tree: Path) -> None:
    """Leave out what only debuggers need, and permissions that lintian warns of."""
    for path in [*tree.rglob("*")]:
        if path.is_symlink():
            continue
        if path.suffix == ".so" or path.name == "gangway-docker-proxy":
            subprocess.run(("strip", "--strip-unneeded", "--remove-section=.comment", path), check=True)
        path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)


def _glibc(wheel: Path) -> str:
    found = re.search(r"manylinux_(\d+)_(\d+)", wheel.name)
    assert found, f"{wheel.name} is not for glibc"
    return ".".join(found.groups())


def _epoch() -> float:
    return float(os.environ.get("SOURCE_DATE_EPOCH") or _output("git", "-C", str(_TOP), "log", "-1", "--format=%ct"))


def _maintainer() -> str:
    """Return who made the last commit.  (lintian refuses addresses that nobody can have.)"""
    return os.environ.get("DEBEMAIL") or _output("git", "-C", str(_TOP), "log", "-1", "--format=%an <%ae>")


def _output(*command: str) -> str:
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()


def _write(target: Path, text: str, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    target.chmod(mode)


def _copy(source: Path, target: Path, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _link(path: Path, to: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


if __name__ == "__main__":
    main()
