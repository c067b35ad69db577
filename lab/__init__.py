"""What the tests, the benchmark and the demo run in: real network namespaces, and a real dockerd in one of them."""
