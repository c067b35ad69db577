"""The command line: how words are read, what is refused, and that a command imports only what it needs."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gangway import runtime
from gangway.cli.client import Refused, socket_path
from gangway.cli.commands import COMMANDS, GROUPS, check_config
from gangway.cli.main import main, parse
from gangway.cli.views import mapping_line
from gangway.daemon import config

WORDS = ("publish", "network", "run", "ls", "-p", "--publish", "--socket", "--json", "web", "8000:80", "-1", "", "--")
OTHER = ("-p80", "--publish=80", "--pub", "--socket=/run/g.sock", "-", "-h", "--help", "--version", "-x", "a\nb")


@pytest.fixture(autouse=True, params=["", "/run/other.sock"])
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Without and with GANGWAY_SOCKET."""
    monkeypatch.setenv("GANGWAY_SOCKET", request.param)
    return str(request.param)


def published(words: str) -> tuple[str, str, list[str]]:
    """Return the socket, container and ports of a `publish` command."""
    function, given = parse(words.split())
    assert function is COMMANDS["publish"][0]
    return given["path"], given["container"], given["ports"]


def test_admitted_clients_are_given_one_by_one() -> None:
    words = "--from 10.0.0.0/8 --from fd00::/8 -p 80"
    assert parse(f"publish web {words}".split())[1]["from"] == ["10.0.0.0/8", "fd00::/8"]
    assert parse(f"run {words} -- true".split())[1]["admitted"] == ["10.0.0.0/8", "fd00::/8"]


