"""Container engines of other Debian releases: root file systems that they run from.

    with Host() as host, Dockerd(host, engine=engine_root("trixie")) as docker:
        ...

debootstrap builds a root in build/engines, the first time only: it downloads 150 MB, and takes one to two minutes. The
root is never written to afterwards. Delete the folder to get the release's current packages (sid's change every day).
`python3 -m lab.engines SUITE` builds a root and prints its path.

    suite   Debian  dockerd  podman
    trixie  13      26.1     5.4
    sid     -       28.5     5.8
"""

import fcntl
import platform
import shutil
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1] / "build/engines"
_PACKAGES = (
    *("ca-certificates", "curl", "iproute2", "iptables", "nftables", "procps"),
    *("docker.io", "docker-cli", "podman", "netavark", "aardvark-dns", "conmon", "runc"),
    *("containernetworking-plugins", "passt", "rootlesskit", "busybox-static", "socat"),
)
_DEFAULT_MIRROR = "http://deb.debian.org/debian"

# Makes $1 a root that dockerd accepts, in a mount namespace of its own; $2 is visible at the same path in it. dockerd
# changes the propagation of its root, which must be a mount for that. The root is read-only, as others may use it, too.
_MOUNT = """\
mount --rbind "$1" "$1"
mount -o remount,bind,ro "$1"
for shared in proc sys dev; do mount --rbind /$shared "$1/$shared"; done
for private in etc/docker run tmp opt; do mount -t tmpfs -o mode=755 private "$1/$private"; done
mkdir -p "$1$2"
mount --bind "$2" "$1$2"
"""


class BuildFailed(RuntimeError):
    """A root was not built; the message contains debootstrap's last line."""


def engine_root(suite: str) -> Path:
    """Return the root of a Debian release, which is built if it does not exist.

    If several processes need it at once, one builds it and the others wait. The root is created by a rename, so it is
    always complete. BuildFailed: it was not built.
    """
    root = _FOLDER / suite
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with (_FOLDER / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            print(f"lab: building {root} (only once)", file=sys.stderr)
            _build(suite, root, lock.fileno())
    return root


def mount_command(root: Path, visible: Path) -> list[str]:
    """Return a command that prepares a root for dockerd in the mount namespace that it runs in.

    Afterwards `chroot ROOT` enters it. The folder `visible` has the same path inside as outside.
    """
    return ["sh", "-ec", _MOUNT, "sh", str(root), str(visible)]


def _build(suite: str, root: Path, lock: int) -> None:
    unfinished = root.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)  # left behind by a killed run
    # debootstrap mounts /proc and /sys below the root. In namespaces of its own neither these mounts nor its programs
    # outlast it, and until they have all ended they hold the lock: nobody deletes a root that is still written to.
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [
        "debootstrap",
        "--variant=minbase",
        f"--include={','.join(_PACKAGES)}",
        suite,
        str(unfinished),
        _mirror(),
    ]
    done = subprocess.run(command, text=True, capture_output=True, check=False, pass_fds=[lock])
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise BuildFailed(f"debootstrap {suite} failed: {(lines or ['no output'])[-1]}")
    for archive in (unfinished / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    (unfinished / "etc/docker").mkdir(exist_ok=True)
    unfinished.rename(root)


def _mirror() -> str:
    """Return the mirror from which apt gets this machine's own release."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME")
    command = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Identifier: Packages", "Component: main"]
    for line in subprocess.run(command, text=True, capture_output=True, check=False).stdout.splitlines():
        if line.endswith(f" {release}"):
            return line.split()[0]
    return _DEFAULT_MIRROR


if __name__ == "__main__":
    try:
        print(engine_root(sys.argv[1]))
    except BuildFailed as failed:
        sys.exit(f"lab: {failed}")
