"""nftables: rendering and applying."""
