"""The relay's entry point: `python -m gangway.relay SETTINGS`, SETTINGS as JSON.

Standard input is the control socket, which is bound.  The relay writes to standard output `0\\n` when it is
ready, or why it cannot start.
"""

import gc
import json
import os
import socket
import sys
from contextlib import suppress

from gangway.log import Log, open_log
from gangway.relay.core.worker import run_worker
from gangway.relay.privilege import drop_privileges, raise_descriptor_limit
from gangway.relay.process import RelayProcess
from gangway.relay.settings import Settings

_STDOUT = 1


def main() -> int:
    """Run the relay, and return its exit status."""
    settings = Settings(**json.loads(sys.argv[1]))
    with socket.socket(fileno=os.dup(0)) as control:
        try:
            control.listen()  # here, not in the daemon: clients are told the pid of the process that did (SO_PEERCRED)
            log = open_log(settings.log)
        except OSError as error:
            _report(str(error))
            return 1
        try:
            _run(control, settings, log)
        except Exception as error:
            log.failure(error)
            _report(str(error))  # heard only if the relay was not ready yet
            return 1
    return 0


def _run(control: socket.socket, settings: Settings, log: Log) -> None:
    raise_descriptor_limit()
    drop_privileges()
    relay = RelayProcess(control, settings, log)
    gc.collect()
    gc.freeze()
    _report("0\n")
    relay.loop.run()
    while relay.workers.start_requested:
        role = relay.workers.start()
        if role is not None:
            control.close()
            relay.become_worker()
            del relay
            gc.unfreeze()
            gc.collect()  # closes every socket of the relay process
            return run_worker(*role, settings, log)
        relay.loop.run()


def _report(text: str) -> None:
    """Report to the daemon, once, and close the descriptors that it handed over."""
    with suppress(OSError):  # the daemon has exited; another one will connect
        os.write(_STDOUT, text.encode())
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, _STDOUT):
        os.dup2(null, fd)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
