"""The firewall: a Plan as rules (`nftables`, `iptables`: pure), and how rules get into the kernel (`apply`)."""
