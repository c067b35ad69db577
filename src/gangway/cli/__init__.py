"""The command `gangway`: commands become requests to the daemon (`commands`, `run`, `client`), answers become tables
and sentences (`views`)."""

import sys


def main() -> None:
    """The console script.  `publish`, which scripts call in loops, is spared the weight of the rest (`quick`)."""
    from gangway.cli import quick

    done = quick.publish(sys.argv[1:])
    if done is not None:
        sys.exit(done)
    from gangway.cli.commands import gangway

    gangway(prog_name="gangway")
