"""The daemon: what is wanted (`store`), what is to be done about it (`reconcile`), who does it (`service`), and how to
ask for it (`api`)."""
