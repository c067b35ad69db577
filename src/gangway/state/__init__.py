"""What is wanted: `requests` and `leases` change it, `registry` and `database` keep it."""
