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

import sys
from pathlib import Path

from lab import roots

_FOLDER = Path(__file__).resolve().parents[1] / "build/engines"
_PACKAGES = (
    *("ca-certificates", "curl", "iproute2", "iptables", "nftables", "procps"),
    *("docker.io", "docker-cli", "podman", "netavark", "aardvark-dns", "conmon", "runc"),
    *("containernetworking-plugins", "passt", "rootlesskit", "busybox-static", "socat"),
)

# Makes $1 a root that dockerd accepts, in a mount namespace of its own; $2 is visible at the same path in it. dockerd
# changes the propagation of its root, which must be a mount for that. The root is read-only, as others may use it, too.
_MOUNT = """\
mkdir -p "$1/etc/docker"
mount --rbind "$1" "$1"
mount -o remount,bind,ro "$1"
for shared in proc sys dev; do mount --rbind /$shared "$1/$shared"; done
for private in etc/docker run tmp opt; do mount -t tmpfs -o mode=755 private "$1/$private"; done
mkdir -p "$1$2"
mount --bind "$2" "$1$2"
"""


def engine_root(suite: str) -> Path:
    """Return the root of a Debian release, which is built if it does not exist.  BuildFailed: it was not."""
    return roots.built_root(_FOLDER / suite, suite, _PACKAGES)


def mount_command(root: Path, visible: Path) -> list[str]:
    """Return a command that prepares a root for dockerd in the mount namespace that it runs in.

    Afterwards `chroot ROOT` enters it. The folder `visible` has the same path inside as outside.
    """
    return ["sh", "-ec", _MOUNT, "sh", str(root), str(visible)]


if __name__ == "__main__":
    try:
        print(engine_root(sys.argv[1]))
    except roots.BuildFailed as failed:
        sys.exit(f"lab: {failed}")
