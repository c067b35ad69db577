"""Root file systems of Debian releases, by debootstrap: those of engines (lab/engines.py), and fresh ones.

    with fresh_root("trixie") as root:      # minbase, which has not even Python
        root.install("python3-venv")
        root.run("python3", "-m", "venv", "/opt/gangway")

A command in a fresh root has mount and process namespaces of its own: whatever it starts ends with it, unless the
machine's network namespaces are told. `run` uses the machine's network, to download packages; `run_offline` a network
namespace with nothing but a loopback interface.
"""

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

_TOP = Path(__file__).resolve().parents[1]
_FOLDER = _TOP / "build/roots"
_DEFAULT_MIRROR = "http://deb.debian.org/debian"
_OWN_PROCESSES = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
_CERTIFICATES = "/root/certificates.pem"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Enters the root $1 and runs the other arguments there.  A mount point, as `ip netns` changes the root's propagation.
_ENTER = """\
root=$1; shift
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
for shared in sys dev; do mount --rbind /$shared "$root/$shared"; done
mount -t tmpfs -o mode=755 run "$root/run"
exec chroot "$root" "$@"
"""
_OFFLINE = ("unshare", "--net", "sh", "-ec", 'ip link set lo up; exec "$@"', "sh")

# Asks for a page until the server has started.
_ASK = """\
import sys, time, urllib.request
for _ in range(100):
    try:
        print(urllib.request.urlopen(sys.argv[1], timeout=3).status)
        break
    except OSError:
        time.sleep(0.1)
"""


class BuildFailed(RuntimeError):
    """A root was not built; the message contains debootstrap's last line."""


class Root(NamedTuple):
    """A root file system that may be changed."""

    path: Path

    def install(self, *packages: str) -> None:
        """Install Debian packages, without those that are only recommended."""
        self.run("apt-get", "-qq", "update")
        self.run("apt-get", "-qq", "--yes", "--no-install-recommends", "install", *packages)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command with the machine's network; AssertionError shows what it printed, if it fails and `check`."""
        environment = [_PATH, "HOME=/root", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"]
        environment += [f"PIP_CERT={_CERTIFICATES}"] if (self.path / _CERTIFICATES[1:]).exists() else []
        enter = (*_OWN_PROCESSES, "sh", "-ec", _ENTER, "sh", str(self.path), "env", "-i", *environment)
        done = subprocess.run((*enter, *command), text=True, capture_output=True, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def run_offline(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a network namespace of its own; needs iproute2 in the root."""
        return self.run(*_OFFLINE, *command)

    def answer(self, server: str, url: str) -> str:
        """Return the HTTP status that a server gives, a shell command, in a network namespace of its own."""
        script = f"{server} >/dev/null 2>&1 & exec python3 -c '{_ASK}' {url}"
        return self.run_offline("sh", "-c", script).stdout.strip()

    def add_sources(self, folder: str) -> None:
        """Add this repository's files."""
        copy_sources(self.path / folder.lstrip("/"))

    def size_mb(self) -> int:
        """Return how much of the disk it uses, in MB of 2**20 bytes."""
        listed = subprocess.run(("du", "-smx", str(self.path)), text=True, capture_output=True, check=True)
        return int(listed.stdout.split()[0])


@contextmanager
def fresh_root(suite: str) -> Iterator[Root]:
    """Yield a copy of a release's minbase, which is built the first time."""
    base = built_root(_FOLDER / suite, suite, ())
    with TemporaryDirectory(prefix=f"{suite}-", dir=_FOLDER) as folder:
        path = Path(folder) / "root"
        subprocess.run(("cp", "--archive", str(base), str(path)), check=True)
        shutil.copy("/etc/resolv.conf", path / "etc/resolv.conf")
        if certificates := os.environ.get("PIP_CERT"):  # this machine's way to PyPI needs them
            shutil.copy(certificates, path / _CERTIFICATES[1:])
        yield Root(path)


def copy_sources(target: Path) -> None:
    """Copy the files of this repository that are in git or about to be."""
    command = ("git", "-C", str(_TOP), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (_TOP / name).exists():  # else it is about to be deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_TOP / name, target / name)


def built_root(root: Path, suite: str, packages: Sequence[str]) -> Path:
    """Return the root of a Debian release, which is built if it does not exist.

    If several processes need it at once, one builds it and the others wait. The root is created by a rename, so it is
    always complete. BuildFailed: it was not built.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            print(f"lab: building {root} (only once)", file=sys.stderr)
            _build(suite, root, packages, lock.fileno())
    return root


def _build(suite: str, root: Path, packages: Sequence[str], lock: int) -> None:
    unfinished = root.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)  # left behind by a killed run
    # debootstrap mounts /proc and /sys below the root. In namespaces of its own neither these mounts nor its programs
    # outlast it, and until they have all ended they hold the lock: nobody deletes a root that is still written to.
    include = [f"--include={','.join(packages)}"] if packages else []
    command = [*_OWN_PROCESSES, "--mount-proc", "debootstrap", "--variant=minbase", *include]
    command += [suite, str(unfinished), _mirror()]
    done = subprocess.run(command, text=True, capture_output=True, check=False, pass_fds=[lock])
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise BuildFailed(f"debootstrap {suite} failed: {(lines or ['no output'])[-1]}")
    for archive in (unfinished / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    unfinished.rename(root)


def _mirror() -> str:
    """Return the mirror from which apt gets this machine's own release."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME")
    command = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Identifier: Packages", "Component: main"]
    for line in subprocess.run(command, text=True, capture_output=True, check=False).stdout.splitlines():
        if line.endswith(f" {release}"):
            return line.split()[0]
    return _DEFAULT_MIRROR
