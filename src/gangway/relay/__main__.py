"""The daemon's relay: `python -m gangway.relay SETTINGS`, SETTINGS as JSON.

What this file knows: what the daemon hands over.  What it must not know: what the relay does.

How it works.  Standard input is a unix socket that listens already; to standard output goes `0\\n` when it serves,
or why it cannot.  It has no keeper: it outlives the daemon, and ends by itself when it has neither a port nor a daemon.
"""

import json
import os
import socket
import sys

from gangway.log import open_log
from gangway.relay.process import run
from gangway.relay.settings import Settings

_STDOUT = 1


def main() -> int:
    """Everything that can go wrong before it serves is said on standard output."""
    settings = Settings(**json.loads(sys.argv[1]))
    with socket.socket(fileno=os.dup(0)) as daemons:
        try:
            log = open_log(settings.log)
            run(daemons, settings, log, lambda: _say("0\n"))
        except OSError as error:
            _say(str(error))
            return 1
    return 0


def _say(text: str) -> None:
    """Says it, and lets go of what the daemon handed over."""
    os.write(_STDOUT, text.encode())
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, _STDOUT):
        os.dup2(null, fd)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
