"""`make demo` and `make demo-docker`: ports published by gangway, what each kind of client gets, and what it costs."""
