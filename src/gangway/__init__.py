"""gangway publishes containers' ports."""
