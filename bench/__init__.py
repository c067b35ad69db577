"""The benchmark: gangway compared with docker-proxy, iptables and other programs.

Under dockerd it is compared with docker-proxy, socat and haproxy, without Docker with iptables, on loopback with a
direct connection, and with dockerd itself when many ports are published at once, by gangway's commands or by docker's.

    python -m bench                     some 30 minutes on two cores; writes bench/RESULTS.md and pictures
    python -m bench --docker            the rows of docker-front, some 20 minutes; writes bench/DOCKER.md and pictures
    python -m bench --only rr1 up8      some rows; with this or --quick the results go to build/bench

A *contender* is a program that makes a container's ports reachable (gangway, docker-proxy, …). Each *row* of the
results compares contenders by one figure. In each *round* every contender of a row has a *turn*: it is measured in
network namespaces that are created for the turn and deleted after it, so that no TIME_WAIT, no conntrack entry and no
process of one turn can influence the next.

    chapters         the groups of rows, and what a reader of each needs to know            (pure)
    rows             the rows, with the bound and the aim of each                          (pure)
    result           medians and ratios of a row, and whether its bound holds              (pure)
    curve            the cost of many ports, by their number                               (pure)
    report           the tables in Markdown                                                (pure)
    chart            the picture of the ratios
    scale_chart      the pictures of the curve
    measures         how each row is measured
    turn             what a measurement uses in its turn
    docker_front     containers' ports under dockerd, and under dockerd with gangway's Docker front
    docker_hosts     the hosts for that, with their dockerds
    publishing       many ports published at once, with gangway's commands and with docker's
    ranges           traffic to the last port of a range
    many_containers  many mappings in many containers, and a restart of the daemon with them
    unrelated        connect() to a port that is not published, with gangway's eBPF programs attached and without
    rounds           the order of the turns, and what happens if one fails
    setup            the host, the container and the client of a turn
    contenders       how each contender under dockerd is started, and the contenders of each chapter
    daemon           gangway's daemon as a contender
    remote           the contenders without Docker, with a client on another machine
    processes        starting, measuring and ending a contender's processes
    traffic          the load generator: load.c, load_connect.c, load_server.c
    database         PostgreSQL and pgbench
    machine          the machine and the versions that the figures were measured with
"""
