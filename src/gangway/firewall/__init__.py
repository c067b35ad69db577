"""The firewall: a Plan rendered as rules (pure), and the drivers that write these rules to the kernel."""
