"""The userland relay: any number of published ports in one process, for the roads that the kernel will not build."""
