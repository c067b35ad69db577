"""A real server and its real client: PostgreSQL in the container, the client's pgbench.

What this file knows: PostgreSQL's programs.  What it must not know: contenders.

How it works.  The data is made once, in a temporary directory, and served anew in the container of each turn.  It is
as large as pgbench -S needs to be bound by its messages: all of it is in memory, and nothing is written.
"""

import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.contenders import Direct
from bench.errors import CannotCarry, CannotMeasure
from bench.setup import Port, Setup
from lab.waiting import wait_until

PORT = Port("tcp", 5432, 5432)
_SCALE = 5
_PATIENCE_S = 30
_INSTALLED = Path("/usr/lib/postgresql")
_AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--")
_SETTINGS = """
listen_addresses = '*'
max_connections = 100
fsync = off
full_page_writes = off
shared_buffers = 256MB
autovacuum = off
log_min_messages = fatal
"""


class Database:
    """A database with pgbench's tables."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self._programs = programs
        self._data = directory / "data"

    @contextmanager
    def served(self, setup: Setup) -> Iterator[None]:
        """The server runs in the container for the time of the block."""
        server = setup.container.popen(*_AS_POSTGRES, self._program("postgres"), "-D", str(self._data), **_SILENT)
        try:
            ready = [self._program("pg_isready"), "-q", "-h", setup.container_address]
            wait_until(
                lambda: setup.client.space.run(*ready, check=False).returncode == 0,
                "PostgreSQL in the container",
                _PATIENCE_S,
            )
            yield
        except AssertionError as error:
            raise CannotMeasure(str(error)) from None
        finally:
            server.send_signal(signal.SIGINT)  # a fast shutdown, whoever is connected
            server.wait()

    def run(self, setup: Setup, clients: int, seconds: float) -> float:
        """Runs `pgbench -S` as the client; its transactions a second, without the time to connect."""
        threads = min(clients, 2)
        words = f"-S -n -c {clients} -j {threads} -T {max(1, round(seconds))} -h {setup.address} -U postgres postgres"
        try:
            done = setup.client.space.run(
                self._program("pgbench"), *words.split(), check=False, timeout=seconds + _PATIENCE_S, cwd="/"
            )
        except subprocess.TimeoutExpired:
            raise CannotCarry("pgbench hangs") from None
        found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
        if done.returncode or not found:
            raise CannotCarry(f"pgbench: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return float(found[1])

    def make(self) -> None:
        """Makes the data; some seconds."""
        _run(*_AS_POSTGRES, self._program("initdb"), "-D", str(self._data), "--auth=trust", "--no-sync")
        with (self._data / "postgresql.conf").open("a") as configuration:
            configuration.write(f"{_SETTINGS}unix_socket_directories = '{self._data.parent}'\n")
        with (self._data / "pg_hba.conf").open("a") as access:
            access.write("host all all all trust\n")
        with Direct("direct").set_up() as setup, self.served(setup):
            fill = f"-i -q -s {_SCALE} -h {setup.container_address} -U postgres postgres"
            _run(*setup.client.space.command(self._program("pgbench"), *fill.split()))

    def _program(self, name: str) -> str:
        return str(self._programs / name)


@contextmanager
def database() -> Iterator[Database]:
    """A database that is gone after the block."""
    installed = sorted(_INSTALLED.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not installed:
        raise CannotMeasure(f"no PostgreSQL in {_INSTALLED}: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="gangway-bench-") as directory:
        shutil.chown(directory, "postgres", "postgres")
        made = Database(installed[-1].parent, Path(directory))
        made.make()
        yield made


_SILENT: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}


def _run(*words: str) -> None:
    done = subprocess.run(words, text=True, capture_output=True, check=False, cwd="/")
    if done.returncode:
        raise CannotMeasure(f"{words[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
