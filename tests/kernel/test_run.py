"""`gangway run`, and the daemon that a command starts: it starts on demand and leaves nothing behind."""

import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gangway import runtime
from gangway.cli import client
from gangway.cli.client import Refused
from lab.gangwayd import GANGWAY, runtime_folder
from lab.netns import Namespace
from lab.processes import processes_in
from lab.waiting import wait_until
from tests.kernel.snapshot import Snapshot, snapshot, wait_until_restored

pytestmark = pytest.mark.any_kernel

_LINGER_S = 20
"""A daemon that was started by a command lingers for five seconds; a busy machine may take longer."""


class Bare:
    """A host without a daemon, and the runtime folder of one that a command starts."""

    def __init__(self, host: Namespace) -> None:
        self.host = host
        self.folder = runtime_folder(host)
        self.socket = str(self.folder / runtime.API_SOCKET)
        self._environment = {name: value for name, value in os.environ.items() if name != "GANGWAY_SOCKET"}
        self.before: Snapshot = snapshot(host)

    def run(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whether it fails or not."""
        return self.host.run(str(GANGWAY), *words, check=False, env=self._environment, timeout=30, cwd=cwd)

    def popen(self, *words: str) -> subprocess.Popen[str]:
        """Start a command in a session of its own, as a terminal would."""
        pipe = subprocess.PIPE
        options = {"stdout": pipe, "stderr": pipe, "text": True, "start_new_session": True}
        return self.host.popen(str(GANGWAY), *words, env=self._environment, **options)

    def ask(self, port: int) -> str:
        """Return the answer of a web server on the host's loopback."""
        words = "curl", "-sf", "--max-time", "3", f"http://127.0.0.1:{port}/"
        return self.host.run(*words, check=False).stdout

    def processes(self) -> dict[int, str]:
        """Return the command lines of all that runs in the host's namespace, by pid."""
        return {pid: " ".join(words) for pid, words in processes_in(self.host.path).items() if words}

    def end_daemon(self) -> None:
        """End the daemon now, instead of waiting until it ends by itself."""
        for pid, words in self.processes().items():
            if "gangway.daemon" in words:
                os.kill(pid, signal.SIGTERM)

    def nothing_is_left(self) -> None:
        """Check that no processes, kernel objects or files remain."""
        wait_until(lambda: self.processes() == {}, "the daemon's end", _LINGER_S)
        wait_until_restored(self.host, self.before)
        assert not self.folder.exists()


@pytest.fixture
def bare() -> Iterator[Bare]:
    """A host for one test."""
    with Namespace("host") as host:
        made = Bare(host)
        yield made
        made.end_daemon()
        made.nothing_is_left()


@pytest.fixture(scope="module")
def shared() -> Iterator[Bare]:
    """A host for many tests, so that only the last one has to wait for the daemon's end."""
    with Namespace("host") as host:
        made = Bare(host)
        yield made
        made.nothing_is_left()


@pytest.fixture
def used(shared: Bare) -> Iterator[Bare]:
    """That host; a test leaves nothing there except a daemon that lingers."""
    yield shared
    wait_until(lambda: all("gangway.daemon" in words for words in shared.processes().values()), "the end of all others")
    wait_until_restored(shared.host, shared.before)


def _port(line: str) -> int:
    found = re.search(r"0\.0\.0\.0:(\d+) -> ", line)
    assert found, line
    return int(found[1])


def _serving(bare: Bare) -> tuple[subprocess.Popen[str], int]:
    """Start the server of the README's quick start; return it, and its host port."""
    process = bare.popen("run", "-p", "8000", "--", "python3", "-m", "http.server", "8000")
    assert process.stderr is not None
    port = _port(next(line for line in process.stderr if "0.0.0.0:" in line))
    wait_until(lambda: bare.ask(port), "the server")
    return process, port


def test_the_quick_start_serves_until_ctrl_c(used: Bare) -> None:
    process, port = _serving(used)
    assert "Directory listing" in used.ask(port)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 0  # http.server handles it
    assert used.ask(port) == ""
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_sigterm_is_passed_to_the_command(used: Bare) -> None:
    process, port = _serving(used)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert used.ask(port) == ""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
def test_a_signal_ends_gangway_the_command_and_the_publication(used: Bare, number: signal.Signals) -> None:
    process, port = _serving(used)
    server = int(used.host.run("pgrep", "-P", str(process.pid), "-f", "http.server").stdout)
    process.send_signal(number)
    process.wait(10)
    wait_until(lambda: not Path(f"/proc/{server}").exists(), "the command's end")
    wait_until(lambda: not used.ask(port), "the end of the publication")


def test_a_command_is_unpublished_at_its_end_though_gangway_run_was_killed(used: Bare) -> None:
    process, port = _serving(used)
    server = int(used.host.run("pgrep", "-P", str(process.pid), "-f", "http.server").stdout)
    process.kill()
    process.wait()
    with suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)
    wait_until(lambda: not used.ask(port), "its end")


