"""The command `gangway`: `commands` turns words into requests, `client` sends them to the daemon (which `start` starts
if there is none), `tables` and `explain` print the answers."""

import gc


def main() -> None:
    """The console script."""
    gc.disable()  # a command ends before there is anything worth collecting
    from gangway.cli import commands

    commands.main()
