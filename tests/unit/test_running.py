"""What is read of a dockerd that runs: flags, settings in use, and its API."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.docker.running import Engine, Process, find_process, in_use, parse_flags, read_engine
from gangway.errors import HostRefused

START = 1000.0
MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"


def process(*words: str) -> Process:
    return Process(7, parse_flags(words), Path("/"), "", START)


def engine(masquerades: bool | None) -> Engine:
    return Engine("28.5.2", 7, False, False, masquerades)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--iptables=false"], {"iptables": "false"}),
        (["--iptables", "--config-file", "/a", "-H", "fd://"], {"iptables": "true", "config-file": "/a"}),
        (["--iptables", "-D"], {"iptables": "true"}),
        (["--ip6tables=F", "--userland-proxy=0", "--live-restore=T"],
         {"ip6tables": "false", "userland-proxy": "false", "live-restore": "true"}),
        (["-H", "fd://", "--containerd=/run/c.sock"], {"containerd": "/run/c.sock"}),
        ([], {}),
    ],
)  # fmt: skip
def test_flags_are_read_from_a_command_line(words: list[str], flags: dict[str, str]) -> None:
    assert parse_flags(words) == flags


@given(st.lists(st.text(max_size=6) | st.sampled_from(("--", "--a", "--a=", "--=b", "-H")), max_size=5))
def test_any_command_line_can_be_read(words: list[str]) -> None:
    assert all(isinstance(value, str) for value in parse_flags(words).values())


EARLIER, LATER = START - 60, START + 60


@pytest.mark.parametrize(
    ("words", "settings", "changed_s", "masquerades", "wanted"),
    [
        ((), {}, EARLIER, None, True),
        ((), {"iptables": False}, EARLIER, None, False),
        ((), {"iptables": False}, LATER, None, None),
        ((), {"iptables": False}, LATER, True, True),
        ((), {"iptables": False}, LATER, False, False),
        ((), {"iptables": False}, EARLIER, True, True),
        ((), {"ip-masq": False}, EARLIER, False, True),  # the file says why nothing is masqueraded
        (("--ip-masq=false",), {}, LATER, False, None),
        (("--iptables=false",), {}, LATER, None, False),
        (("--iptables",), {"iptables": False}, EARLIER, False, True),
    ],
)
def test_what_a_process_was_started_with(
    words: tuple[str, ...], settings: Mapping[str, Any], changed_s: float, masquerades: bool | None, wanted: bool | None
) -> None:
    assert in_use("iptables", True, process(*words), settings, changed_s, engine(masquerades)) is wanted


def test_the_default_depends_on_the_release() -> None:
    for default in (False, True):
        assert in_use("ip6tables", default, process(), {}, EARLIER, engine(True)) is default
    assert in_use("ip6tables", False, process(), {}, LATER, engine(False)) is None


class FakeApi:
    """Answers each request in turn on a unix socket."""

    def __init__(self, path: str) -> None:
        self.answers: dict[str, tuple[str, str]] = {}
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                with client, client.makefile("rb") as lines:
                    while target := lines.readline().decode():
                        while lines.readline() not in (b"\r\n", b""):
                            pass
                        status, body = self.answers.get(target.split()[1], ("404 Not Found", "{}"))
                        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n"
                        client.sendall(head.encode() + body.encode())
        except OSError:
            pass


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FakeApi]:
    made = FakeApi(str(tmp_path / "docker.sock"))
    yield made
    made.close()


def test_an_engine_is_read(api: FakeApi) -> None:
    bridge = {"Id": "a", "Name": "bridge", "Driver": "bridge", "Options": {MASQUERADE: "false"}}
    info = {"ServerVersion": "28.5.2", "LiveRestoreEnabled": True, "Swarm": {"LocalNodeState": "locked"}}
    api.answers = {"/info": ("200 OK", json.dumps(info)), "/networks": ("200 OK", json.dumps([bridge]))}
    assert read_engine(api.path) == Engine("28.5.2", os.getpid(), True, True, False)
    info = {"ServerVersion": "28.5.2", "Swarm": {"LocalNodeState": "inactive"}}
    api.answers = {"/info": ("200 OK", json.dumps(info)), "/networks": ("200 OK", "[]")}
    assert read_engine(api.path) == Engine("28.5.2", os.getpid(), False, False, None)


@pytest.mark.parametrize("answer", [("500 Server Error", "{}"), ("200 OK", "[]"), ("200 OK", '{"Swarm": []}')])
def test_an_answer_that_makes_no_sense_is_reported(api: FakeApi, answer: tuple[str, str]) -> None:
    api.answers = {"/info": answer}
    with pytest.raises(HostRefused, match=f"Docker's API {api.path}: .*/info"):
        read_engine(api.path)


def test_a_socket_that_nobody_serves_is_reported(tmp_path: Path) -> None:
    with pytest.raises(HostRefused, match="No such file or directory"):
        read_engine(str(tmp_path / "none"))
    with pytest.raises(HostRefused, match="cannot be read"):
        read_engine("/" + "s" * 200)


@pytest.mark.parametrize("pid", [0, 1, os.getpid()], ids=["unknown", "systemd", "dockerd"])
@pytest.mark.usefixtures("own_namespace")
def test_a_process_is_found_by_its_name_in_this_namespace(pid: int) -> None:
    """The test is no dockerd, unless it is called one.  With socket activation, it is systemd that listens."""
    assert find_process(pid) is None
    name = Path("/proc/self/comm")
    before = name.read_text()
    name.write_text("dockerd")
    try:
        found = find_process(pid)
    finally:
        name.write_text(before.strip())
    assert found is not None
    assert found.pid == os.getpid()
    assert found.folder == Path.cwd()
    assert 0 <= time.time() - found.started_s < 86400
