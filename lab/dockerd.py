"""A real dockerd in a network namespace of its own, with the proxy that is to be tried.

What this file knows: how to run dockerd beside the machine's own (if it has one) so that nothing of it stays behind.

How it works.  dockerd enters the network namespace and gets a mount namespace, directories, a socket, a configuration
and a control group of its own.  The mount namespace is also how its processes are known again: containerd, the shims
and the proxies inherit it, whoever their parent is by now.  Containers have mount namespaces of their own, but a shim
as parent.

    with Host() as host, Dockerd(host, Path("/usr/sbin/docker-proxy")) as docker:
        docker.run("run", "-d", "--init", "--name", "web", "-p", "8000:80", docker.image, "sleep", "1h")
        docker.popen_in("web", "socat", "TCP-LISTEN:80,fork", "PIPE")    # a program of this machine, in there

There is no registry: the one image is made of this machine's static busybox.  Its wget and nc are of little use, so
servers are better started from outside, as above.
"""

import http.client
import io
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.netns import Namespace, end
from lab.waiting import wait_until

DOCKERD = Path("/usr/sbin/dockerd")
_APPLETS = ("sh", "sleep", "cat", "ip", "nc", "true")
# What dockerd, containerd and its shims make at fixed places, whatever they are told; the innermost first.
_TRACES = tuple(
    Path(path)
    for path in (
        "/etc/docker/key.json",
        "/etc/docker",
        "/opt/containerd/bin",
        "/opt/containerd/lib",
        "/opt/containerd",
        "/run/containerd/s",
        "/run/containerd",
        "/run/docker/plugins",
        "/run/docker",
    )
)


class DockerFailed(RuntimeError):
    """dockerd did not start, or a docker command failed; the message holds what it said."""


