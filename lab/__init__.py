"""What the tests, the benchmark and the demos run in: real network namespaces, gangway daemons and a real dockerd."""
