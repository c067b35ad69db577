"""The launcher as dockerd sees it: its command line, its status pipe, its port; and the relay that launchers share.

The launchers run in network namespaces of their own, and so each set of them has its own relay.
"""

import fcntl
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.netns import Container, Host, Namespace, end
from lab.waiting import wait_until
from tests.kernel import published
from tests.kernel.ground import PATIENCE_S, SLOW_MACHINE
from tests.kernel.published import LAUNCHER, children, processes, status_of

AT_ONCE_S = 20.0 if SLOW_MACHINE else 2.0
RELAYS = Path("/run/gangway")
NOBODY = 65534
IPPROTO_SCTP = 132
TW_REUSE = "net.ipv4.tcp_tw_reuse"
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
KINDS = {"tcp": TCP, "udp": UDP}
# A mount namespace with another /etc, as the settings file may be the machine's own.
SETTLE = 'mount -t overlay -o lowerdir="$0:/etc" overlay /etc && exec "$@"'

Launcher = subprocess.Popen[Any]
Settle = Callable[[str], tuple[str, ...]]
_ports = count(20000)
_launchers: list[Launcher] = []


class Echo:
    """A server in a namespace that sends back what it gets, over TCP and UDP at one port."""

    port = 7

    def __init__(self, namespace: Namespace) -> None:
        with namespace.entered():
            self._stream = socket.create_server(("0.0.0.0", self.port), backlog=256)
            self._datagram = socket.socket(socket.AF_INET, UDP)
        self._datagram.bind(("0.0.0.0", self.port))
        for serve in (self._accept, self._answer):
            threading.Thread(target=serve, daemon=True).start()

    def close(self) -> None:
        """Wakes the threads, which end."""
        for sock in (self._stream, self._datagram):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._stream.accept()
                threading.Thread(target=_echo, args=(client,), daemon=True).start()

    def _answer(self) -> None:
        with suppress(OSError):
            while True:
                data, address = self._datagram.recvfrom(65536)
                if address is None:  # shut down
                    return
                self._datagram.sendto(data, address)


def _echo(client: socket.socket) -> None:
    with client, suppress(OSError):
        while data := client.recv(65536):
            client.sendall(data)


# ---- launchers ----


def start(host: Host, *flags: str, **options: Any) -> tuple[Launcher, bytes]:
    """Starts a launcher as dockerd does; gives it and all that its status pipe said."""
    null: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    launcher, status = published.start(host, *flags, **{**null, **options})
    _launchers.append(launcher)
    return launcher, status


def publish(host: Host, box: Container, port: int, *flags: str, proto: str = "tcp", **options: Any) -> Launcher:
    """Publishes the container's echo port; the launcher is up."""
    launcher, status = start(host, *flags_for(box, port, proto), *flags, **options)
    assert status == b"0\n"
    return launcher


def flags_for(box: Container, port: int, proto: str = "tcp", host_ip: str = "0.0.0.0") -> list[str]:
    """The flags that dockerd gives."""
    host_side = ["-proto", proto, "-host-ip", host_ip, "-host-port", str(port)]
    return [*host_side, "-container-ip", box.address4, "-container-port", str(Echo.port)]


def refused(host: Host, *flags: str, **options: Any) -> str:
    """Why a launcher would not start; it is seen to leave as dockerd wants it."""
    launcher, status = start(host, *flags, **options)
    assert launcher.wait(PATIENCE_S) == 1
    assert status[:2] == b"1\n"
    return status[2:].decode()


class Finished(NamedTuple):
    """What a launcher that ended has left."""

    code: int
    status: bytes
    out: str
    err: str


