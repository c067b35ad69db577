"""What a launcher cannot publish: the reason is on its status pipe, and no socket or process is left."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.netns import Container, Host
from tests.kernel.launcher.launchers import (
    KINDS,
    TCP,
    UDP,
    bound,
    flags_for,
    is_free,
    nothing_is_bound,
    publish,
    refused,
    serves,
    stop,
    wait_until_clean,
)
from tests.kernel.published import IPPROTO_SCTP, LAUNCHER, processes


@pytest.mark.any_kernel
def test_unknown_protocol_is_named(host: Host, box: Container, port: int) -> None:
    assert "dccp" in refused(host, *flags_for(box, port, "dccp"))
    assert is_free(host, port)


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("-host-ip", "localhost"),
        ("-host-port", "-1"),
        ("-host-port", "65536"),
        ("-container-ip", "10.0.0.256"),
        ("-container-port", "0"),
        ("-container-port", "65536"),
    ],
)
def test_invalid_value_is_named(host: Host, box: Container, port: int, flag: str, value: str) -> None:
    reason = refused(host, *flags_for(box, port), flag, value)
    assert flag[1:] in reason
    assert value in reason
    assert is_free(host, port)


@pytest.mark.parametrize(
    ("proto", "family", "address", "shown"),
    [
        ("tcp", socket.AF_INET, "0.0.0.0", "tcp4 0.0.0.0"),
        ("udp", socket.AF_INET, "0.0.0.0", "udp4 0.0.0.0"),
        ("tcp", socket.AF_INET6, "::", "tcp6 [::]"),
        ("udp", socket.AF_INET6, "::", "udp6 [::]"),
    ],
)
def test_port_in_use(host: Host, box: Container, port: int, proto: str, family: int, address: str, shown: str) -> None:
    with bound(host, port, KINDS[proto], family) as server:
        if proto == "tcp":
            server.listen()
        reason = refused(host, *flags_for(box, port, proto, address))
    assert reason == f"listen {shown}:{port}: bind: address already in use"
    assert is_free(host, port, KINDS[proto])


@pytest.mark.any_kernel
def test_port_of_another_launcher(host: Host, box: Container, port: int) -> None:
    first = publish(host, box, port)
    reason = refused(host, *flags_for(box, port))
    assert reason == f"listen tcp4 0.0.0.0:{port}: bind: address already in use"
    assert serves(host, port)
    assert stop(first) == 0


@pytest.mark.parametrize(
    ("address", "shown"), [("203.0.113.9", "tcp4 203.0.113.9"), ("2001:db8::9", "tcp6 [2001:db8::9]")]
)
def test_address_of_another_host(host: Host, box: Container, port: int, address: str, shown: str) -> None:
    reason = refused(host, *flags_for(box, port, "tcp", address))
    assert reason == f"listen {shown}:{port}: bind: cannot assign requested address"


@pytest.mark.any_kernel
def test_privileged_port_without_the_privilege(host: Host, box: Container) -> None:
    before = ("setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-all")
    reason = refused(host, *flags_for(box, 80), before=before)
    assert reason == "listen tcp4 0.0.0.0:80: bind: permission denied"


def test_sctp_where_the_kernel_has_none(host: Host, box: Container, port: int) -> None:
    try:
        socket.socket(socket.AF_INET, TCP, IPPROTO_SCTP).close()
    except OSError:
        assert refused(host, *flags_for(box, port, "sctp")) == "protocol not supported"
    else:
        assert stop(publish(host, box, port, proto="sctp")) == 0


@pytest.mark.any_kernel
def test_passed_descriptor_must_be_a_socket_of_the_protocol(host: Host, box: Container, port: int) -> None:
    flags = [*flags_for(box, port), "-use-listen-fd"]
    with open("/dev/null") as null, socket.socket(socket.AF_UNIX) as local, bound(host, port, UDP) as udp:
        reasons = [refused(host, *flags, passed=given.fileno()) for given in (null, local, udp)]
    with bound(host, port) as tcp:
        reasons.append(refused(host, *flags, "-proto", "udp", passed=tcp.fileno()))
    reasons.append(refused(host, *flags))
    assert reasons == [
        "file descriptor 4 is not a socket",
        "file descriptor 4 is not an internet socket",
        "file descriptor 4 is not a tcp socket",
        "file descriptor 4 is not a udp socket",
        "file descriptor 4: bad file descriptor",
    ]
    assert is_free(host, port)
    assert is_free(host, port, UDP)


@pytest.mark.any_kernel
def test_daemon_that_cannot_be_started(fresh: tuple[Host, Container], port: int, tmp_path: Path) -> None:
    host, box = fresh
    lonely = shutil.copy(LAUNCHER, tmp_path)  # no Python beside it
    reason = refused(host, *flags_for(box, port), program=lonely)
    assert reason == f"cannot start gangway's daemon: {tmp_path}/python3: No such file or directory"
    assert nothing_is_bound(host)
    assert not any(processes(host))


@pytest.mark.any_kernel
@pytest.mark.parametrize("name", ["gangway.toml", "docker-proxy.toml"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("colour = 1", "unknown key 'colour'"),
        ("workers = 0", "workers must be"),
        ("workers = ", "{name}: Invalid value"),
        ('log = "/nowhere/log"', "/nowhere/log"),
    ],
)
def test_bad_settings_are_named(
    fresh: tuple[Host, Container],
    port: int,
    with_settings: Callable[..., tuple[str, ...]],
    text: str,
    named: str,
    name: str,
) -> None:
    host, box = fresh
    table = "[relay]\n" if name == "gangway.toml" else ""
    reason = refused(host, *flags_for(box, port), before=with_settings(table + text, name))
    assert named.format(name=name) in reason
    assert nothing_is_bound(host)
    assert not any(processes(host))


@pytest.mark.any_kernel
def test_bad_daemon_settings_are_named(
    fresh: tuple[Host, Container], port: int, with_settings: Callable[..., tuple[str, ...]]
) -> None:
    host, box = fresh
    reason = refused(host, *flags_for(box, port), before=with_settings('firewall = "pf"'))
    assert reason == "/etc/gangway/gangway.toml: unknown firewall 'pf': auto, nftables, iptables, none"
    assert nothing_is_bound(host)


@pytest.mark.any_kernel
def test_launcher_recovers_when_the_settings_are_corrected(
    fresh: tuple[Host, Container], port: int, with_settings: Callable[..., tuple[str, ...]]
) -> None:
    host, box = fresh
    refused(host, *flags_for(box, port), before=with_settings("[relay]\nworkers = 0"))
    launcher = publish(host, box, port, before=with_settings("[relay]\nworkers = 1"))
    assert stop(launcher) == 0
    wait_until_clean(host)
