"""The address that a client of a UDP server asked, as an nftables map: answers from another port leave from there.

A server may answer from a new port (TFTP: RFC 1350, 4).  For conntrack that begins a connection of its own, which
nothing ties to the client's: it would leave from the host's primary address, or reach a client on the host with the
container's.

The key is the container, the client and its port.  nft 1.0.6 aborts the process if the key of such a rule is longer
than 16 bytes: for IPv6 it has the second half of the client's address, the interface identifier (RFC 4291, 2.5.1), and
the last four bytes of the container's.
"""

# 30 s is long for a client that waits for its first answer.  A full map learns nothing more, and nothing else happens.
_MAP = """\
	map asked{f} {{
		typeof {key} : {word} daddr
		size 16384
		flags dynamic, timeout
		timeout 30s
	}}
"""
_WORD = {4: "ip", 6: "ip6"}
# Of IPv6's header, in bits: where the halves of the source address begin (RFC 8200, 3), and those of the destination's.
_KEY = {
    4: ("ip daddr . ip saddr . udp sport", "ip saddr . ip daddr . udp dport"),
    6: ("@nh,288,32 . @nh,128,64 . udp sport", "@nh,160,32 . @nh,256,64 . udp dport"),
}
DECLARATION = "".join(_MAP.format(f=family, word=word, key=_KEY[family][0]) for family, word in _WORD.items())
_UPDATES = [
    f"ct status dnat meta nfproto ipv{family} meta l4proto udp "
    f"update @asked{family} {{ {_KEY[family][0]} : ct original {word} daddr }}"
    for family, word in _WORD.items()
]
REMEMBER = [f"oifname @bridges {update}" for update in _UPDATES]
"""The rules for the first datagram of a client."""
ANSWER = [
    f"meta nfproto ipv{family} meta l4proto udp snat {word} to {_KEY[family][1]} map @asked{family}"
    for family, word in _WORD.items()
]
"""The rules for a container's first datagram from a new port, on its way out or to a socket of the host."""
PROBE = f"{DECLARATION}\tchain c {{ {'; '.join(_UPDATES)}; }}"
"""The body of a table that a kernel accepts if a rule can add elements to a map."""
