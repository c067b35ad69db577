"""The kernel's own record of what was done to a connection: it says by which road a client really came."""

import socket

from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from lab.netns import Namespace

_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}


def was_translated(host: Namespace, protocol: str, address: str, port: int) -> bool:
    """Whether the tracked flows to there were sent on to another address; the record is deleted then.

    AssertionError: some were, some were not.
    """
    family, kind = (socket.AF_INET6, "V6") if ":" in address else (socket.AF_INET, "V4")
    roads = set()
    with host.entered(), NFCTSocket(nfgen_family=family) as conntrack:
        for message in list(conntrack.dump()):
            way, back = message.get_attr("CTA_TUPLE_ORIG"), message.get_attr("CTA_TUPLE_REPLY")
            ports = way.get_attr("CTA_TUPLE_PROTO")
            asked = way.get_attr("CTA_TUPLE_IP").get_attr(f"CTA_IP_{kind}_DST")
            found = ports.get_attr("CTA_PROTO_NUM"), ports.get_attr("CTA_PROTO_DST_PORT"), asked
            if found == (_NUMBERS[protocol], port, address):
                roads.add(back.get_attr("CTA_TUPLE_IP").get_attr(f"CTA_IP_{kind}_SRC") != address)
                if protocol != "sctp":  # pyroute2 cannot name such an entry by its ports
                    conntrack.entry("del", tuple_orig=NFCTAttrTuple.from_netlink(family, way))
    assert len(roads) <= 1, f"{protocol} to {address} port {port} went by both roads"
    return roads == {True}
