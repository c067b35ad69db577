"""The keeper of the relay that stands in for docker-proxy: `python -m gangway.docker_proxy SOCKET`, started by a
launcher.

What this file knows: the settings file, and what needs root for as long as the relay runs.  What it must not know:
what the relay does, what a launcher wants.

How it works.  A launcher starts this process with a unix socket that listens already (descriptor 3) and a pipe for
its status (descriptor 2: `0\\n`, or why the relay cannot start).  It reads the settings, sets tcp_tw_reuse, and forks
the relay, which gives up root.  Until the relay ends it enters the relay's ports into the redirect, for which root is
needed; then it puts back what it set.  The unix socket stays open until that is done, so launchers that come meanwhile
wait, and then start a new keeper: no two of them ever overlap.

Why tcp_tw_reuse.  All the relay's connections to a container come from one address, and it is the relay's side that
stays in TIME_WAIT for 60 s: 28,000 ephemeral ports are used up in seconds, and connections then fail or crawl.  With
the setting at 1 the kernel uses such a port again after one second, when TCP timestamps make that safe (ip-sysctl,
RFC 6191).  What was set before is kept in a file beside the socket, so that it is put back even if this process is
killed: by the next one.  The file's name has the namespace's inode number, which a later namespace may get again; the
namespace's cookie, which none ever gets again, is in the file (0 before Linux 5.14, which has none).
"""

import os
import signal
import socket
import sys
import tomllib
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType

from gangway.errors import InvalidRequest
from gangway.log import Log, open_log
from gangway.redirect.leases import serve
from gangway.relay.process import run
from gangway.relay.settings import Settings, checked
from gangway.runtime import netns_cookie

SETTINGS_PATH = Path("/etc/gangway/docker-proxy.toml")
STATUS_FD, LISTENER_FD = 2, 3
# After this, one that hangs (its log is on a file system that does not answer) ends, or no launcher could ever start
# another.
START_S = 9
_TW_REUSE = Path("/proc/sys/net/ipv4/tcp_tw_reuse")


def load_settings(path: Path) -> Settings:
    """The settings in a TOML file; the defaults if there is none.

    InvalidRequest names the key, or the place, that is wrong.
    """
    try:
        with path.open("rb") as file:
            given = tomllib.load(file)
    except FileNotFoundError:
        return Settings()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InvalidRequest(f"{path}: {error}") from None
    return checked(given, str(path))


class TwReuse:
    """net.ipv4.tcp_tw_reuse at 1 for the time of a `with` block.

    What it was before is kept in the file `kept`: "COOKIE VALUE".  A file with another cookie than `netns_cookie` is
    one that a dead namespace has left.
    """

    def __init__(self, kept: Path, netns_cookie: int, log: Log) -> None:
        self._kept = kept
        self._cookie = netns_cookie
        self._log = log

    def __enter__(self) -> None:
        try:
            before = self._read()
            if before is None:
                before = _TW_REUSE.read_text().strip()
                self._kept.write_text(f"{self._cookie} {before}")
            _TW_REUSE.write_text("1")
            self._log.info("net.ipv4.tcp_tw_reuse is 1 while the relay runs; it was %s", before)
        except OSError as error:
            self._log.warning(
                "net.ipv4.tcp_tw_reuse cannot be set (%s): many short connections will run out of ports", error
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            before = self._read()
            if before is not None:
                _TW_REUSE.write_text(before)
                self._kept.unlink()
                self._log.info("net.ipv4.tcp_tw_reuse is %s again", before)
        except OSError as failure:
            self._log.warning("net.ipv4.tcp_tw_reuse could not be put back: %s", failure)

    def _read(self) -> str | None:
        """What was set before, if it is this namespace's."""
        words = self._kept.read_text(errors="replace").split() if self._kept.exists() else []
        return words[1] if len(words) == 2 and words[0] == str(self._cookie) else None


def _netns_cookie(sock: socket.socket) -> int:
    """The number of the network namespace of `sock`, or 0 where the kernel does not say."""
    try:
        return netns_cookie(sock)
    except OSError:
        return 0


def keep(launchers: socket.socket, settings: Settings, log: Log) -> int:
    """Runs the relay, and waits for it; gives the exit status."""
    channel, relays_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    relay = os.fork()
    if relay == 0:
        channel.close()
        _be_the_relay(launchers, relays_end, settings, log)
    relays_end.close()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: os.kill(relay, signal.SIGTERM))
    _say("")
    with channel:
        if settings.redirect:
            serve(channel, lambda text: log.warning("%s", text))
    _, status = os.waitpid(relay, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if status:
        log.warning("the relay ended unexpectedly (%s); a launcher will start another", _how(status))
    return 1 if status else 0


def _be_the_relay(launchers: socket.socket, channel: socket.socket, settings: Settings, log: Log) -> None:
    status = 1
    try:
        run(launchers, settings, log, lambda: _say("0\n"), os.getppid(), channel)
        status = 0
    except Exception as error:
        _say(f"the relay cannot run: {error}")
        log.failure(error)
    finally:
        os._exit(status)


def _say(text: str) -> None:
    """Says `text` on the status pipe, once, and lets go of it: the launcher reads to its end."""
    signal.alarm(0)
    with suppress(OSError):  # the launcher is gone; its port is, too
        os.write(STATUS_FD, text.encode())
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, STATUS_FD)
    os.close(null)


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


def main() -> int:
    """Everything that can go wrong before the relay is up is said on the status pipe."""
    path = Path(sys.argv[1])
    signal.alarm(START_S)
    with socket.socket(fileno=LISTENER_FD) as launchers:
        try:
            settings = load_settings(SETTINGS_PATH)
            log = open_log(settings.log)
            kept = path.with_suffix(".tcp_tw_reuse")
            with TwReuse(kept, _netns_cookie(launchers), log) if settings.tcp_tw_reuse else nullcontext():
                return keep(launchers, settings, log)
        except (InvalidRequest, OSError) as error:
            _say(str(error))
            return 1
        finally:
            # While it listens, it is ours.  A launcher that has connected sees its connection end, and looks again.
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
