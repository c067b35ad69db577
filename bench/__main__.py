"""`python -m bench`: the command line, and where the results are written."""

import argparse
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bench import docker_front, machine, report
from bench.chapters import (
    ALL_PORTS,
    DOCKER_FRONT,
    IN_DOCKER,
    MANY_IN_DOCKER,
    REDIRECTED,
    RELAYED,
    RELAYED_FROM_AFAR,
    RELAYED_IPV6,
    UNRELATED,
    WITHOUT_DOCKER,
)
from bench.contenders import (
    in_docker,
    published_at_once,
    redirected,
    relayed,
    relayed_from_afar,
    relayed_ipv6,
    unrelated_connections,
)
from bench.curve import DOCKERD, FRONT, GANGWAY, STOCK
from bench.docker_hosts import in_docker_front
from bench.errors import CannotMeasure
from bench.many_containers import QUICK_CONTAINERS
from bench.measures import QUICK_SUSTAINED_S
from bench.publishing import QUICK_MANY
from bench.remote import without_docker
from bench.rounds import Runner, Settings
from bench.rows import DOCKER_ROWS, ROWS, Row
from bench.traffic import Load
from lab.engines import engine_root
from lab.gangwayd import GANGWAY as _COMMAND

_TOP = Path(__file__).resolve().parent.parent
_BUILD = _TOP / "build"
_GANGWAY = _TOP / ".venv/bin/gangway-docker-proxy"
_DOCKER_PROXY = Path("/usr/sbin/docker-proxy")
_USUAL, _QUICK = (4, 1.5), (2, 1.0)  # rounds, and seconds for each measurement
_INTERRUPTED = 130


def main() -> int:
    """Run the benchmark, and return the exit code."""
    options = _parse()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        _check(options.gangway)
        _run(options)
    except KeyboardInterrupt:
        print("bench: interrupted: everything was cleaned up, no results were written", file=sys.stderr)
        return _INTERRUPTED
    except (CannotMeasure, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description="Compares gangway with docker-proxy, iptables and others."
    )
    keys = [row.key for row in ROWS]
    parser.add_argument("--rounds", type=_rounds, metavar="N", help=f"number of rounds ({_USUAL[0]})")
    parser.add_argument("--seconds", type=_seconds, metavar="S", help=f"seconds per measurement ({_USUAL[1]:g})")
    parser.add_argument("--only", nargs="+", choices=keys, metavar="ROW", help=f"only these rows: {' '.join(keys)}")
    parser.add_argument(
        "--docker", action="store_true", help="the rows with containers of many ports: a run of their own"
    )
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 second, to check that everything runs")
    parser.add_argument("--gangway", type=Path, default=_GANGWAY, metavar="PATH", help="the launcher that dockerd uses")
    parser.add_argument(
        "--engine", metavar="RELEASE", help="the Debian release (trixie, sid) whose dockerd the docker-front rows use"
    )
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="where to write the results and the pictures")
    options = parser.parse_args()
    rounds, seconds = _QUICK if options.quick else _USUAL
    options.rounds, options.seconds = options.rounds or rounds, options.seconds or seconds
    options.rows = [row for row in ROWS if _is_chosen(row, options.only, options.docker)]
    whole = not options.quick and not options.only and options.gangway == _GANGWAY
    options.output = options.output or (_TOP / "bench" if whole else _BUILD / "bench")
    return options


def _is_chosen(row: Row, only: Sequence[str] | None, docker: bool) -> bool:
    return row.key in only if only else (row in DOCKER_ROWS) == docker


def _check(gangway: Path) -> None:
    """Check that everything needed is there, and raise the limit of open files."""
    if os.geteuid():
        raise CannotMeasure("root is required to create network namespaces")
    for program, remedy in (
        (gangway, "make build"),
        (_COMMAND, "make build"),
        (_DOCKER_PROXY, "apt-get install docker.io"),
    ):
        if not os.access(program, os.X_OK):
            raise CannotMeasure(f"{program} is missing: run `{remedy}`")
    # Go does so for docker-proxy; the other programs inherit it from us.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run(options: argparse.Namespace) -> None:
    # matplotlib is slow to import and writes a cache: not before _check has passed.
    from bench import chart, scale_chart

    settings = Settings(options.rounds, options.seconds, options.quick)
    gangway = options.gangway.absolute()
    engine = engine_root(options.engine) if options.engine else None
    facts = [
        *machine.facts(gangway, _DOCKER_PROXY, engine),
        ("Measured", _extent(settings, "some rows" if options.only else "all rows")),
    ]
    start_s = time.monotonic()
    contenders = {
        RELAYED: relayed(gangway, _DOCKER_PROXY),
        RELAYED_FROM_AFAR: relayed_from_afar(gangway, _DOCKER_PROXY),
        RELAYED_IPV6: relayed_ipv6(gangway, _DOCKER_PROXY),
        IN_DOCKER: in_docker(gangway, _DOCKER_PROXY),
        MANY_IN_DOCKER: in_docker(gangway, _DOCKER_PROXY),
        REDIRECTED: redirected(_DOCKER_PROXY),
        UNRELATED: unrelated_connections(),
        WITHOUT_DOCKER: without_docker(),
        ALL_PORTS: published_at_once(_DOCKER_PROXY),
        DOCKER_FRONT: in_docker_front(engine),
    }
    with Runner(contenders, Load.built(_BUILD), settings) as runner:
        results = runner.run(options.rows, say=lambda line: print(line, flush=True))
    facts.append(("Duration", f"{(time.monotonic() - start_s) / 60:.0f} minutes"))
    fact = dict(facts)
    subtitle = f"{fact['Measured']}; {fact['Kernel']}, {fact['Date']}"
    options.output.mkdir(parents=True, exist_ok=True)
    document = report.DOCKER if options.docker else report.RESULTS
    (options.output / document.name).write_text(report.document(results, facts, runner.curve, document))
    chart.draw(results, options.output / document.picture, subtitle)
    ports, docker = runner.curve.only(GANGWAY, DOCKERD), runner.curve.only(FRONT, STOCK)
    if ports.counts():
        scale_chart.draw(ports, options.output / "scale.png", subtitle)
    if docker.counts():
        scale_chart.draw_docker(docker, options.output / "docker.png", subtitle)
    print(f"\n{report.tables(results, runner.curve)}\n\n{report.summary(results)}")
    print(f"Written to {options.output}: {document.name} and the pictures")


def _extent(settings: Settings, rows: str) -> str:
    rounds = "1 round" if settings.rounds == 1 else f"{settings.rounds} rounds"
    fewer = f"only {QUICK_MANY} ports in docker-many and docker-front, only {QUICK_CONTAINERS} containers"
    fewer += f", in docker-front {docker_front.QUICK_CONTAINERS}"
    shortened = f", crr-sustained for {QUICK_SUSTAINED_S} s, {fewer}" if settings.quick else ""
    return f"{rows}, {rounds} of {settings.seconds:g} s{shortened}"


def _rounds(text: str) -> int:
    if (rounds := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least one round is needed")
    return rounds


def _seconds(text: str) -> float:
    if not 0.1 <= (seconds := float(text)) <= 600:
        raise argparse.ArgumentTypeError("must be from 0.1 to 600 seconds")
    return seconds


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Interrupt the run; ignore further signals, so that they do not interrupt the cleanup."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