def error(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which words are refused."""
    with pytest.raises(SystemExit) as end:
        parse(words)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gangway: ")
    assert said.err.endswith(" --help)\n")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("words", "path", "container", "ports"),
    [
        ("publish web -p 8000:80", None, "web", ["8000:80"]),
        ("publish -p 8000:80 web", None, "web", ["8000:80"]),
        ("publish web -p 8000:80 -p 53:53/udp", None, "web", ["8000:80", "53:53/udp"]),
        ("publish web --publish 80", None, "web", ["80"]),
        ("publish web --publish=80 -p81", None, "web", ["80", "81"]),
        ("publish --socket /run/g.sock web -p 80", "/run/g.sock", "web", ["80"]),
        ("publish web -p 80 --socket a --socket b", "b", "web", ["80"]),
        ("--socket /run/g.sock publish web -p 80", "/run/g.sock", "web", ["80"]),
        ("--socket=a --socket b publish web -p 80", "b", "web", ["80"]),
        ("--socket a publish web -p 80 --socket=b", "b", "web", ["80"]),
        ("publish web -p -1", None, "web", ["-1"]),
        ("publish publish -p 80", None, "publish", ["80"]),
        ("publish -p 80 -- -web", None, "-web", ["80"]),
        ("publish ./web -p 80", None, f"{Path.cwd()}/web", ["80"]),
    ],
)
def test_publish_takes_its_options_in_any_order(words: str, path: str | None, container: str, ports: list[str]) -> None:
    assert published(words) == (path or socket_path(), container, ports)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("frob", "'frob'"),
        ("--frob", "--frob"),
        ("network frob", "'network frob'"),
        ("--socket", "--socket: expected one argument"),
        ("--socket /run/g.sock frob", "'frob'"),
        ("--socket /run/g.sock config check", "--socket"),
        ("frob --help", "'frob'"),
        ("publish", "required: CONTAINER, -p"),
        ("publish web", "required: -p"),
        ("publish -p 80", "required: CONTAINER"),
        ("publish web box -p 80", "unrecognized arguments: box"),
        ("publish web -p", "expected one argument"),
        ("publish web -p 80 --json", "--json"),
        ("publish web -p 80 --sock /run/g.sock", "--sock"),
        ("publish web --pub 80", "--pub"),
        ("network create web --sub 10.0.0.0/24", "--sub"),
        ("network create web --subnet 10.0.0.0/24 --mtu big", "'big'"),
        ("explain 127.0.0.1:80 --from moon", "'moon'"),
        ("run", "required: COMMAND"),
        ("run --", "required: COMMAND"),
        ("run --nmae box -- true", "--nmae"),
        ("run --nmae true", "--nmae"),
        ("run -x true", "-x"),
        ("run --na box true", "--na"),
    ],
)
def test_a_mistake_is_reported_on_one_line(words: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert why in error(words.split(), capsys)


@pytest.mark.parametrize(
    "words",
    [["publish", "", "-p", "80"], ["ls", ""], ["ls", "--socket", ""], ["--socket", "", "ls"], ["daemon", "--config="]],
)
def test_names_and_paths_are_not_empty(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be empty" in error(words, capsys)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("run true", ["true"]),
        ("run -- true", ["true"]),
        ("run --name box -p 80 ls -p --name x", ["ls", "-p", "--name", "x"]),
        ("run --name box -- ls --nmae -- x", ["ls", "--nmae", "--", "x"]),
        ("run ls -- x", ["ls", "--", "x"]),
        ("run echo -h", ["echo", "-h"]),
    ],
)
def test_what_follows_the_command_of_run_is_left_as_it_is(words: str, command: list[str]) -> None:
    found = parse(words.split())[1]["command"]
    assert (found[1:] if found[0] == "--" else found) == command


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(WORDS + OTHER) | st.text(max_size=3), max_size=7))
def test_any_words_are_a_command_or_help_or_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    code: object = None
    try:
        function, given = parse(words)
    except SystemExit as end:
        code = end.code or 0
    said = capsys.readouterr()
    if code is None:
        inspect.signature(function).bind(**given)
    elif code == 0:
        assert said.out.startswith(("usage: gangway", "gangway "))
    elif said.err.startswith("usage: "):
        assert not words or words[-1] in GROUPS or words[0].startswith("--socket")
        assert said.err.startswith("usage: gangway")
    else:
        assert code == 2
        assert said.err.startswith("gangway: ")
        assert said.err.count("\n") == 1


def arguments(name: str) -> list[str]:
    """Return the least that a command needs."""
    needed = {"publish": ["web", "-p", "80"], "run": ["true"]}
    one_word = "network create", "network inspect", "network rm", "attach", "detach", "unpublish", "explain", "apply"
    return ["web"] if name in one_word else needed.get(name, [])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_the_arguments_that_it_declares(name: str) -> None:
    function, given = parse([*name.split(), *arguments(name)])
    inspect.signature(function).bind(**given)
    assert function is COMMANDS[name][0]


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS, ""])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse([*name.split(), option])
    assert not end.value.code
    assert capsys.readouterr().out.startswith(f"usage: gangway {name}".rstrip())


def test_the_socket_is_the_environments_or_the_namespaces_own(environment: str) -> None:
    assert socket_path() == (environment or runtime.default_socket())
    assert published("publish web -p 80")[0] == socket_path()


def test_publish_imports_little() -> None:
    program = "import sys; from gangway.cli.main import parse; parse(['publish', 'web', '-p', '80'])"
    program += "; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split())
    assert "argparse" in loaded
    assert not loaded & {"rich", "shutil", "typing", "dataclasses", "urllib", "pathlib", "msgspec", "gangway.plan"}


@pytest.mark.parametrize(
    ("host", "container", "wanted"),
    [
        (("0.0.0.0", "8000"), ("172.30.0.2", "80"), "0.0.0.0:8000 -> 172.30.0.2:80/tcp"),
        (("::", "8000-8010"), ("fd30::2", "80-90"), "[::]:8000-8010 -> [fd30::2]:80-90/tcp"),
    ],
)
def test_a_mapping_is_a_line(host: tuple[str, str], container: tuple[str, str], wanted: str) -> None:
    mapping = {"host_address": host[0], "host_ports": host[1], "protocol": "tcp"}
    assert mapping_line(mapping | {"container_address": container[0], "container_ports": container[1]}) == wanted


@pytest.fixture
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings files of this test's own, which do not exist yet."""
    monkeypatch.setattr(config, "SETTINGS", tmp_path / "gangway.toml")
    monkeypatch.setattr(config, "OLD_SETTINGS", tmp_path / "docker-proxy.toml")
    return tmp_path


def test_config_check_accepts_good_settings(no_settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_config(None)
    assert capsys.readouterr() == ("OK\n", "")
    (no_settings / "gangway.toml").write_text('firewall = "none"\n')
    (no_settings / "docker-proxy.toml").write_text("workers = 1\n")
    check_config(None)
    said: Any = capsys.readouterr()
    assert said.out == "OK\n"
    assert said.err.startswith(f"gangway: {no_settings}/docker-proxy.toml is deprecated: ")


@pytest.mark.parametrize("name", ["gangway.toml", "docker-proxy.toml", "other.toml"])
def test_config_check_names_file_and_key(
    name: str, no_settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = no_settings / name
    file.write_text("wrokers = 1\n")
    monkeypatch.setattr(sys, "argv", ["gangway", "config", "check", *([str(file)] if name == "other.toml" else [])])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"gangway: {file}: ")
    assert "wrokers" in said.err


def test_an_error_of_the_daemons_is_its_exit_code() -> None:
    assert [Refused(kind, "").exit_code for kind in ("InvalidRequest", "Conflict", "HostRefused")] == [2, 1, 1]


@pytest.mark.parametrize(
    ("redirection", "message"), [("> /dev/full", "cannot write the output: No space left"), (">&-", "")]
)
def test_output_that_cannot_be_written_is_one_line(redirection: str, message: str) -> None:
    command = f"exec {Path(sys.executable).parent}/gangway config check /dev/null {redirection}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == (1 if message else 0)
    assert done.stderr.count("\n") == (1 if message else 0), done.stderr
    assert message in done.stderr


def test_a_path_that_is_too_long_for_a_socket_is_refused_with_its_length(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gangway", "ls", "--socket", "/run/" + "s" * 103])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "gangway: the socket's path is too long (108 bytes, at most 107): /run/sss" in capsys.readouterr().err
