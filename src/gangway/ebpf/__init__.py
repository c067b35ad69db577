"""eBPF programs: the loopback redirect, and the steering of published ports to the relay's sockets."""
