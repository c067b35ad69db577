"""`make demo`: a real dockerd that publishes a container's ports through gangway, and what each kind of client sees."""
