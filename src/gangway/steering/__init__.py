"""Steering: one socket of the relay's for each protocol and family serves every published port.

`steer.bpf.c` is what runs in the kernel when a packet looks for a socket, and when a program binds one; `entries` says
what goes into its maps, `loader` loads it and changes the maps."""
