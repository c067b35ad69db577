"""iptables: rendering and applying."""
