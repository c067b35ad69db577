"""The relay's data plane: event loop, TCP and SCTP streams, UDP datagrams."""
