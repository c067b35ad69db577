"""The command `gangway`, a client of the daemon's API."""

import gc


def main() -> None:
    """Run the command that was typed."""
    gc.disable()  # a command ends before there is anything worth collecting
    from gangway.cli.main import main as run_command

    run_command()
