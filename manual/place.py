"""Where the commands of a page run: a host with systemd, gangway's service and dockerd's, and another machine.

The host's file system is this machine's, of which all changes are kept in memory (lab/systemd.py), and its network
namespace is a new one.  `gangway` is found where the package installs it.
"""

import os
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from lab.closing import Closing
from lab.dockerd import busybox_archive
from lab.gangwayd import GANGWAY
from lab.netns import Namespace, Neighbour, end
from lab.systemd import Systemd, group_of
from lab.waiting import wait_until
from manual.consoles import Command

_TOP = Path(__file__).resolve().parents[1]
_MARK = "4f1d-end-of-the-command"
_END = re.compile(rf"\n{_MARK} (\d+)\n")
_PATIENCE_S = 30.0
_LOOKS, _LOOK_S = 5, 0.03
# Units here do not start what a whole system has.
_ALONE = "\n[Unit]\nDefaultDependencies=no\nAfter=\nBefore=\nWants=\n"
_DOCKERD = f"""{_ALONE}
[Service]
Type=notify
ExecStart=/usr/sbin/dockerd --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent=/{{group}}/docker
KillMode=process
"""
# What `apt install` does, and nothing of this machine's own settings and namespaces.
_PREPARE = f"""
umount --lazy /run/netns || true
ln -sf {GANGWAY} {GANGWAY}-docker-proxy /usr/bin
rm -rf /etc/gangway /etc/docker /var/lib/gangway
mkdir -p /var/lib/docker
cp -r {_TOP}/systemd/* /usr/lib/systemd/system/
mount -t tmpfs docker /var/lib/docker
"""
_IMAGE = "nginx"  # a name that readers know; it has busybox's web server
_SERVES = 'CMD ["sh", "-c", "echo hello >index.html; exec busybox httpd -f"]'
_ENVIRONMENT = {"HOME": "/root", "LANG": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "dumb"}


class Place(Closing):
    """The host and the other machine of a page."""

    def __init__(self) -> None:
        self._has_docker = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="gangway-manual-")))
            host = stack.enter_context(Namespace("host"))
            other = stack.enter_context(Neighbour(host))
            units = {path.name: path.read_text() + _ALONE for path in (_TOP / "systemd").iterdir()}
            units["docker.service"] = _DOCKERD.format(group=group_of(host))
            self._systemd = stack.enter_context(Systemd(host, units, scratch, sees_all_groups=True))
            self._systemd("sh", "-ec", _PREPARE)
            self._systemd("systemctl", "start", "gangway")
            self._host, self._other = (
                stack.enter_context(_Shell(one.command("env", "--chdir=/root", "bash", "--norc")))
                for one in (self._systemd, other)
            )
            self._stack = stack.pop_all()
        return self

    def run(self, command: Command) -> tuple[list[str], int]:
        """Run a page's command, and return the lines that it prints, and its exit code.

        AssertionError: it does not end.
        """
        if not self._has_docker and re.search(r"\bdocker\b", command.text):
            self._start_docker()
        shell = self._other if command.is_clients else self._host
        done = shell.run(command.text, len(command.output))
        for port in re.findall(r"docker run .*-p (\d+):", command.text):
            wait_until(partial(self._answers, port), f"the container's port {port}")
        return done

    def _answers(self, port: str) -> bool:
        """True if a container's server answers; `docker run` does not wait for it."""
        return self._systemd.run("curl", "--silent", "--max-time", "1", f"http://127.0.0.1:{port}/").returncode == 0

    def _start_docker(self) -> None:
        """Start dockerd, and make an image."""
        self._has_docker = True
        self._systemd("systemctl", "start", "docker")
        image = self._systemd.command("docker", "import", "--change", _SERVES, "-", _IMAGE)
        subprocess.run(image, input=busybox_archive(), check=True, capture_output=True)

    def close(self) -> None:
        """End all that the page's commands have started."""
        self._stack.close()


class _Shell(Closing):
    """A shell that reads one command after the other."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=_ENVIRONMENT, bufsize=0
        )
        return self

    def run(self, text: str, expected: int) -> tuple[list[str], int]:
        """Run a command; of one in the background, wait for as many lines as are expected."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{{ {text}\n}} </dev/null; printf '\\n{_MARK} %s\\n' $?\n".encode())
        printed = self._read_until(lambda printed: _END.search(printed), text)
        end_of_it = _END.search(printed)
        assert end_of_it is not None
        output, code = _without(printed, end_of_it), int(end_of_it[1])
        if text.endswith("&"):
            output += self._read_until(lambda later: (output + later).count("\n") >= expected, text)
            wait_until(self._is_idle, f"{text!r} to have started")
        return [line.rstrip() for line in output.splitlines()], code

    def close(self) -> None:
        end(self._process)

    def _is_idle(self) -> bool:
        """True if the processes that run in the background have nothing to do for a moment: they have started."""
        for _ in range(_LOOKS):
            if any(map(_is_busy, _descendants(self._process.pid))):
                return False
            time.sleep(_LOOK_S)
        return True

    def _read_until(self, is_enough: Callable[[str], object], text: str) -> str:
        """Return what the shell prints until that is enough; `text` is the command."""
        assert self._process.stdout is not None
        printed, deadline_s = b"", time.monotonic() + _PATIENCE_S
        while not is_enough(printed.decode(errors="replace")):
            left_s = deadline_s - time.monotonic()
            ready, _, _ = select.select([self._process.stdout], [], [], max(left_s, 0))
            received = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            assert received, f"{text!r} did not end within {_PATIENCE_S:g} s; it printed {printed.decode()!r}"
            printed += received
        return printed.decode()


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):  # it has ended
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            yield child
            yield from _descendants(child)


def _is_busy(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S"
    return False


def _without(printed: str, mark: re.Match[str]) -> str:
    """Return what was printed without the mark, and the line break that was printed before it."""
    return printed[: mark.start()] + printed[mark.end() :]
