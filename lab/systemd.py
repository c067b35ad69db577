"""systemd as the first process of its own PID namespace, for units that are tested with it.

    with Systemd(host, {"gangway.service": text}) as systemd:
        systemd("systemctl", "start", "gangway")

It runs in a host's network namespace on this machine's own file system, or on another root. All changes of files are
kept in memory (an overlay), and it has a /run, a /proc and units of its own: nothing else is started. It has a control
group of its own in every hierarchy. Leaving the block ends it, and with it every process that it has started.
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lab.closing import Closing
from lab.netns import Namespace, end
from lab.waiting import wait_until

_CGROUPS = Path("/sys/fs/cgroup")
_PROGRAM = "/lib/systemd/systemd"

# The last word has systemd 256 and later accept cgroups of version 1; they look for it where a kernel has its options.
# Of the control groups' controllers it knows those that are mounted: it would mount the others, and they would stay.
# Mounts are shared with the namespaces that systemd makes, as on any host: those of ip-netns, which come later, arrive.
_BOOT = r"""
set -e
for root in $(findmnt --raw --noheadings --output TARGET --types cgroup,cgroup2); do
    mkdir "$root/$NAME" || continue
    for file in cpuset.cpus cpuset.mems; do
        if [ -e "$root/tasks" ] && [ -e "$root/$file" ]; then cat "$root/$file" >"$root/$NAME/$file"; fi
    done
    echo $$ >"$root/$NAME/cgroup.procs"
done
exec unshare $CGROUP --pid --fork --kill-child --mount --propagation slave --uts --ipc sh -ec '
    mount -t tmpfs tmp "$SCRATCH"
    mkdir "$SCRATCH/up" "$SCRATCH/work" "$SCRATCH/root"
    mount -t overlay root -o "lowerdir=$LOWER,upperdir=$SCRATCH/up,workdir=$SCRATCH/work" "$SCRATCH/root"
    mount --make-rshared "$SCRATCH/root"
    cd "$SCRATCH/root"
    mount -t proc proc proc
    awk "\$2 != 0" proc/cgroups >"$SCRATCH/cgroups"
    mount --bind "$SCRATCH/cgroups" proc/cgroups
    mount -t tmpfs run run
    mkdir -p run/systemd/system run/netns
    mount --rbind /run/netns run/netns
    mount --make-rshared run/netns
    mount --rbind /dev dev
    mount --bind /tmp tmp
    mount -t sysfs sys sys
    if [ -z "$CGROUP" ]; then
        mount --rbind /sys/fs/cgroup sys/fs/cgroup
    elif [ -e /sys/fs/cgroup/cgroup.controllers ]; then
        mount -t cgroup2 cgroup sys/fs/cgroup
    else
        mount -t tmpfs cgroup sys/fs/cgroup
        mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
        mount -t cgroup -o none,name=systemd systemd sys/fs/cgroup/systemd
        mount -t cgroup2 unified sys/fs/cgroup/unified
    fi
    cp -r "$UNITS"/* run/systemd/system/
    exec chroot . "$PROGRAM" --system --unit=test.target SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1'
"""
_TARGET = "[Unit]\nDefaultDependencies=no\n"


def group_of(host: Namespace) -> str:
    """Return the name that the control group of a host's systemd has in every hierarchy; it is removed with systemd."""
    return f"{host.name}-systemd"


class Systemd(Closing):
    """systemd, and commands that run beside it."""

    def __init__(
        self,
        host: Namespace,
        units: Mapping[str, str],
        scratch: Path,
        root: Path = Path("/"),
        *,
        sees_all_groups: bool = False,
    ) -> None:
        """`units` are the texts of unit files, by their path; `scratch` is an empty folder.

        With `sees_all_groups` it has no namespace of control groups: eBPF programs are attached to the machine's root.
        """
        self._host, self._units, self._scratch, self._root = host, units, scratch, root
        self._cgroup = "" if sees_all_groups else "--cgroup"
        self._name = group_of(host)
        self._first: subprocess.Popen[Any] | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        units, root = self._scratch / "units", self._scratch / "root"
        units.mkdir()
        root.mkdir()
        for name, text in {"test.target": _TARGET, **self._units}.items():
            (units / name).parent.mkdir(exist_ok=True)
            (units / name).write_text(text)
        log = self._scratch / "systemd.log"
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "container": "test", "NAME": self._name}
        environment |= {"SCRATCH": str(root), "UNITS": str(units), "PROGRAM": _PROGRAM, "LOWER": str(self._root)}
        environment["CGROUP"] = self._cgroup
        with log.open("w") as output:
            self._first = self._host.popen("sh", "-c", _BOOT, stdout=output, stderr=output, env=environment)
        try:
            wait_until(self._has_booted, f"systemd to start; {log} may say why it does not")
        except BaseException:
            self.close()
            raise
        return self

    def __call__(self, *words: str) -> str:
        """Run a command beside systemd, and return its output.  CalledProcessError: it failed."""
        return self.run(*words, check=True).stdout

    def run(self, *words: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command beside systemd, and return its result."""
        return subprocess.run(self.command(*words), check=check, text=True, capture_output=True)

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` beside systemd."""
        return ["nsenter", "--all", f"--target={self._pid}", f"--root=/proc/{self._pid}/root", "--", *words]

    def path(self, path: str) -> Path:
        """Return where a file beside systemd can be found from here."""
        return Path(f"/proc/{self._pid}/root{path}")

    def close(self) -> None:
        """End systemd, and with it every process in its PID namespace."""
        if self._first is not None:
            end(self._first, patience_s=0)  # unshare ignores SIGTERM, and systemd ends with it
        wait_until(self._has_no_groups, "the control groups to be removed")

    def _has_no_groups(self) -> bool:
        """Remove the control groups; False: a process that has ended is still there."""
        try:
            for group in (*_CGROUPS.glob(self._name), *_CGROUPS.glob(f"*/{self._name}")):
                for folder, _, _ in os.walk(group, topdown=False):
                    os.rmdir(folder)
        except OSError:
            return False
        return True

    def _has_booted(self) -> bool:
        """True if systemd answers."""
        assert self._first is not None
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
        self._pid = next((int(one) for one in children if _name_of(one) == "systemd"), 0)
        return bool(self._pid) and self.run("systemctl", "is-active", "test.target").stdout == "active\n"


def _name_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