def finish(host: Host, *flags: str) -> Finished:
    """Runs a launcher that is to end by itself."""
    launcher, status = start(host, *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = launcher.communicate(timeout=PATIENCE_S)
    return Finished(launcher.returncode, status, out.decode(), err.decode())


def stop(launcher: Launcher, by: signal.Signals = signal.SIGINT) -> int:
    """Ends a launcher as dockerd does; gives its exit status."""
    launcher.send_signal(by)
    return launcher.wait(PATIENCE_S)


# ---- clients ----


def connect(host: Host, port: int, address: str = "127.0.0.1", kind: int = TCP) -> socket.socket:
    """A client on the host.  One that has a loopback address itself is not redirected: it meets the relay."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        client = socket.socket(family, kind)
    client.settimeout(PATIENCE_S)
    try:
        if ip_address(address).is_loopback:
            client.bind((address, 0))
        client.connect((address, port))
    except OSError:
        client.close()
        raise
    return client


def serves(host: Host, port: int, address: str = "127.0.0.1", kind: int = TCP) -> bool:
    """The port's echo comes back."""
    with connect(host, port, address, kind) as client:
        client.sendall(b"hello")
        return client.recv(64) == b"hello"


def ends(client: socket.socket) -> bool:
    """The connection is ended or reset within a moment."""
    client.settimeout(AT_ONCE_S)
    try:
        return client.recv(64) == b""
    except ConnectionResetError:
        return True


@contextmanager
def bound(host: Host, port: int, kind: int = TCP, family: int = socket.AF_INET) -> Iterator[socket.socket]:
    """A server's socket at a port of the host; OSError if that is taken."""
    with host.entered():
        server = socket.socket(family, kind)
    with server:
        if kind == TCP:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind(("", port))
        yield server


def is_free(host: Host, port: int, kind: int = TCP) -> bool:
    """The port can be bound."""
    try:
        with bound(host, port, kind):
            return True
    except OSError:
        return False


def nothing_is_bound(host: Host) -> bool:
    """No socket of the host listens."""
    return host.run("ss", "-HSltun").stdout == "" and host.run("ss", "-Hltun").stdout == ""


# ---- the relay ----


def keeper_and_relay(host: Namespace) -> tuple[int, int]:
    """The pids of the two processes; there is exactly one of each, and perhaps the relay has workers."""
    keeper, relay, *workers = processes(host)
    assert children(keeper) == [relay]
    assert {*workers} <= {*children(relay)}
    return keeper, relay


def is_replaced(host: Namespace, *old: int) -> bool:
    """There is a keeper with a relay, and the processes `old` are no more."""
    now = list(processes(host))
    return len(now) >= 2 and children(now[0]) == now[1:2] and not {*now} & {*old}


def relay_socket(host: Namespace) -> Path:
    """Where a namespace's relay listens for launchers."""
    return RELAYS / f"docker-proxy-{os.stat(host.path).st_ino}.sock"


def relay_is_gone(host: Namespace) -> bool:
    """Neither processes nor files of a relay are left."""
    return not any(processes(host)) and not list(RELAYS.glob(f"{relay_socket(host).stem}.*"))


def ask_relay(path: str) -> socket.socket:
    """A connection to a relay, as a launcher makes it."""
    asker = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asker.settimeout(PATIENCE_S)
    try:
        asker.connect(path)
    except OSError:
        asker.close()
        raise
    return asker


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """This process is another user's for the time of the block."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def kill(*pids: int) -> None:
    """kill -9."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


# ---- fixtures ----


@contextmanager
def site() -> Iterator[tuple[Host, Container]]:
    """A host, a container that echoes, and at the end no relay."""
    with Host() as host:
        box = host.container()
        echo = Echo(box)
        try:
            yield host, box
        finally:
            echo.close()
            for launcher in _launchers:
                end(launcher)
            _launchers.clear()
            wait_until(lambda: relay_is_gone(host), "the relay's end", PATIENCE_S)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Host, Container]]:
    with site() as made:
        yield made


@pytest.fixture
def host(shared: tuple[Host, Container]) -> Host:
    return shared[0]


@pytest.fixture
def box(shared: tuple[Host, Container]) -> Container:
    return shared[1]


@pytest.fixture
def fresh() -> Iterator[tuple[Host, Container]]:
    """A host where no relay runs yet."""
    with site() as made:
        yield made


@pytest.fixture
def port() -> int:
    """A port that no other test uses."""
    return next(_ports)


