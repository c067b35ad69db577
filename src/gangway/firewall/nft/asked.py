"""The IPv4 address that a client of a UDP server asked, as an nftables map: answers from another port leave from there.

A server may answer from a new port (TFTP: RFC 1350, 4).  For conntrack that begins a connection of its own, which
nothing ties to the client's: it would leave from the host's primary address, or reach a client on the host with the
container's.

There is no such map for IPv6: nft 1.0.6 aborts the process if the key of such a rule is longer than 16 bytes.
"""

PROBE = (
    "\tmap m { type inet_service : ipv4_addr; flags dynamic, timeout; }\n"
    "\tchain c { meta l4proto udp update @m { udp sport timeout 1m : ct original ip daddr }; }"
)
"""The body of a table that a kernel accepts if a rule can add elements to a map."""
# By container, client and its port.  30 s is long for a client that waits for its first answer.  A full map learns
# nothing more, and nothing else happens.
DECLARATION = """\
	map asked {
		type ipv4_addr . ipv4_addr . inet_service : ipv4_addr
		size 16384
		flags dynamic, timeout
		timeout 30s
	}
"""
REMEMBER = (
    "oifname @bridges ct status dnat meta l4proto udp update @asked "
    "{ ip daddr . ip saddr . udp sport : ct original ip daddr }"
)
"""The rule for the first datagram of a client."""
ANSWER = "meta l4proto udp snat ip to ip saddr . ip daddr . udp dport map @asked"
"""The rule for a container's first datagram from a new port, on its way out or to a socket of the host."""
