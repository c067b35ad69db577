"""The daemon's process: `main` runs it, `parts` puts its parts together, `api` serves commands and `leases` serves
docker-proxy launchers."""