class Dockerd:
    """A running dockerd, and the docker command line to it.

    The namespace's docker0 is 172.17.0.1.  If the namespace has a default route, containers have a way out, too.
    """

    image = "busybox:lab"

    def __init__(self, namespace: Namespace, proxy: Path | None = None, *extra_flags: str) -> None:
        self._namespace = namespace
        self._flags = [*extra_flags]
        if proxy is not None:
            self._flags.append(f"--userland-proxy-path={proxy.absolute()}")
        self._daemon: subprocess.Popen[Any] | None = None
        self._servers: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Self:
        self._mounts = _new_mount_namespace()
        self._root = Path(tempfile.mkdtemp(prefix=f"{self._namespace.name}-docker-"))
        self._traces = [path for path in _TRACES if not path.exists()]
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("DOCKER_")}
        self._environment["DOCKER_CONFIG"] = str(self._root / "client")
        (self._root / "daemon.json").write_text("{}")
        try:
            self.start()
            self.run("import", "-", self.image, input=_busybox_archive(), text=False)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """dockerd's own pid."""
        assert self._daemon is not None
        return self._daemon.pid

    @property
    def log(self) -> str:
        """What dockerd has logged since its first start."""
        return (self._root / "log").read_text()

    def start(self) -> None:
        """Starts dockerd on its data, and waits until it answers."""
        # kill() leaves these behind, and dockerd believes them if the pid is in use again.
        for stale in ("dockerd.pid", "exec/containerd/containerd.pid"):
            (self._root / stale).unlink(missing_ok=True)
        with (self._root / "log").open("a") as log:
            # A session of its own: a Ctrl-C at the terminal is for us, who then end it in good order.
            self._daemon = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self._environment, "TMPDIR": str(self._root)},  # a containerd that is stuck leaves a dump
            )
        wait_until(self._answers, "dockerd's answer", 30)

    def kill(self) -> None:
        """Ends dockerd by SIGKILL.  Its containerd goes along (a parent-death signal); containers and shims stay."""
        assert self._daemon is not None
        self._daemon.kill()
        self._daemon.wait()
        wait_until(lambda: not self._find("containerd"), "the end of dockerd's containerd")

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs `docker WORDS`; DockerFailed with its message if it fails, unless `check=False`."""
        check = options.pop("check", True)
        options = {"text": True, "capture_output": True, "env": self._environment, **options}
        command = [_docker(), "-H", f"unix://{self._root}/socket", *words]
        done = subprocess.run(command, check=False, **options)
        if check and done.returncode:
            said = done.stderr if isinstance(done.stderr, str) else (done.stderr or b"").decode(errors="replace")
            raise DockerFailed(f"docker {' '.join(words)}: {said.strip()}")
        return done

    def pid_of(self, name: str) -> int:
        """The pid of a container's first process; 0 if it does not run."""
        return int(self.run("inspect", "-f", "{{.State.Pid}}", name).stdout)

    def address_of(self, name: str) -> str:
        """A container's address on docker0."""
        return self.run("inspect", "-f", "{{.NetworkSettings.IPAddress}}", name).stdout.strip()

    def command_in(self, name: str, *words: str) -> list[str]:
        """The command line that runs a program of this machine in a container's network namespace."""
        return ["nsenter", f"--net=/proc/{self.pid_of(name)}/ns/net", "--", *words]

    def popen_in(self, name: str, *words: str, **options: Any) -> subprocess.Popen[Any]:
        """Starts a program of this machine in a container's network namespace; it ends with the container, or before.

        That takes the container's process namespace, too.  A program that outlived the container would keep its address
        in use.  The process that is given is nsenter's; the program is its child, and ends with it.
        """
        command = ["nsenter", "--target", str(self.pid_of(name)), "--net", "--pid", "--"]
        process = subprocess.Popen([*command, "setpriv", "--pdeathsig", "KILL", "--", *words], **options)
        self._servers.append(process)
        return process

    def processes(self) -> dict[int, list[str]]:
        """What dockerd has started and what those have, by pid, with its command line; containers are not among it."""
        found = {}
        ours = os.readlink(f"/proc/self/fd/{self._mounts}")
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):  # it has ended meanwhile
                    if os.readlink(entry / "ns/mnt") == ours:
                        found[int(entry.name)] = (entry / "cmdline").read_text().split("\0")[:-1]
        return found

    def close(self) -> None:
        """Ends the servers, the containers, dockerd and all that it started.

        Each step is taken even if one before it fails or is interrupted.
        """
        with ExitStack() as steps:
            steps.callback(self._remove_traces)
            steps.callback(self._end_rest)
            steps.callback(self._end_daemon)
            steps.callback(self._remove_containers)
            steps.callback(self._end_servers)

    def _command(self) -> list[str]:
        return self._namespace.command(
            *("nsenter", f"--mount=/proc/{os.getpid()}/fd/{self._mounts}", "--"),
            *("setpriv", "--pdeathsig", "TERM", "--"),  # nothing stays, even if this process is killed
            str(DOCKERD),
            *("--group", "root", "--host", f"unix://{self._root}/socket", "--pidfile", f"{self._root}/dockerd.pid"),
            *("--config-file", f"{self._root}/daemon.json"),  # not the machine's own
            *("--data-root", f"{self._root}/data", "--exec-root", f"{self._root}/exec"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{self._root.name}"),
            *self._flags,
        )

    def _answers(self) -> bool:
        assert self._daemon is not None
        if self._daemon.poll() is not None:
            raise DockerFailed(f"dockerd ended: {(self.log.splitlines() or ['it said nothing'])[-1]}")
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError, http.client.HTTPException):
            client.settimeout(5)
            client.connect(f"{self._root}/socket")
            client.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            response = http.client.HTTPResponse(client)
            response.begin()
            return response.status == 200
        return False

    def _find(self, program: str) -> list[int]:
        return [pid for pid, words in self.processes().items() if words and Path(words[0]).name == program]

    def _end_servers(self) -> None:
        while self._servers:
            end(self._servers.pop())

    def _remove_containers(self) -> None:
        if self._daemon is not None and self._daemon.poll() is None:
            names = self.run("ps", "-aq", timeout=30).stdout.split()
            if names:
                self.run("rm", "-f", *names, timeout=120)

    def _end_daemon(self) -> None:
        if self._daemon is not None:
            end(self._daemon, patience_s=20)

    def _end_rest(self) -> None:
        """What dockerd leaves: a relay that lingers; and after a failure shims, and the containers below them."""
        for pid in self._find("containerd-shim-runc-v2"):
            for child in _children(pid):
                _send(child, signal.SIGKILL)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.processes():
                _send(pid, sent)
            with suppress(AssertionError):
                wait_until(lambda: not self.processes(), "their end", 5)
                return
        raise DockerFailed(f"still there: {self.processes()}")

    def _remove_traces(self) -> None:
        os.close(self._mounts)
        for group in (
            *Path("/sys/fs/cgroup").glob(self._root.name),
            *Path("/sys/fs/cgroup").glob(f"*/{self._root.name}"),
        ):
            _remove_groups(group)
        for path in self._traces:
            with suppress(OSError):  # not made, or in use by another dockerd
                path.rmdir() if path.is_dir() else path.unlink()
        shutil.rmtree(self._root)


def _new_mount_namespace() -> int:
    """A mount namespace, which lasts as long as the descriptor: a dockerd that follows a killed one finds its mounts.

    Nothing that is mounted in there is seen outside.
    """
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"!")
        process.stdin.flush()
        process.stdout.read(1)  # it is in there now
        return os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)


def _docker() -> str:
    """Debian's client.  Another one may come first on the path, and may ask more of dockerd than this one knows."""
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"


def _busybox_archive() -> bytes:
    busybox = Path(shutil.which("busybox") or "/bin/busybox").resolve()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(busybox, "bin/busybox")
        for applet in _APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return archive.getvalue()


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    return []


def _send(pid: int, what: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, what)


def _remove_groups(group: Path) -> None:
    """A control group and those below it, which can only be removed one by one."""
    for child in group.iterdir():
        if child.is_dir():
            _remove_groups(child)
    group.rmdir()
