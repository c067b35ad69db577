"""Rules as iptables-save lists them: dockerd's, of several releases, and those of other programs."""

Listing = dict[str, tuple[str, ...]]
"""The rules of each table."""

# As dockerd 20.10 and 26 write them: docker0, a network without icc, an internal one, ports of two host addresses.
RELEASE_20: Listing = {
    "filter": (
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
        "-A FORWARD -o net1 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -o net1 -j DOCKER",
        "-A FORWARD -i net1 ! -o net1 -j ACCEPT",
        "-A FORWARD -i br-b1e296844b6a -o br-b1e296844b6a -j ACCEPT",
        "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -o docker0 -j DOCKER",
        "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
        "-A FORWARD -i docker0 -o docker0 -j ACCEPT",
        "-A FORWARD -i net1 -o net1 -j DROP",
        "-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 81 -j ACCEPT",
        "-A DOCKER -s 172.19.0.2/32 -d 172.19.0.3/32 -i net1 -o net1 -p tcp -m tcp --dport 80 -j ACCEPT",
        "-A DOCKER -s 172.19.0.3/32 -d 172.19.0.2/32 -i net1 -o net1 -p tcp -m tcp --sport 80 -j ACCEPT",
        "-A DOCKER-ISOLATION-STAGE-1 -i net1 ! -o net1 -j DOCKER-ISOLATION-STAGE-2",
        "-A DOCKER-ISOLATION-STAGE-1 ! -s 172.18.0.0/16 -o br-b1e296844b6a -j DROP",
        "-A DOCKER-ISOLATION-STAGE-1 ! -d 172.18.0.0/16 -i br-b1e296844b6a -j DROP",
        "-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2",
        "-A DOCKER-ISOLATION-STAGE-1 -j RETURN",
        "-A DOCKER-ISOLATION-STAGE-2 -o net1 -j DROP",
        "-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP",
        "-A DOCKER-ISOLATION-STAGE-2 -j RETURN",
        "-A DOCKER-USER -j RETURN",
    ),
    "nat": (
        "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER",
        "-A POSTROUTING -s 172.19.0.0/16 ! -o net1 -j MASQUERADE",
        "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j SNAT --to-source 10.0.0.1",
        "-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 81 -j MASQUERADE",
        "-A DOCKER -i net1 -j RETURN",
        "-A DOCKER -i docker0 -j RETURN",
        "-A DOCKER -d 127.0.0.1/32 ! -i docker0 -p tcp -m tcp --dport 8001 -j DNAT --to-destination 172.17.0.2:81",
        "-A DOCKER ! -i docker0 -p sctp -m sctp --dport 8000 -j DNAT --to-destination 172.17.0.2:80",
    ),
    "mangle": ("-A POSTROUTING -s 172.17.0.2/32 -p sctp -m sctp --sport 80 -j CHECKSUM --checksum-fill",),
}
# As 28 and 29 write them, with chains of their own for each purpose, and drops in `raw`; no proxy.
RELEASE_28: Listing = {
    "raw": (
        "-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP",
        "-A PREROUTING -d 172.17.0.3/32 ! -i docker0 -p tcp -m tcp --dport 80 -j DROP",
        "-A PREROUTING -d 172.20.0.0/16 -i lo -j ACCEPT",
        "-A PREROUTING -d 172.20.0.0/16 ! -i web -j DROP",
        "-A PREROUTING -d 127.0.0.1/32 -i loopback0 -p tcp -m tcp --dport 8080 -j ACCEPT",
        "-A PREROUTING -d 127.0.0.1/32 ! -i lo -p tcp -m tcp --dport 8080 -j DROP",
    ),
    "filter": (
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j DOCKER-FORWARD",
        "-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT",
        "-A DOCKER -d 172.20.0.2/32 -i web -o web -p udp -m udp --dport 53 -m conntrack ! --ctorigdst 172.20.0.2"
        " -j ACCEPT",
        "-A DOCKER ! -i docker0 -o docker0 -j DROP",
        "-A DOCKER ! -i web -o web -j ACCEPT",
        "-A DOCKER -o web -p icmp -j ACCEPT",
        "-A DOCKER-BRIDGE -o docker0 -j DOCKER",
        "-A DOCKER-BRIDGE -o web -j DOCKER",
        "-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A DOCKER-CT -o web -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A DOCKER-FORWARD -j DOCKER-CT",
        "-A DOCKER-FORWARD -j DOCKER-INTERNAL",
        "-A DOCKER-FORWARD -j DOCKER-BRIDGE",
        "-A DOCKER-FORWARD -m mark --mark 0x1 -j ACCEPT",
        "-A DOCKER-FORWARD -i docker0 -j ACCEPT",
        "-A DOCKER-FORWARD -i web -o web -j DROP",
        "-A DOCKER-FORWARD -i web ! -o web -j ACCEPT",
        "-A DOCKER-INTERNAL ! -s 192.0.2.0/24 -o inner -j DROP",
        "-A DOCKER-INTERNAL ! -d 192.0.2.0/24 -i inner -j DROP",
        "-A DOCKER-ISOLATION-STAGE-1 -i web -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A DOCKER-ISOLATION-STAGE-1 -o web -j RETURN",
    ),
    "nat": (
        "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER",
        "-A POSTROUTING -o docker0 -m addrtype --src-type LOCAL -j MASQUERADE",
        "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        "-A POSTROUTING -s 172.20.0.0/16 ! -o web -j MASQUERADE",
        "-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE",
        "-A DOCKER -d 127.0.0.0/8 -i loopback0 -j RETURN",
        "-A DOCKER -d 127.0.0.1/32 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
    ),
}
RELEASE_28_IPV6: Listing = {
    "raw": ("-A PREROUTING -d fd01::2/128 ! -i br-b1e296844b6a -j DROP",),
    "filter": (
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j DOCKER-FORWARD",
        "-A DOCKER -d fd01::2/128 ! -i br-b1e296844b6a -o br-b1e296844b6a -p tcp -m tcp --dport 80 -j ACCEPT",
        "-A DOCKER -i net1 -o net1 -p ipv6-icmp -m icmp6 --icmpv6-type 135 -j ACCEPT",
        "-A DOCKER ! -i br-b1e296844b6a -o br-b1e296844b6a -j DROP",
        "-A DOCKER-BRIDGE -o br-b1e296844b6a -j DOCKER",
        "-A DOCKER-BRIDGE -o net1 -j DOCKER",
        "-A DOCKER-CT -o br-b1e296844b6a -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A DOCKER-FORWARD -j DOCKER-CT",
        "-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1",
        "-A DOCKER-FORWARD -j DOCKER-BRIDGE",
        "-A DOCKER-FORWARD -i br-b1e296844b6a -j ACCEPT",
        "-A DOCKER-ISOLATION-STAGE-1 ! -s fd02::/64 ! -i inner -o inner -j DROP",
        "-A DOCKER-ISOLATION-STAGE-1 ! -d fd02::/64 -i inner ! -o inner -j DROP",
    ),
    "nat": (
        "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-A OUTPUT ! -d ::1/128 -m addrtype --dst-type LOCAL -j DOCKER",
        "-A POSTROUTING -s fd01::/64 ! -o br-b1e296844b6a -j MASQUERADE",
        "-A POSTROUTING -s fd01::2/128 -d fd01::2/128 -p tcp -m tcp --dport 80 -j MASQUERADE",
        "-A DOCKER ! -s fe80::/10 ! -i net1 -p tcp -m tcp --dport 8080 -j DNAT --to-destination [fd01::2]:80",
    ),
}
# 28.0.0 has a set of bridges; Swarm has left its chain.
RELEASE_28_0: Listing = {
    "filter": (
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j DOCKER-INGRESS",
        "-A FORWARD -m set --match-set docker-ext-bridges-v4 dst -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
        "-A FORWARD -m set --match-set docker-ext-bridges-v4 dst -j DOCKER",
        "-A FORWARD -i docker0 -j ACCEPT",
        "-A FORWARD -i docker_gwbridge ! -o docker_gwbridge -j ACCEPT",
        "-A FORWARD -i docker_gwbridge -o docker_gwbridge -j DROP",
        "-A DOCKER ! -i docker_gwbridge -o docker_gwbridge -j DROP",
        "-A DOCKER-INGRESS -p tcp -m tcp --dport 8080 -j ACCEPT",
        "-A DOCKER-INGRESS -p tcp -m tcp --sport 8080 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A DOCKER-INGRESS -j RETURN",
        "-A DOCKER-ISOLATION-STAGE-1 -i docker_gwbridge ! -o docker_gwbridge -j DOCKER-ISOLATION-STAGE-2",
        "-A DOCKER-ISOLATION-STAGE-2 -o docker_gwbridge -j DROP",
        "-A DOCKER-USER -j RETURN",
    ),
    "nat": (
        "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER-INGRESS",
        "-A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER-INGRESS",
        "-A POSTROUTING -o docker_gwbridge -m addrtype --src-type LOCAL -j MASQUERADE",
        "-A DOCKER-INGRESS -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.18.0.2:8080",
        "-A DOCKER-INGRESS -j RETURN",
    ),
}
# Swarm has left the rules of encrypted networks, as 20.10 and later releases write them.
_U32 = '-m udp --dport 4789 -m u32 --u32 "0x0>>0x16&0x3c@0xc&0xffffff00=0x100000"'
_BPF = (
    '-m udp --dport 4789 -m bpf --bytecode "7,32 0 0 4294963252,7 0 0 0,64 0 0 4,116 0 0 8,21 1 0 4096,6 0 0 0,'
    '6 0 0 4294967295"'
)
_MARKED = "-j MARK --set-xmark 0xd0c4e3/0xffffffff"
ENCRYPTED: Listing = {
    "mangle": (
        f"-A OUTPUT -p udp {_U32} {_MARKED}",
        f"-A OUTPUT -p udp {_BPF} {_MARKED}",
        f"-A OUTPUT -p udp {_BPF} -m owner ! --socket-exists {_MARKED}",
        "-A OUTPUT -p udp -m udp --dport 4789 -m owner --socket-exists -m mark --mark 0xd0c4e3"
        " -j MARK --set-xmark 0x0/0xffffffff",
    ),
    "filter": (
        f"-A INPUT -p udp -m policy --dir in --pol none {_BPF} -j DROP",
        f"-A INPUT -p udp -m policy --dir in --pol ipsec {_U32} -j ACCEPT",
        f"-A INPUT -p udp {_U32} -j DROP",
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j DOCKER-INGRESS",
        "-A DOCKER-INGRESS -j RETURN",
        "-A DOCKER-USER -j RETURN",
        "-A FORWARD -o docker0 -j DOCKER",
        "-A DOCKER ! -i docker0 -o docker0 -j DROP",
    ),
    "nat": ("-A DOCKER -i docker0 -j RETURN", "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER"),
}
RELEASES = {
    "20.10": RELEASE_20,
    "28": RELEASE_28,
    "28 IPv6": RELEASE_28_IPV6,
    "28.0": RELEASE_28_0,
    "encrypted networks": ENCRYPTED,
}
# Other programs' rules, some of them much like dockerd's.
OTHERS: Listing = {
    "raw": (
        "-A PREROUTING -d 127.0.0.0/8 ! -i lo -j DROP",
        "-A PREROUTING -d 10.1.0.0/16 ! -i eth1 -j DROP",
        "-A PREROUTING -d 10.1.0.0/16 -i lo -j ACCEPT",
        "-A PREROUTING -d 127.0.0.1/32 ! -i lo -p tcp -m tcp --dport 5432 -j DROP",
    ),
    "mangle": (
        "-A POSTROUTING -s 10.1.0.2/32 -p sctp -m sctp --sport 80 -j CHECKSUM --checksum-fill",
        "-A OUTPUT -p udp -m udp --dport 4789 -j MARK --set-xmark 0xd0c4e3/0xffffffff",
        "-A OUTPUT -p udp -m owner --socket-exists -m udp --dport 4789 -j MARK --set-xmark 0x0/0xffffffff",
        f"-A OUTPUT -p udp {_U32} -j MARK --set-xmark 0x1/0xffffffff",
    ),
    "nat": (
        "-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.1.0.2:80",
        "-A PREROUTING -m addrtype --dst-type LOCAL -j theirs",
        "-A POSTROUTING -s 10.1.0.0/16 ! -o eth1 -j MASQUERADE",
        "-A POSTROUTING -s 10.1.0.2/32 -d 10.1.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE",
        "-A POSTROUTING -o eth1 -m addrtype --src-type LOCAL -j MASQUERADE",
        "-A theirs -s 203.0.113.0/24 -j RETURN",
    ),
    "filter": (
        "-A INPUT -i docker0 -j ACCEPT",
        "-A INPUT -p udp -m udp --dport 4789 -j DROP",
        '-A INPUT -p udp -m udp --dport 4789 -m u32 --u32 "0x0>>0x16&0x3c@0xc=0x100000" -j DROP',
        "-A FORWARD -i docker0 -o eth0 -j ACCEPT",
        "-A FORWARD -i docker0 -j ACCEPT",
        "-A FORWARD -i eth1 ! -o eth1 -j ACCEPT",
        "-A FORWARD -i eth1 -o eth1 -j DROP",
        "-A FORWARD -o eth1 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -j theirs",
        "-A FORWARD",
        '-A theirs -m comment --comment "not -j DOCKER" -j ACCEPT',
    ),
}
