"""`gangway log`: what was asked of a daemon, by whom, and what it did."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lab.gangwayd import GANGWAY, Gangway
from lab.netns import Namespace, end

pytestmark = pytest.mark.any_kernel

_NOBODY = 65534


class Follower:
    """`gangway log --json`, and the events that it has printed."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.seen: list[dict[str, Any]] = []

    def until(self, name: str) -> dict[str, Any]:
        """Read events until one with this name, and return it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(json.loads(line))
            if self.seen[-1]["event"] == name:
                return self.seen[-1]
        raise AssertionError(f"no event {name!r}: {self.seen}")


@contextmanager
def following(gangway: Gangway) -> Iterator[Follower]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = gangway.host.popen(str(GANGWAY), "log", "--json", text=True, **pipes)
    try:
        yield Follower(process)
    finally:
        end(process)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def _ask_as_nobody(gangway: Gangway, path: str, body: object) -> None:
    """Send a request as a user who may use the socket."""
    os.chmod(gangway.folder, 0o755)
    os.chmod(gangway.socket, 0o666)
    user = ("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups")
    curl = ("curl", "-sS", "--unix-socket", str(gangway.socket), "-d", json.dumps(body), f"http://gangway{path}")
    gangway.host.run(*user, *curl)


def test_who_asked_is_logged() -> None:
    flags = ("--log-format", "json", "--log-level", "debug")
    with Namespace("host") as host, Namespace("box") as box, Gangway(host, *flags) as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        gangway("attach", box.name, "--network", "web")
        with following(gangway) as follower:
            assert gangway.daemon is not None
            started = follower.until("started")
            assert (started["pid"], started["socket"]) == (gangway.daemon.pid, str(gangway.socket))
            assert follower.until("settings")["log_level"] == "debug"
            assert follower.until("attached")["container"] == box.name
            for _ in range(2):
                _ask_as_nobody(gangway, "/mappings", {"container": box.name, "ports": ["127.0.0.1:8080:80"]})
            published, refused = follower.until("published"), follower.until("refused")
            for event in (published, refused):
                assert (event["uid"], event["command"]) == (_NOBODY, "curl")
            assert published["ports"] == "127.0.0.1:8080 -> 172.30.0.2:80/tcp"
            assert published["message"].endswith(f"by curl (pid {published['pid']}, uid {_NOBODY})")
            assert (refused["status"], refused["kind"], refused["level"]) == (409, "Conflict", "warning")
            os.kill(gangway.relays()[0], 9)
            assert "signal 9" in follower.until("relay-restarted")["message"]
            gangway("unpublish", box.name)
            assert follower.until("unpublished")["uid"] == 0
            gangway.stop()
            assert follower.process.wait(10) == 0
            assert follower.process.stderr is not None
            assert follower.process.stderr.read() == "gangway: the daemon has ended\n"
        logged = [json.loads(line) for line in gangway.log.read_text().splitlines()]
        assert follower.seen == [one for one in logged if one in follower.seen]
        assert logged[-1]["event"] == "stopped"
        assert {one["path"] for one in logged if one["event"] == "answered"} >= {"/mappings"}
        gangway.start()


def test_no_daemon_is_started_to_be_followed() -> None:
    with Namespace("host") as host:
        done = host.run(str(GANGWAY), "log", check=False)
        assert done.returncode == 1
        assert "no daemon runs at " in done.stderr
