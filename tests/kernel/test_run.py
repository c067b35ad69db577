"""`gangway run`, and the daemon that a command starts: they come when they are needed, and leave nothing."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab.gangwayd import GANGWAY
from lab.netns import Namespace
from lab.processes import processes_in
from lab.waiting import wait_until
from tests.kernel.snapshot import Snapshot, is_as, snapshot

pytestmark = pytest.mark.any_kernel

_LINGER_S = 20
"""A daemon that was started by a command lingers for five seconds; a busy machine may take longer."""


class Bare:
    """A host with no daemon, and a socket where one may come to listen."""

    def __init__(self, host: Namespace, directory: Path) -> None:
        self.host = host
        self.directory = directory
        self.environment = {**os.environ, "GANGWAY_SOCKET": str(directory / "gangway.sock")}
        self.before: Snapshot = snapshot(host)

    def run(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command to its end, whatever comes of it."""
        return self.host.run(str(GANGWAY), *words, check=False, env=self.environment, timeout=30, cwd=cwd)

    def popen(self, *words: str) -> subprocess.Popen[str]:
        """A command in a session of its own, as a terminal would start it."""
        pipe = subprocess.PIPE
        options = {"stdout": pipe, "stderr": pipe, "text": True, "start_new_session": True}
        return self.host.popen(str(GANGWAY), *words, env=self.environment, **options)

    def ask(self, port: int) -> str:
        """What a web server says on the host's loopback."""
        words = "curl", "-sf", "--max-time", "3", f"http://127.0.0.1:{port}/"
        return self.host.run(*words, check=False).stdout

    def processes(self) -> dict[int, str]:
        """The command lines of all that runs in the host's namespace, by pid."""
        return {pid: " ".join(words) for pid, words in processes_in(self.host.path).items() if words}

    def end_daemon(self) -> None:
        """Spares the wait until it ends by itself."""
        for pid, words in self.processes().items():
            if "gangway.daemon" in words:
                os.kill(pid, signal.SIGTERM)

    def nothing_is_left(self) -> None:
        """Neither processes, nor anything of the kernel's, nor files but the (empty) state."""
        wait_until(lambda: self.processes() == {}, "the daemon's end", _LINGER_S)
        is_as(self.host, self.before)
        assert {path.suffix for path in self.directory.iterdir()} <= {".db", ".db-wal", ".db-shm"}


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Bare]:
    """A host of its own for one test."""
    with Namespace("host") as host:
        made = Bare(host, tmp_path)
        yield made
        made.end_daemon()
        made.nothing_is_left()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """A host for many, so that only one has to wait for the daemon's end."""
    with Namespace("host") as host:
        made = Bare(host, tmp_path_factory.mktemp("shared"))
        yield made
        made.nothing_is_left()


@pytest.fixture
def used(shared: Bare) -> Iterator[Bare]:
    """The same; a test leaves nothing there but perhaps a daemon that lingers."""
    yield shared
    wait_until(lambda: all("gangway.daemon" in words for words in shared.processes().values()), "the end of all others")
    is_as(shared.host, shared.before)


def _port(line: str) -> int:
    found = re.search(r"0\.0\.0\.0:(\d+) -> ", line)
    assert found, line
    return int(found[1])


def _serving(bare: Bare) -> tuple[subprocess.Popen[str], int]:
    """The quick start, with a port that is free; and which one that is."""
    process = bare.popen("run", "-p", "8000", "--", "python3", "-m", "http.server", "8000")
    assert process.stderr is not None
    port = _port(next(line for line in process.stderr if "0.0.0.0:" in line))
    wait_until(lambda: bare.ask(port), "the server")
    return process, port


def test_the_quick_start_serves_until_ctrl_c(used: Bare) -> None:
    process, port = _serving(used)
    assert "Directory listing" in used.ask(port)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 0  # http.server ends itself in good order
    assert used.ask(port) == ""
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_sigterm_is_the_commands_too(used: Bare) -> None:
    process, port = _serving(used)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert used.ask(port) == ""


def test_a_command_whose_gangway_was_killed_is_no_longer_published_when_it_ends(used: Bare) -> None:
    process, port = _serving(used)
    server = int(used.host.run("pgrep", "-P", str(process.pid), "-f", "http.server").stdout)
    process.kill()
    process.wait()
    with suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)
    wait_until(lambda: not used.ask(port), "its end")


def test_the_exit_code_is_the_commands(used: Bare) -> None:
    assert used.run("run", "--", "sh", "-c", "exit 7").returncode == 7
    assert used.run("run", "-p", "80", "--", "true").returncode == 0
    assert used.run("run", "--", "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL


def test_a_command_that_cannot_run_is_said_in_a_line(used: Bare) -> None:
    done = used.run("run", "-p", "80", "--", "/nonexistent/command")
    assert done.returncode == 127
    assert "gangway: /nonexistent/command: no such command" in done.stderr.splitlines()
    done = used.run("run", "--", "/etc/passwd")
    assert done.returncode == 126
    assert "gangway: /etc/passwd: Permission denied" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr


def test_a_port_that_cannot_be_had_keeps_the_command_from_running(used: Bare, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    done = used.run("run", "-p", "9-8:80", "--", "touch", str(mark))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gangway: -p 9-8:80: ")
    assert "Traceback" not in done.stderr
    assert not mark.exists()


def test_the_command_has_the_host_s_view_of_everything_but_the_network(used: Bare) -> None:
    done = used.run("run", "--name", "box", "--", "sh", "-c", "ip -o -4 address; pwd", cwd=used.directory)
    assert "eth0" in done.stdout
    assert str(used.directory) in done.stdout
    assert "127.0.0.1" in done.stdout


def test_a_first_command_starts_a_daemon_and_says_so(bare: Bare) -> None:
    done = bare.run("network", "ls", "--json")
    assert done.stdout == "[]\n"
    said = re.fullmatch(r"gangway: started a daemon \(pid (\d+)\), which listens on (\S+)\n", done.stderr)
    assert said
    assert said[2] == bare.environment["GANGWAY_SOCKET"]
    again = bare.run("network", "ls", "--json")
    assert (again.stdout, again.stderr) == ("[]\n", "")
    wait_until(lambda: not Path(f"/proc/{said[1]}").exists(), "its end", _LINGER_S)


def test_such_a_daemon_stays_for_as_long_as_there_is_something_to_keep(bare: Bare) -> None:
    daemon = _started(bare.run("network", "create", "web", "--subnet", "172.30.0.0/24"))
    # Longer than it lingers when there is nothing: the only way to see that it does not end is to wait.
    with pytest.raises(AssertionError):
        wait_until(lambda: not daemon.exists(), "its end", 6)
    assert bare.run("network", "rm", "web").stderr == ""


def test_the_next_daemon_finds_what_one_that_was_killed_has_left(bare: Bare) -> None:
    daemon = _started(bare.run("network", "create", "web", "--subnet", "172.30.0.0/24"))
    os.kill(int(daemon.name), signal.SIGKILL)
    wait_until(lambda: not daemon.exists(), "its end")
    done = bare.run("network", "ls", "--json")
    assert '"web"' in done.stdout
    _started(done)
    assert bare.run("network", "rm", "web").stderr == ""


def _started(done: subprocess.CompletedProcess[str]) -> Path:
    """The process of the daemon that a command has started."""
    said = re.search(r"started a daemon \(pid (\d+)\)", done.stderr)
    assert said, done
    return Path("/proc", said[1])
