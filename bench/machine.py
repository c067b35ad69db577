"""The machine and the versions of the programs that the figures were measured with."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path


def facts(gangway: Path, docker_proxy: Path, engine: Path | None) -> list[tuple[str, str]]:
    """Return names and values, for the end of RESULTS.md. `engine` is the root of another release's dockerd."""
    memory = int(re.findall(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[0]) / 1024**2
    return [
        ("Date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Kernel", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("Processor", f"{os.cpu_count()} cores, {_processor()}"),
        ("Memory", f"{memory:.0f} GiB"),
        ("Load average before", f"{os.getloadavg()[0]:.2f}"),
        ("gangway", f"{_first_line(str(gangway), '-version')} ({gangway})"),
        ("docker-proxy", f"Debian's docker.io {_package('docker.io')} ({docker_proxy})"),
        ("dockerd in docker-front", _first_line(*(["chroot", str(engine)] if engine else []), "dockerd", "--version")),
        ("socat, haproxy", f"{_package('socat')}, {_package('haproxy')}"),
        ("iptables, nftables", f"{_first_line('iptables', '--version')}, {_first_line('nft', '--version')}"),
        ("libbpf", _package("libbpf1")),
        ("PostgreSQL", _package(f"postgresql-{_newest_postgresql()}")),
    ]


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return str(names[0]) if names else "unknown"


def _newest_postgresql() -> int:
    return max((int(path.name) for path in Path("/usr/lib/postgresql").glob("[0-9]*")), default=0)


def _package(name: str) -> str:
    return _first_line("dpkg-query", "-W", "-f", "${Version}", name)


def _first_line(*words: str) -> str:
    done = _run(words)
    return done.splitlines()[0].strip() if done.strip() else "unknown"


def _run(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(words, text=True, capture_output=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
