"""A real server and a real client: PostgreSQL in the container, and pgbench.

The data is created once, in a temporary directory; in each turn a server is started on it in the turn's container. The
data fits into memory and nothing is written, so that the exchange of messages limits pgbench -S.
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
        """Run the server in the container during the block."""
        server = setup.container.popen(*_AS_POSTGRES, self._program("postgres"), "-D", str(self._data), **_SILENT)
        try:
            ready = [self._program("pg_isready"), "-q", "-h", setup.container_address]
            wait_until(
                lambda: setup.client.space.run(*ready, check=False).returncode == 0,
                "PostgreSQL in the container to answer",
                _PATIENCE_S,
            )
            yield
        except AssertionError as error:
            raise CannotMeasure(str(error)) from None
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown: disconnects clients
            server.wait()

    def run(self, setup: Setup, clients: int, seconds: float) -> float:
        """Run `pgbench -S` as the client, and return its transactions per second, without the time to connect."""
        threads = min(clients, 2)
        words = f"-S -n -c {clients} -j {threads} -T {max(1, round(seconds))} -h {setup.address} -U postgres postgres"
        try:
            done = setup.client.space.run(
                self._program("pgbench"), *words.split(), check=False, timeout=seconds + _PATIENCE_S, cwd="/"
            )
        except subprocess.TimeoutExpired:
            raise CannotCarry("pgbench timed out") from None
        found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
        if done.returncode or not found:
            raise CannotCarry(f"pgbench: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return float(found[1])

    def create(self) -> None:
        """Create the data; takes some seconds."""
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
    """Create a database, and delete it after the block."""
    installed = sorted(_INSTALLED.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not installed:
        raise CannotMeasure(f"no PostgreSQL in {_INSTALLED}: run `apt-get install postgresql`")
    with tempfile.TemporaryDirectory(prefix="gangway-bench-") as directory:
        shutil.chown(directory, "postgres", "postgres")
        made = Database(installed[-1].parent, Path(directory))
        made.create()
        yield made


_SILENT: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}


def _run(*words: str) -> None:
    done = subprocess.run(words, text=True, capture_output=True, check=False, cwd="/")
    if done.returncode:
        raise CannotMeasure(f"{words[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
