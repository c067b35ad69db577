"""Rules written with nftables."""
