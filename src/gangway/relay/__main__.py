"""The relay's entry point: `python -m gangway.relay SETTINGS`, SETTINGS as JSON.

Standard input is the control socket, which listens already; on standard output goes `0\\n` when the relay serves, or
why it cannot.
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
    """Run the relay; report on standard output what goes wrong before it serves."""
    settings = Settings(**json.loads(sys.argv[1]))
    with socket.socket(fileno=os.dup(0)) as control:
        try:
            log = open_log(settings.log)
            run(control, settings, log, lambda: _report("0\n"))
        except OSError as error:
            _report(str(error))
            return 1
    return 0


def _report(text: str) -> None:
    """Report, once, and close what the daemon handed over."""
    os.write(_STDOUT, text.encode())
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, _STDOUT):
        os.dup2(null, fd)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
