"""gangway publishes the ports of containers; docs/architecture.md explains its parts."""

__version__ = "0.1.0"
