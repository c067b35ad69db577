"""The relay: one user-space process that serves all published ports, for clients that the kernel cannot lead to the
container.  `client` is the daemon's end; `protocol` defines their messages."""
