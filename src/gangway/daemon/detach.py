"""Makes a daemon that a command or a launcher has started independent of that process.

It would inherit that process's cgroup, whose limits would apply to it and whose end would kill it; its nice value,
scheduling policy, umask, limits of resources, ignored signals, working directory and descriptors.  What the kernel does
not let this process change stays as it is.  The environment is not inherited: who starts a daemon leaves it out.

The cgroup: under systemd, which owns the tree (systemd.io/CGROUP_DELEGATION), a scope of its own; elsewhere a group
beside the others in each hierarchy that is mounted.
"""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_STDERR = 2
_SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
_SYSTEMD_S = 10.0
_MOUNTS = Path("/proc/self/mountinfo")
_GROUPS = "gangway-netns-*"  # those of all network namespaces
_LEAVE_S, _LOOK_S = 5.0, 0.1  # how long the relay may take to end, and how often to look
_LIMITS = tuple(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))


class _Hierarchy(NamedTuple):
    """A mounted hierarchy of cgroups (cgroups(7))."""

    root: Path
    is_v2: bool


def detach(name: str, ready_fd: int | None) -> None:
    """Leave what belongs to the starting process; `name` is the cgroup's, `ready_fd` stays open."""
    os.chdir("/")
    os.umask(0o022)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > _STDERR and fd != ready_fd:
            with suppress(OSError):  # it may hold a lock, or keep a folder from being unmounted
                os.close(fd)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGHUP}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    with suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    _raise_limits()
    if not (_SYSTEMD.is_dir() and _start_scope(f"{name}-{os.getpid()}.scope")):
        _join_groups(name)


def remove_groups(name: str, is_relay_ending: bool) -> None:
    """Leave the cgroups that `detach` has created, and remove those without other processes.

    A relay that is ending is waited for; another one stays in them, and the next daemon joins it.  A group that is left
    empty later is removed by the next daemon of any network namespace.
    """
    deadline_s = time.monotonic() + (_LEAVE_S if is_relay_ending else 0)
    for group in groups(name):
        while group.is_dir():
            with suppress(OSError):
                (group.parent / "cgroup.procs").write_text(str(os.getpid()))
            with suppress(OSError):
                group.rmdir()
                break
            if time.monotonic() > deadline_s:
                break
            time.sleep(_LOOK_S)


def groups(name: str) -> list[Path]:
    """Return the cgroups of this name that there are, at most one in each hierarchy."""
    return [group for hierarchy in _hierarchies() if (group := hierarchy.root / name).is_dir()]


def _raise_limits() -> None:
    """Raise each limit to that of init, if it is lower."""
    for kind in _LIMITS:
        with suppress(OSError, ValueError):
            own, init = resource.getrlimit(kind), resource.prlimit(1, kind)
            soft, hard = (_greater(*pair) for pair in zip(own, init, strict=True))
            try:
                resource.setrlimit(kind, (soft, hard))
            except (OSError, ValueError):  # raising the hard limit takes CAP_SYS_RESOURCE
                is_higher = own[1] != resource.RLIM_INFINITY and (soft == resource.RLIM_INFINITY or soft > own[1])
                resource.setrlimit(kind, (own[1] if is_higher else soft, own[1]))


def _greater(one: int, other: int) -> int:
    return resource.RLIM_INFINITY if resource.RLIM_INFINITY in (one, other) else max(one, other)


def _start_scope(unit: str) -> bool:
    """Have systemd move this process to a scope (org.freedesktop.systemd1(5)); False if it does not."""
    service, path = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
    words = ["busctl", "call", service, path, f"{service}.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))"]
    words += [unit, "fail", "2", "PIDs", "au", "1", str(os.getpid()), "CollectMode", "s", "inactive-or-failed", "0"]
    try:
        return not subprocess.run(words, capture_output=True, timeout=_SYSTEMD_S, check=False).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def _join_groups(name: str) -> None:
    for hierarchy in _hierarchies():
        for stale in hierarchy.root.glob(_GROUPS):
            with suppress(OSError):  # it has processes; an empty one is of a daemon that was killed
                stale.rmdir()
        with suppress(OSError):  # read-only, or without the privilege
            group = hierarchy.root / name
            group.mkdir(exist_ok=True)
            for setting in ("cpuset.cpus", "cpuset.mems"):  # without values, no process may join (cpusets(7))
                if not hierarchy.is_v2 and (hierarchy.root / setting).exists():
                    (group / setting).write_text((hierarchy.root / setting).read_text())
            (group / "cgroup.procs").write_text(str(os.getpid()))


def _hierarchies() -> Iterator[_Hierarchy]:
    """Yield each hierarchy once, with the first place where it is mounted (proc_pid_mountinfo(5))."""
    seen = set()
    with suppress(OSError):
        for line in _MOUNTS.read_text().splitlines():
            mount, _, kind = line.partition(" - ")
            device, _root, place = mount.split()[2:5]
            if kind.split()[0] in ("cgroup", "cgroup2") and device not in seen:
                seen.add(device)
                yield _Hierarchy(Path(place.encode().decode("unicode_escape")), kind.startswith("cgroup2"))
