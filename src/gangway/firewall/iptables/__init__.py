"""Rules by iptables and ip6tables."""
