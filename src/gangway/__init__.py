"""gangway publishes the ports of containers; docs/architecture.md explains its parts."""
