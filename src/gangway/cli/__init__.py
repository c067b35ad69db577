"""The command `gangway`."""

import click


@click.group()
@click.version_option(package_name="gangway", message="%(prog)s %(version)s")
def main() -> None:
    """Publishes containers' ports.

    So far dockerd is its user: start it with --userland-proxy-path=PATH/gangway-docker-proxy, the program beside this
    one.
    """
