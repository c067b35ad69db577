"""What is read from Docker's API."""
