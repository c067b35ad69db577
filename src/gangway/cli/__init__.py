"""The command `gangway`: `commands` turns a command line into a request, `client` sends it to the daemon, which `start`
starts if none runs, and `tables` and `explain` print the answer."""

import gc


def main() -> None:
    """Run the console script."""
    gc.disable()  # a command ends before there is anything worth collecting
    from gangway.cli import commands

    commands.main()
