"""The Debian packages on minimal systems: lintian, the demo, the launcher; purged, they leave the system as it was."""

import hashlib
import os
import subprocess
import time
from pathlib import Path

from lab.roots import Root

_SOURCES = "/root/gangway"
_SERVE = "python3 -m http.server --bind 127.0.0.9 80"
_LAUNCHER = "-proto tcp -host-ip 127.0.0.1 -host-port 8001 -container-ip 127.0.0.9 -container-port 80"
_APPLIED = '[[network]]\nname = "web"\n'
_DECLARE = """
ip netns add box
gangway attach box
gangway publish box --keep -p 127.0.0.1:8002:80
gangway apply /root/web.toml
"""
# What apt and dpkg write for any package, and copies of the former lists of users.
_OTHERS = ("proc", "sys", "dev", "run", "tmp", "root", "var/lib/dpkg", "var/lib/apt", "var/cache/apt", "var/log")
_BACKUPS = ("etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-", "var/cache/ldconfig/aux-cache")
_FILES = (
    "usr/bin/gangway",
    "usr/bin/gangway-docker-proxy",
    "usr/lib/systemd/system/gangway.service",
    "usr/lib/sysusers.d/gangway.conf",
    "usr/lib/tmpfiles.d/gangway.conf",
    "usr/share/bash-completion/completions/gangway",
    "usr/share/fish/vendor_completions.d/gangway.fish",
    "usr/share/man/man1/gangway.1.gz",
    "usr/share/man/man1/gangway-docker-proxy.1.gz",
    "usr/share/man/man5/gangway.toml.5.gz",
    "usr/share/zsh/vendor-completions/_gangway",
    "usr/share/doc/gangway/examples/gangway.toml",
    "usr/share/doc/gangway/changelog.Debian.gz",
    "usr/share/doc/gangway/copyright",
)


def test_lintian_finds_no_errors(package: Path) -> None:
    done = subprocess.run(("lintian", "--fail-on", "error", package), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "E: " not in done.stdout


def test_a_purge_leaves_the_system_as_it_was(root: Root, package: Path) -> None:
    root.install("procps")  # the demo's
    root.add_sources(_SOURCES)
    caches = [path / "__pycache__" for path in (root.path / "usr/lib/python3", *root.path.glob("usr/lib/python3.*"))]
    for cache in caches:  # what another program has compiled with -OO
        cache.mkdir(exist_ok=True)
        (cache / "other.cpython-3.opt-2.pyc").touch()
    before, start_s, before_mb = _contents(root), time.monotonic(), root.size_mb()
    root.run("apt-get", "-qq", "--yes", "install", f"/root/{package.name}")
    print(f"\n{package.name}: {time.monotonic() - start_s:.0f} s and {root.size_mb() - before_mb} MB")
    assert [name for name in _FILES if not os.path.lexists(root.path / name)] == []
    (root.path / _SOURCES[1:] / ".venv").symlink_to("/usr/lib/gangway")  # where the demo looks for commands
    shown = root.run("sh", "-c", f"cd {_SOURCES} && .venv/bin/python3 -m demo").stdout
    assert "Everything was cleaned up" in shown
    assert "redirect" in shown
    launcher = f"{_SERVE} & exec gangway-docker-proxy {_LAUNCHER} 3>/dev/null"
    assert root.answer(f"({launcher})", "http://127.0.0.1:8001") == "200"
    (root.path / "root/web.toml").write_text(_APPLIED)
    root.run_offline("sh", "-ec", _DECLARE)
    assert sorted(os.listdir(root.path / "etc/gangway/conf.d")) == ["kept.toml", "web.toml"]
    root.run("apt-get", "-qq", "--yes", "purge", "gangway")
    after = _contents(root)
    assert sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)) == []


def _contents(root: Root) -> dict[str, str]:
    """Return a digest of each file, or where a link leads, by path in the root."""
    found = {}
    for folder, folders, files in os.walk(root.path):
        place = Path(folder).relative_to(root.path)
        folders[:] = [name for name in folders if str(place / name) not in _OTHERS]
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink():
                found[str(place / name)] = str(path.readlink())
            else:
                found[str(place / name)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return {name: text for name, text in found.items() if name not in _BACKUPS}
