"""The hands: links, namespaces, settings, tracked connections, sockets.  Plain arguments; no model, no plan."""
