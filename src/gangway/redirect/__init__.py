"""The redirect: sockets that ask for a published port at a loopback address are aimed at the container.

`sockets.bpf.c` is what runs in the kernel, `entries` says what goes into its maps, `loader` loads it and changes the
maps."""
