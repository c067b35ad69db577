"""Reads from Docker's API."""