def test_run_exits_with_the_commands_code(used: Bare) -> None:
    assert used.run("run", "--", "sh", "-c", "exit 7").returncode == 7
    assert used.run("run", "-p", "80", "--", "true").returncode == 0
    assert used.run("run", "--", "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL


def test_a_command_that_cannot_run_is_reported_on_one_line(used: Bare) -> None:
    done = used.run("run", "-p", "80", "--", "/nonexistent/command")
    assert done.returncode == 127
    assert "gangway: /nonexistent/command: no such command" in done.stderr.splitlines()
    done = used.run("run", "--", "/etc/passwd")
    assert done.returncode == 126
    assert "gangway: /etc/passwd: Permission denied" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr


def test_the_command_does_not_run_if_a_port_cannot_be_published(used: Bare, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    done = used.run("run", "-p", "9-8:80", "--", "touch", str(mark))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gangway: invalid -p '9-8:80': ")
    assert "Traceback" not in done.stderr
    assert not mark.exists()


def test_the_command_shares_all_but_the_network_with_the_host(used: Bare, tmp_path: Path) -> None:
    done = used.run("run", "--name", "box", "--", "sh", "-c", "ip -o -4 address; pwd", cwd=tmp_path)
    assert "eth0" in done.stdout
    assert str(tmp_path) in done.stdout
    assert "127.0.0.1" in done.stdout


def test_the_first_command_starts_a_daemon_and_reports_it(bare: Bare) -> None:
    done = bare.run("network", "ls", "--json")
    assert done.stdout == "[]\n"
    started = re.fullmatch(r"gangway: started a daemon \(pid (\d+)\), which listens on (\S+)\n", done.stderr)
    assert started
    assert started[2] == bare.socket
    again = bare.run("network", "ls", "--json")
    assert (again.stdout, again.stderr) == ("[]\n", "")
    wait_until(lambda: not Path(f"/proc/{started[1]}").exists(), "its end", _LINGER_S)


def test_commands_at_the_same_time_start_one_daemon(bare: Bare) -> None:
    commands = [bare.popen("network", "ls", "--json") for _ in range(4)]
    outputs = [command.communicate(timeout=30) for command in commands]
    assert [command.returncode for command in commands] == [0] * 4
    assert {out for out, _ in outputs} == {"[]\n"}
    assert len([err for _, err in outputs if "started a daemon" in err]) == 1
    assert {err for _, err in outputs if "started a daemon" not in err} <= {""}


def test_a_command_does_not_wait_for_ever_for_the_folders_lock(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_START_S", 0.2)
    with bare.host.entered():
        folder = runtime.create_folder()
        try:
            locked = os.open(folder, os.O_RDONLY)
            fcntl.flock(locked, fcntl.LOCK_EX)
            with pytest.raises(Refused, match=f"another process has been starting a daemon .*{folder} locked"):
                client.start_daemon(bare.socket)
            os.close(locked)
        finally:
            os.rmdir(folder)


def test_a_daemon_that_does_not_start_in_time_is_ended(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "slow"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setattr(client, "_START_S", 1.0)
    monkeypatch.setattr(client, "daemon_command", lambda *_, **__: [str(program)])
    with bare.host.entered():
        try:
            with pytest.raises(Refused, match="did not start within 1 s"):
                client.start_daemon(bare.socket)
        finally:
            os.rmdir(runtime.folder())
    program.unlink()
    _, status = os.waitpid(int((tmp_path / "pid").read_text()), 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_a_daemon_that_a_command_started_stays_while_there_is_a_network(bare: Bare) -> None:
    daemon = _started(bare.run("network", "create", "web", "--subnet", "172.30.0.0/24"))
    # Longer than an idle daemon lingers: only waiting shows that this one does not end.
    with pytest.raises(AssertionError):
        wait_until(lambda: not daemon.exists(), "its end", 6)
    assert bare.run("network", "rm", "web").stderr == ""


def test_the_next_daemon_takes_over_from_one_that_was_killed(bare: Bare) -> None:
    daemon = _started(bare.run("network", "create", "web", "--subnet", "172.30.0.0/24"))
    os.kill(int(daemon.name), signal.SIGKILL)
    wait_until(lambda: not daemon.exists(), "its end")
    done = bare.run("network", "ls", "--json")
    assert '"web"' in done.stdout
    _started(done)
    assert bare.run("network", "rm", "web").stderr == ""


def _started(done: subprocess.CompletedProcess[str]) -> Path:
    """Return the process of the daemon that a command has started."""
    started = re.search(r"started a daemon \(pid (\d+)\)", done.stderr)
    assert started, done
    return Path("/proc", started[1])
