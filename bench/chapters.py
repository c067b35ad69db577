"""The chapters of the results: how the rows of each are measured, and what a reader needs to know about them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chapter:
    """A group of rows with its own table."""

    title: str
    direction: str
    """From where to where traffic flows; the heading of the table's first column."""
    note: str
    """What a reader of the figures needs to know."""


RELAYED = Chapter(
    "The relay in docker-proxy's place",
    "127.0.0.1 → container",
    """\
gangway has `redirect = false` here, because otherwise a client on the host would not use its relay. `direct` is a
client that connects to the container's own address. CPU time and memory are those of all of the contender's processes,
gangway's daemon, too. Idle connections have exchanged a byte each, at four ports: docker-proxy has a process for each
port, gangway and haproxy one for all, whose limit of 20,000 descriptors holds fewer than 10,000 connections. haproxy
has as many threads as cores. socat, direct, connections for 30 s and memory are measured in one round.""",
)
RELAYED_FROM_AFAR = Chapter(
    "The relay, for clients on another machine",
    "another machine → container",
    """\
No rules lead to the container, so the relay carries everything. The other machine is a namespace that is connected
directly to the host; the client and the container's server each have a core of their own. haproxy has as many threads
as cores. `direct` is the container's own address, routed. socat and direct are measured in one round.""",
)
RELAYED_IPV6 = Chapter(
    "The relay, for IPv6 clients of an IPv4 container",
    "another machine, IPv6 → container, IPv4",
    """\
The port is published at `::`, and the container is addressed by IPv4, as dockerd does it for a container without IPv6:
no rule can translate between the two, so every program copies. Hosts, cores and haproxy are as above.""",
)
IN_DOCKER = Chapter(
    "In docker-proxy's place: start and memory",
    "one launcher per port",
    """\
gangway is configured as its users have it: it redirects, and its daemon and relay run; both count in its memory. Memory
is measured once.""",
)
MANY_IN_DOCKER = Chapter(
    "In docker-proxy's place: containers with many ports",
    "under dockerd",
    """\
dockerd is this machine's own, and starts gangway's launcher or docker-proxy for each port; its rules are the same. With
200 ports there are two rounds, with 1,000 ports one.""",
)
REDIRECTED = Chapter(
    "Loopback: published ports",
    "127.0.0.1 → container",
    """\
gangway is its daemon, with nftables. `direct` connects to the container's own address on the same host, with the same
daemon, network, rules and tracked connections, so that only the redirect differs. The two alternate, 30 times in each
of two rounds, with bulk transfers for four times as long. The client and the container's server each have a core of
their own. docker-proxy has a separate host without any rules.""",
)
UNRELATED = Chapter(
    "Loopback: ports that are not published",
    "127.0.0.1 → the host itself",
    """\
gangway's eBPF programs run whenever a process on the machine connects. Only connect() is timed, in batches, each on a
new socket. A refused connect() is the shortest one, so the programs' part of the time is largest there: a program that
only returns costs 2 % of it. One process measures with the programs attached and without, in alternation, in two
rounds; no other process has programs attached meanwhile.""",
)
WITHOUT_DOCKER = Chapter(
    "Without Docker",
    "another machine → container",
    """\
The other machine is a namespace that is connected directly to the host, which routes between it and the container's
bridge; the client and the container's server each have a core of their own. gangway uses nftables. `iptables` is what
an administrator types: forwarding, MASQUERADE for the containers and one DNAT rule; nothing is filtered. `direct` is
the container's own address, routed, without any rules; it is measured in one round. Publishing another port is timed at
the daemon's API, with two daemons in alternation; the command is timed from start to end, with the daemon running
already, in alternation with a Python that does nothing. Memory is compared with a limit; of a page that is shared with
other programs, PSS counts a share.""",
)

ALL_PORTS = Chapter(
    "All ports at once",
    "ports 1024 to 65000",
    """\
gangway is its daemon, with nftables. All ports are `-p 1024-65000:1024-65000/tcp -p 1024-65000:1024-65000/udp`: 127,954
ports. dockerd's 300 are TCP ports, with docker-proxy. There is one round. Commands are timed from start to end.
gangway's runs with the daemon running, the container attached and nothing published yet, so that time and memory
include the start of the relay. Memory is the decrease of the machine's available memory (MemAvailable), compared with a
limit. Traffic goes to the last port of 1024-65000, in alternation with another host that has only this port; after half
of the time two new hosts replace them. `loopback` is redirected; `relay` connects to 127.0.0.1, too, with
`redirect = false`. Another port is published by the daemon's API, with two daemons in alternation. The restart is timed
from the signal that stops the daemon until the next one serves, and compared with a limit; meanwhile another machine
and a process on the host keep connecting to a published port, and no connection may fail.""",
)

DOCKER_FRONT = Chapter(
    "Docker's ports without dockerd's rules and proxies",
    "under dockerd",
    """\
gangway is a dockerd with `--iptables=false --ip6tables=false --userland-proxy=false` and gangway's daemon, which reads
dockerd's API; it is compared with the same dockerd as it comes. Times are those of the docker command until the last
port answers another machine, or is refused, less those of a container without ports on the same host. The first answer
is timed from the return of `docker run`, and compared with dockerd's time plus 20 ms. The containers of the loop have 3
ports each, and the loops alternate every 10 containers. Memory (PSS) is the growth of dockerd, and the proxies, or
gangway's daemon and relay. Traffic goes to one of 2,000 ports, in alternation; the client and the container's server
each have a core of their own. dockerd as it comes publishes 2,000 ports once in the whole run.""",
)
