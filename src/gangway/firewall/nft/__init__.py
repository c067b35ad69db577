"""Rules by nftables."""