@pytest.fixture
def settled(tmp_path: Path) -> Settle:
    """Makes the words that start a command with a settings file of its own."""

    def settle(text: str) -> tuple[str, ...]:
        folder = tmp_path / "etc/gangway"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "docker-proxy.toml").write_text(text)
        return ("unshare", "--mount", "sh", "-c", SETTLE, str(folder.parent))

    return settle


# ---- the command line ----


@pytest.mark.any_kernel
@pytest.mark.parametrize("dashes", ["-", "--"])
@pytest.mark.parametrize("joined", [False, True], ids=["f v", "f=v"])
def test_flags_are_written_in_four_ways(host: Host, box: Container, port: int, dashes: str, joined: bool) -> None:
    words = flags_for(box, port)
    pairs = [(dashes + name.removeprefix("-"), value) for name, value in zip(words[::2], words[1::2], strict=True)]
    flags = [f"{name}={value}" for name, value in pairs] if joined else [word for pair in pairs for word in pair]
    launcher, status = start(host, *flags)
    assert status == b"0\n"
    assert serves(host, port)
    assert stop(launcher) == 0


@pytest.mark.any_kernel
@pytest.mark.parametrize("flag", ["-v", "--v", "-version", "--version", "-version=true"])
def test_the_version(host: Host, flag: str) -> None:
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
def test_a_bad_flag_is_told_with_the_usage(host: Host, flags: list[str], named: str) -> None:
    done = finish(host, *flags)
    assert (done.code, done.status) == (2, b"")
    assert done.err.startswith(f"{named}\nUsage of ")


# ---- what cannot be published ----


@pytest.mark.any_kernel
def test_an_unknown_protocol_is_named(host: Host, box: Container, port: int) -> None:
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
def test_a_value_that_makes_no_sense_is_named(host: Host, box: Container, port: int, flag: str, value: str) -> None:
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
def test_a_port_in_use(
    host: Host, box: Container, port: int, proto: str, family: int, address: str, shown: str
) -> None:
    with bound(host, port, KINDS[proto], family) as server:
        if proto == "tcp":
            server.listen()
        reason = refused(host, *flags_for(box, port, proto, address))
    assert reason == f"listen {shown}:{port}: bind: address already in use"
    assert is_free(host, port, KINDS[proto])


def test_a_port_that_another_launcher_has(host: Host, box: Container, port: int) -> None:
    first = publish(host, box, port)
    reason = refused(host, *flags_for(box, port))
    assert reason == f"listen tcp4 0.0.0.0:{port}: bind: address already in use"
    assert serves(host, port)
    assert stop(first) == 0


@pytest.mark.parametrize(
    ("address", "shown"), [("203.0.113.9", "tcp4 203.0.113.9"), ("2001:db8::9", "tcp6 [2001:db8::9]")]
)
def test_an_address_that_is_not_ours(host: Host, box: Container, port: int, address: str, shown: str) -> None:
    reason = refused(host, *flags_for(box, port, "tcp", address))
    assert reason == f"listen {shown}:{port}: bind: cannot assign requested address"


def test_a_port_without_the_right_to_it(host: Host, box: Container) -> None:
    before = ("setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-all")
    reason = refused(host, *flags_for(box, 80), before=before)
    assert reason == "listen tcp4 0.0.0.0:80: bind: permission denied"


def test_sctp_where_the_kernel_has_it(host: Host, box: Container, port: int) -> None:
    try:
        socket.socket(socket.AF_INET, TCP, IPPROTO_SCTP).close()
    except OSError:
        assert refused(host, *flags_for(box, port, "sctp")) == "protocol not supported"
    else:
        assert stop(publish(host, box, port, proto="sctp")) == 0


