"""The relay data plane: sockets, streams, datagrams."""
