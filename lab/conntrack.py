"""The kernel's connection tracking table: it shows whether a connection was translated (DNAT)."""

import socket

from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from lab.netns import Namespace

_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}


def was_translated(host: Namespace, protocol: str, address: str, port: int) -> bool:
    """True if the tracked flows to an address and port of `host` were sent on to another address.

    Deletes the entries, except those of SCTP.

    AssertionError: some flows were translated and some were not.
    """
    family, kind = (socket.AF_INET6, "V6") if ":" in address else (socket.AF_INET, "V4")
    translated = set()
    with host.entered(), NFCTSocket(nfgen_family=family) as conntrack:
        for message in list(conntrack.dump()):
            original, reply = message.get_attr("CTA_TUPLE_ORIG"), message.get_attr("CTA_TUPLE_REPLY")
            ports = original.get_attr("CTA_TUPLE_PROTO")
            destination = original.get_attr("CTA_TUPLE_IP").get_attr(f"CTA_IP_{kind}_DST")
            found = ports.get_attr("CTA_PROTO_NUM"), ports.get_attr("CTA_PROTO_DST_PORT"), destination
            if found == (_NUMBERS[protocol], port, address):
                translated.add(reply.get_attr("CTA_TUPLE_IP").get_attr(f"CTA_IP_{kind}_SRC") != address)
                if protocol != "sctp":  # pyroute2 cannot identify an SCTP entry by its ports
                    conntrack.entry("del", tuple_orig=NFCTAttrTuple.from_netlink(family, original))
    assert len(translated) <= 1, f"some flows to {protocol} {address} port {port} were translated and some were not"
    return translated == {True}
