"""Rules written with iptables and ip6tables."""
