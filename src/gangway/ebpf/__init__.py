"""The eBPF programs: `redirect` leads loopback clients straight to the container, `steering` leads clients of published
ports to the relay's sockets.  `program` and `loader` do what both need."""
