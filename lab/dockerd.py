"""A real dockerd in its own network namespace, with the proxy under test.

It runs beside the machine's own dockerd, if there is one, and leaves nothing behind. It enters the network namespace,
and gets its own mount namespace, directories, socket, configuration and control group. The mount namespace also
identifies its processes: containerd, the shims and the proxies inherit it, and keep it when their parent exits.
Containers have their own mount namespaces, but a shim as parent.

    with Host() as host, Dockerd(host, Path("/usr/sbin/docker-proxy")) as docker:
        docker.run("run", "-d", "--init", "--name", "web", "-p", "8000:80", docker.image, "sleep", "1h")
        docker.popen_in("web", "socat", "TCP-LISTEN:80,fork", "PIPE")    # a program of this machine

No registry is needed: the only image contains this machine's static busybox. Its wget and nc can do little, so start
servers from outside, as above.

The dockerd of another Debian release runs from a root of lab/engines.py, in which it finds the containerd, runc,
iptables and docker command of that release. The proxy under test is this machine's, and runs outside of the root.
"""

import errno
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
from typing import Any, Self

from lab.closing import Closing
from lab.engines import mount_command
from lab.netns import Namespace, end
from lab.processes import processes_in
from lab.waiting import wait_until

DOCKERD = Path("/usr/sbin/dockerd")
_APPLETS = ("sh", "sleep", "cat", "ip", "nc", "true")
# What dockerd, containerd and its shims create at fixed paths, whatever their options; innermost first.
_FIXED_PATHS = tuple(
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
# Runs the proxy outside of an engine's root: to enter a mount namespace, even the own one, is to leave a changed root.
_OUTSIDE = """\
#!/bin/sh
exec nsenter --mount=/proc/self/ns/mnt -- {program} "$@"
"""


class DockerFailed(RuntimeError):
    """dockerd did not start, or a docker command failed; the message contains its error."""


class Dockerd(Closing):
    """A running dockerd, and its docker command line.

    The namespace's docker0 is 172.17.0.1. If the namespace has a default route, containers can use it, too.
    """

    image = "busybox:lab"

    def __init__(
        self, namespace: Namespace, proxy: Path | None = None, *extra_flags: str, engine: Path | None = None
    ) -> None:
        """`engine` is the root that dockerd runs from; None: this machine's own."""
        self._namespace = namespace
        self._proxy = proxy
        self._extra_flags = extra_flags
        self._engine = engine
        self._daemon: subprocess.Popen[Any] | None = None
        self._servers: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Self:
        self._root = Path(tempfile.mkdtemp(prefix=f"{self._namespace.name}-docker-"))
        try:
            self._mounts = _new_mount_namespace(mount_command(self._engine, self._root) if self._engine else [])
        except BaseException:
            self._root.rmdir()
            raise
        self._created = [] if self._engine else [path for path in _FIXED_PATHS if not path.exists()]
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("DOCKER_")}
        self._environment["DOCKER_CONFIG"] = str(self._root / "client")
        (self._root / "daemon.json").write_text("{}")
        try:
            self.start()
            self.run("import", "-", self.image, input=busybox_archive(), text=False)
        except BaseException:
            self.close()
            raise
        return self

    @property
    def pid(self) -> int:
        """The pid of dockerd itself."""
        assert self._daemon is not None
        return self._daemon.pid

    @property
    def socket(self) -> Path:
        """The socket of dockerd's API."""
        return self._root / "socket"

    @property
    def log(self) -> str:
        """dockerd's log since its first start."""
        return (self._root / "log").read_text()

    def start(self) -> None:
        """Start dockerd on its data directory, and wait until it answers."""
        # kill() leaves these files behind, and dockerd refuses to start if another process has the pid by now.
        for stale in ("dockerd.pid", "exec/containerd/containerd.pid"):
            (self._root / stale).unlink(missing_ok=True)
        with (self._root / "log").open("a") as log:
            # In its own session: Ctrl-C at the terminal interrupts only us, and close() then stops dockerd.
            self._daemon = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self._environment, "TMPDIR": str(self._root)},  # a containerd that hangs writes a dump there
            )
        wait_until(self._answers, "dockerd to answer", 30)

    def kill(self) -> None:
        """End dockerd with SIGKILL. Its containerd dies, too (parent-death signal); containers and shims stay."""
        assert self._daemon is not None
        self._daemon.kill()
        self._daemon.wait()
        wait_until(lambda: not self._find("containerd"), "dockerd's containerd to exit")

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `docker WORDS`. DockerFailed: it failed, and `check` is not False."""
        check = options.pop("check", True)
        options = {"text": True, "capture_output": True, "env": self._environment, **options}
        program = self._within("docker") if self._engine else [_docker()]
        command = [*program, "-H", f"unix://{self.socket}", *words]
        done = subprocess.run(command, check=False, **options)
        if check and done.returncode:
            stderr = done.stderr if isinstance(done.stderr, str) else (done.stderr or b"").decode(errors="replace")
            raise DockerFailed(f"docker {' '.join(words)}: {stderr.strip()}")
        return done

    def pid_of(self, name: str) -> int:
        """Return the pid of a container's first process; 0 if the container is not running."""
        return int(self.run("inspect", "-f", "{{.State.Pid}}", name).stdout)

    def address_of(self, name: str) -> str:
        """Return a container's address on docker0."""
        return self.run("inspect", "-f", "{{.NetworkSettings.IPAddress}}", name).stdout.strip()

    def command_in(self, name: str, *words: str) -> list[str]:
        """Return the command line that runs a program of this machine in a container's network namespace."""
        return ["nsenter", f"--net=/proc/{self.pid_of(name)}/ns/net", "--", *words]

    def popen_in(self, name: str, *words: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a program of this machine in a container's network namespace; it ends with the container at the latest.

        It is also in the container's process namespace, so that it cannot outlive the container and keep its address
        in use. The returned process is nsenter; the program is its child, and ends with it.
        """
        command = ["nsenter", "--target", str(self.pid_of(name)), "--net", "--pid", "--"]
        process = subprocess.Popen([*command, "setpriv", "--pdeathsig", "KILL", "--", *words], **options)
        self._servers.append(process)
        return process

    def processes(self) -> dict[int, list[str]]:
        """Return the command lines of dockerd and of all that it has started, by pid, without the containers.

        The launchers are among them, and so are the daemon and the relay that the launchers have started.
        """
        return processes_in(self._mounts, "mnt")

    def close(self) -> None:
        """Stop the servers, the containers, dockerd and all that it has started.

        Each step is taken even if one before it fails or is interrupted.
        """
        with ExitStack() as steps:
            steps.callback(self._remove_files)
            steps.callback(self._end_rest)
            steps.callback(self._end_daemon)
            steps.callback(self.remove_containers)
            steps.callback(self._end_servers)

    def _within(self, *words: str) -> list[str]:
        """Return the command line that runs a program in dockerd's mount namespace and root."""
        root = ["chroot", str(self._engine)] if self._engine else []
        return ["nsenter", f"--mount=/proc/{os.getpid()}/fd/{self._mounts}", "--", *root, *words]

    def _proxy_flags(self) -> list[str]:
        if self._proxy is None:
            return []
        program = self._proxy.absolute()
        if self._engine:
            program = self._root / "proxy"
            program.write_text(_OUTSIDE.format(program=self._proxy.absolute()))
            program.chmod(0o755)
        return [f"--userland-proxy-path={program}"]

    def _command(self) -> list[str]:
        return self._namespace.command(
            *("setpriv", "--pdeathsig", "TERM", "--"),  # dockerd ends even if this process is killed
            *self._within(str(DOCKERD)),
            *("--group", "root", "--host", f"unix://{self.socket}", "--pidfile", f"{self._root}/dockerd.pid"),
            *("--config-file", f"{self._root}/daemon.json"),  # not the machine's own
            *("--data-root", f"{self._root}/data", "--exec-root", f"{self._root}/exec"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{self._root.name}"),
            *self._extra_flags,
            *self._proxy_flags(),
        )

    def _answers(self) -> bool:
        assert self._daemon is not None
        if self._daemon.poll() is not None:
            raise DockerFailed(f"dockerd exited: {(self.log.splitlines() or ['no log'])[-1]}")
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError, http.client.HTTPException):
            client.settimeout(5)
            client.connect(str(self.socket))
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

    def remove_containers(self) -> None:
        """Remove all containers, running or not."""
        if self._daemon is not None and self._daemon.poll() is None:
            names = self.run("ps", "-aq", timeout=30).stdout.split()
            if names:
                self.run("rm", "-f", *names, timeout=120)

    def _end_daemon(self) -> None:
        if self._daemon is not None:
            end(self._daemon, patience_s=20)

    def _end_rest(self) -> None:
        """End what dockerd leaves running: the daemon and the relay; after a failure shims and their containers."""
        for pid in self._find("containerd-shim-runc-v2"):
            for child in _children(pid):
                _send(child, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.processes():
                _send(pid, number)
            with suppress(AssertionError):
                wait_until(lambda: not self.processes(), "dockerd's processes to exit", 5)
                return
        raise DockerFailed(f"still running: {self.processes()}")

    def _remove_files(self) -> None:
        os.close(self._mounts)
        for group in (
            *Path("/sys/fs/cgroup").glob(self._root.name),
            *Path("/sys/fs/cgroup").glob(f"*/{self._root.name}"),
        ):
            _remove_groups(group)
        for path in self._created:
            with suppress(OSError):  # not created, or in use by another dockerd
                path.rmdir() if path.is_dir() else path.unlink()
        shutil.rmtree(self._root)


def _new_mount_namespace(prepare: list[str]) -> int:
    """Return a descriptor of a new mount namespace, whose mounts are not visible outside.

    `prepare` is a command that creates mounts in it. The namespace lasts as long as the descriptor, so that the next
    dockerd finds the mounts of one that was killed. DockerFailed: the command failed.
    """
    script = '"$@" && echo && exec cat'
    command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh", *(prepare or ["true"])]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not process.stdout.read(1):
            raise DockerFailed(f"preparing dockerd's mounts failed: {process.stderr.read().decode().strip()}")
        # The line break says that all mounts are there; cat keeps the process in the namespace until we have opened it.
        return os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)


def _docker() -> str:
    """Return the docker client to use: Debian's, as another one on the path may be too new for this dockerd."""
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"


def busybox_archive() -> bytes:
    """Return the image's file system: this machine's static busybox."""
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


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _remove_groups(group: Path) -> None:
    """Remove a control group, after those below it: the kernel removes only groups without children.

    One is busy until the last process in it has been reaped.
    """
    for child in group.iterdir():
        if child.is_dir():
            _remove_groups(child)
    wait_until(lambda: _is_removed(group), f"{group} to be unused")


def _is_removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True