def test_a_relay_that_cannot_be_started(fresh: tuple[Host, Container], port: int, tmp_path: Path) -> None:
    host, box = fresh
    lonely = shutil.copy(LAUNCHER, tmp_path)  # no Python beside it
    reason = refused(host, *flags_for(box, port), program=lonely)
    assert reason == f"cannot start the relay: {tmp_path}/python3: No such file or directory"
    assert nothing_is_bound(host)
    wait_until(lambda: relay_is_gone(host), "the keeper's end", PATIENCE_S)


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("colour = 1", "unknown key 'colour'"),
        ("workers = 0", "workers must be"),
        ("workers = ", "docker-proxy.toml: Invalid value"),
        ('log = "/nowhere/log"', "/nowhere/log"),
    ],
)
def test_bad_settings_are_named(
    fresh: tuple[Host, Container], port: int, settled: Settle, text: str, named: str
) -> None:
    host, box = fresh
    reason = refused(host, *flags_for(box, port), before=settled(text))
    assert named in reason
    assert nothing_is_bound(host)
    wait_until(lambda: relay_is_gone(host), "the keeper's end", PATIENCE_S)


# ---- what is published ----


def test_two_bytes_in_one_read_and_nobody_else_holds_the_pipe(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    for _ in range(2):  # the first starts the relay, the second finds it
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            status = fcntl.fcntl(writing, fcntl.F_DUPFD_CLOEXEC, 10)
            os.close(writing)
            instead = ("bash", "-c", f'exec "$@" 3>&{status} {status}>&-', "bash")
            launcher, _ = start(host, *flags_for(box, port), before=instead, pass_fds=(status,))
            os.close(status)
            assert [pipe.read(64), pipe.read(64)] == [b"0\n", b""]
        assert launcher.poll() is None
        keeper_and_relay(host)
        assert stop(launcher) == 0


def test_both_families_of_a_port(host: Host, box: Container, port: int) -> None:
    launchers = [publish(host, box, port), publish(host, box, port, "-host-ip", "::")]
    assert serves(host, port, "127.0.0.1")
    assert serves(host, port, "::1")
    assert stop(launchers[0]) == 0
    assert serves(host, port, "::1")
    with pytest.raises(ConnectionRefusedError):
        connect(host, port, "127.0.0.1")
    assert stop(launchers[1]) == 0


@pytest.mark.parametrize("proto", KINDS)
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_one_address_of_the_host(host: Host, box: Container, port: int, proto: str, address: str) -> None:
    launcher, status = start(host, *flags_for(box, port, proto, address))
    assert status == b"0\n"
    assert serves(host, port, address, KINDS[proto])
    if proto == "tcp":
        with pytest.raises(ConnectionRefusedError):
            connect(host, port, host.gateway6 if ":" in address else host.gateway4)
    assert stop(launcher) == 0


@pytest.mark.parametrize("kind", ["listening", "bound", "udp"])
def test_a_passed_socket(host: Host, box: Container, port: int, kind: str) -> None:
    proto = "udp" if kind == "udp" else "tcp"
    with bound(host, port, KINDS[proto]) as server:
        if kind == "listening":
            server.listen()
        launcher = publish(host, box, port, "-use-listen-fd", proto=proto, passed=server.fileno())
    assert serves(host, port, "127.0.0.1", KINDS[proto])
    assert stop(launcher) == 0
    assert is_free(host, port, KINDS[proto])


def test_a_passed_socket_must_be_one(host: Host, box: Container, port: int) -> None:
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


# ---- the end of a launcher ----


@pytest.mark.parametrize("proto", KINDS)
def test_sigint_frees_the_port_each_time(host: Host, box: Container, port: int, proto: str) -> None:
    for _ in range(10):
        launcher = publish(host, box, port, proto=proto)
        assert serves(host, port, "127.0.0.1", KINDS[proto])  # and leaves a connection in TIME_WAIT
        with connect(host, port, "127.0.0.1", KINDS[proto]) as client:
            client.sendall(b"x")
            assert client.recv(64) == b"x"
            assert stop(launcher) == 0
            with bound(host, port, KINDS[proto]):
                pass
            if proto == "tcp":
                assert ends(client)


def test_sigterm_is_a_good_end_as_well(host: Host, box: Container, port: int) -> None:
    assert stop(publish(host, box, port), signal.SIGTERM) == 0
    assert is_free(host, port)


@pytest.mark.parametrize("proto", KINDS)
def test_a_killed_launcher_takes_its_port_along(host: Host, box: Container, port: int, proto: str) -> None:
    kind = KINDS[proto]
    launcher = publish(host, box, port, proto=proto)
    with connect(host, port, "127.0.0.1", kind) as client:
        client.sendall(b"x")
        assert client.recv(64) == b"x"
        assert stop(launcher, signal.SIGKILL) == -signal.SIGKILL
        if proto == "tcp":
            assert ends(client)
        wait_until(lambda: is_free(host, port, kind), "the killed launcher's port", AT_ONCE_S)


def test_one_launcher_leaves_the_others_alone(host: Host, box: Container, port: int) -> None:
    other_port = next(_ports)
    launcher, other = publish(host, box, port), publish(host, box, other_port)
    with connect(host, other_port) as client:
        client.sendall(b"x")
        assert client.recv(64) == b"x"
        assert stop(launcher) == 0
        client.sendall(b"y")
        assert client.recv(64) == b"y"
    assert stop(other) == 0


# ---- the relay that they share ----


def test_launchers_that_start_at_once_start_one_relay(fresh: tuple[Host, Container]) -> None:
    host, box = fresh
    ports = [next(_ports) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        launchers = list(pool.map(lambda port: publish(host, box, port), ports))
    keeper_and_relay(host)
    assert all(serves(host, port) for port in ports)
    assert [stop(launcher) for launcher in launchers] == [0] * 8


def test_the_relay_ends_some_seconds_after_its_last_lease(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    assert stop(publish(host, box, port)) == 0
    began_s = time.monotonic()
    keeper_and_relay(host)
    wait_until(lambda: not any(processes(host)), "the relay's end", PATIENCE_S)
    assert time.monotonic() - began_s > 1
    assert not relay_socket(host).exists()


def test_a_new_lease_keeps_the_relay(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    assert stop(publish(host, box, port)) == 0
    _, relay = keeper_and_relay(host)
    launcher = publish(host, box, port)
    assert keeper_and_relay(host)[1] == relay
    assert stop(launcher) == 0


@pytest.mark.parametrize("victims", ["relay", "keeper", "both"])
def test_a_killed_relay_is_replaced(fresh: tuple[Host, Container], victims: str) -> None:
    host, box = fresh
    ports = [next(_ports) for _ in range(3)]
    launchers = [publish(host, box, port) for port in ports]
    keeper, relay = keeper_and_relay(host)
    with connect(host, ports[0]) as client:
        client.sendall(b"x")
        assert client.recv(64) == b"x"
        kill(*{"relay": [relay], "keeper": [keeper], "both": [keeper, relay]}[victims])
        began_s = time.monotonic()
        assert ends(client)
    wait_until(lambda: relay not in processes(host), "the relay's end", AT_ONCE_S)
    assert all(serves(host, port) for port in ports)  # nobody is refused, nobody waits long
    assert time.monotonic() - began_s < AT_ONCE_S
    wait_until(lambda: is_replaced(host, keeper, relay), "the end of the old keeper", AT_ONCE_S)
    assert [launcher.poll() for launcher in launchers] == [None] * 3
    assert [stop(launcher) for launcher in launchers] == [0] * 3


def test_a_killed_relay_never_makes_a_port_refuse(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    launcher = publish(host, box, port)
    for _ in range(3):
        keeper, relay = keeper_and_relay(host)
        kill(relay)

        def is_up_again(old: tuple[int, int] = (keeper, relay)) -> bool:
            connect(host, port).close()  # ConnectionRefusedError if nobody listens
            return is_replaced(host, *old)

        wait_until(is_up_again, "a new relay", PATIENCE_S)
        assert serves(host, port)
    assert stop(launcher) == 0


def test_only_the_owner_reaches_the_relay(host: Host, box: Container, port: int) -> None:
    launcher = publish(host, box, port)
    directory = RELAYS.stat()
    assert (stat.S_IMODE(directory.st_mode), directory.st_uid) == (0o700, 0)
    with acting_as(NOBODY), pytest.raises(PermissionError):
        ask_relay(str(relay_socket(host)))
    assert stop(launcher) == 0


def test_the_relay_sends_another_user_away(host: Host, box: Container, port: int) -> None:
    """Even if the directory and the socket's mode let it in: here it comes by a descriptor."""
    launcher = publish(host, box, port)
    path = relay_socket(host)
    path.chmod(0o777)
    door = os.open(path, os.O_PATH)
    with acting_as(NOBODY), ask_relay(f"/proc/self/fd/{door}") as stranger:
        assert stranger.recv(64) == b""
    os.close(door)
    with ask_relay(str(path)) as owner:
        owner.send(b"nonsense")
        assert owner.recv(256) == b"error not a lease: 'nonsense'"
    assert stop(launcher) == 0


# ---- its privileges, and what it sets ----


def test_the_relay_has_no_rights(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    launcher = publish(host, box, port, before=("prlimit", "--nofile=256:"))
    keeper, relay = keeper_and_relay(host)
    assert status_of(keeper)["Uid"].split() == ["0"] * 4
    status = status_of(relay)
    for ids in ("Uid", "Gid"):
        assert status[ids].split() == [str(NOBODY)] * 4
    assert status["Groups"] == ""
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[capabilities], 16) == 0, capabilities
    assert status["NoNewPrivs"] == "1"
    limit = re.search(r"Max open files +(\d+) +(\d+)", Path(f"/proc/{relay}/limits").read_text())
    assert limit is not None
    assert int(limit[1]) == int(limit[2]) > 256
    assert stop(launcher) == 0


@pytest.mark.parametrize("before", ["0", "2"])
def test_tcp_tw_reuse_is_set_while_the_relay_runs(
    fresh: tuple[Host, Container], port: int, settled: Settle, before: str
) -> None:
    host, box = fresh
    host.sysctl(TW_REUSE, before)
    launcher = publish(host, box, port, before=settled(""))
    assert host.sysctl(TW_REUSE) == "1"
    assert stop(launcher) == 0
    wait_until(lambda: relay_is_gone(host), "the relay's end", PATIENCE_S)
    assert host.sysctl(TW_REUSE) == before


def test_tcp_tw_reuse_is_put_back_by_a_later_relay(fresh: tuple[Host, Container], port: int, settled: Settle) -> None:
    host, box = fresh
    host.sysctl(TW_REUSE, 0)
    launcher = publish(host, box, port, before=settled(""))
    kill(*keeper_and_relay(host))
    assert stop(launcher, signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not any(processes(host)), "the killed relay's end", AT_ONCE_S)
    assert host.sysctl(TW_REUSE) == "1"
    assert stop(publish(host, box, port, before=settled(""))) == 0
    wait_until(lambda: relay_is_gone(host), "the relay's end", PATIENCE_S)
    assert host.sysctl(TW_REUSE) == "0"


def test_what_a_dead_namespace_has_left_is_not_put_back(
    fresh: tuple[Host, Container], port: int, settled: Settle
) -> None:
    host, box = fresh
    host.sysctl(TW_REUSE, 0)
    RELAYS.mkdir(mode=0o700, exist_ok=True)
    relay_socket(host).with_suffix(".tcp_tw_reuse").write_text("4294967296123 2")
    launcher = publish(host, box, port, before=settled(""))
    assert host.sysctl(TW_REUSE) == "1"
    assert stop(launcher) == 0
    wait_until(lambda: relay_is_gone(host), "the relay's end", PATIENCE_S)
    assert host.sysctl(TW_REUSE) == "0"


def test_tcp_tw_reuse_is_left_alone_if_the_settings_say_so(
    fresh: tuple[Host, Container], port: int, settled: Settle
) -> None:
    host, box = fresh
    host.sysctl(TW_REUSE, 2)
    launcher = publish(host, box, port, before=settled("tcp_tw_reuse = false"))
    assert host.sysctl(TW_REUSE) == "2"
    assert serves(host, port)
    assert stop(launcher) == 0
    wait_until(lambda: relay_is_gone(host), "the relay's end", PATIENCE_S)
    assert host.sysctl(TW_REUSE) == "2"
