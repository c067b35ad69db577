"""The firewall: `render` turns a Plan into rules (pure), and a driver writes them to the kernel."""
