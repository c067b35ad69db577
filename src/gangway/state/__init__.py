"""What is wanted: requests, the registry and its database."""
