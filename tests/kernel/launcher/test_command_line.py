"""The launcher's command line, which is docker-proxy's: flags as Go's flag package reads them."""

import re

import pytest

from lab.netns import Container, Host
from tests.kernel.launcher.launchers import finish, flags_for, serves, start, stop


@pytest.mark.any_kernel
@pytest.mark.parametrize("dashes", ["-", "--"])
@pytest.mark.parametrize("joined", [False, True], ids=["f v", "f=v"])
def test_four_ways_to_write_a_flag(host: Host, box: Container, port: int, dashes: str, joined: bool) -> None:
    words = flags_for(box, port)
    pairs = [(dashes + name.removeprefix("-"), value) for name, value in zip(words[::2], words[1::2], strict=True)]
    flags = [f"{name}={value}" for name, value in pairs] if joined else [word for pair in pairs for word in pair]
    launcher, status = start(host, *flags)
    assert status == b"0\n"
    assert serves(host, port)
    assert stop(launcher) == 0


@pytest.mark.any_kernel
@pytest.mark.parametrize("flag", ["-v", "--v", "-version", "--version", "-version=true"])
def test_version(host: Host, flag: str) -> None:
    done = finish(host, flag)
    assert (done.code, done.status) == (0, b"")
    assert re.match(r"docker-proxy .*version \d", done.out)


@pytest.mark.any_kernel
@pytest.mark.parametrize("flag", ["-h", "--h", "-help", "--help"])
def test_help(host: Host, flag: str) -> None:
    done = finish(host, flag)
    assert (done.code, done.status) == (0, b"")
    names = ("container-ip", "container-port", "host-ip", "host-port", "proto", "use-listen-fd", "v", "version")
    assert all(f"\n  -{name}" in done.err for name in names)


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["-nonsense"], "flag provided but not defined: -nonsense"),
        (["--nonsense=1"], "flag provided but not defined: -nonsense"),
        (["-prot", "tcp"], "flag provided but not defined: -prot"),
        (["-host-port", "http"], 'invalid value "http" for flag -host-port: parse error'),
        (["-host-port="], 'invalid value "" for flag -host-port: parse error'),
        (["-container-port", "80 "], 'invalid value "80 " for flag -container-port: parse error'),
        (["-host-port"], "flag needs an argument: -host-port"),
        (["-use-listen-fd=maybe"], 'invalid boolean value "maybe" for -use-listen-fd: parse error'),
        (["---proto", "tcp"], "bad flag syntax: ---proto"),
        (["-=tcp"], "bad flag syntax: -=tcp"),
    ],
)
def test_bad_flag_is_reported_with_the_usage(host: Host, flags: list[str], named: str) -> None:
    done = finish(host, *flags)
    assert (done.code, done.status) == (2, b"")
    assert done.err.startswith(f"{named}\nUsage of ")
