"""The benchmark: gangway beside docker-proxy, socat and haproxy in dockerd's service, beside iptables without Docker;
its loopback beside a client that asks the container directly; and many ports at once, beside few and beside dockerd.

    python -m bench                     every row, some 75 minutes on two cores; bench/RESULTS.md and two pictures
    python -m bench --only rr1 up8      some rows; these and --quick write to build/bench, not over the published table

What each module knows:

    rows        the issues' tables: what is promised for each row                                 pure
    result       medians, ratios, whether a row holds                                              pure
    curve       what many ports cost, by their number                                             pure
    report      the tables in Markdown                                                            pure
    chart       the picture of the ratios
    scale_chart the picture of the curve
    measures    how each row is measured
    turn        what a measure has at hand
    publishing  many ports published at once, with gangway's commands and with docker's
    ranges      traffic to the last port of a range
    crowd       many mappings in many containers, and a daemon that starts anew among them
    rounds      who has a turn when, and what is done if it fails
    setup       a host, a container and a client, fresh for each turn
    contenders  how each contender in dockerd's service is started; who is in which chapter
    daemon      gangway's daemon as a contender
    remote      how a neighbour of the host gets to a container: gangway's daemon, iptables
    bystander   a connect() to what is not published, with the redirect's programs and without
    processes   what a contender's processes spend, and how they are ended
    traffic     the load generator load.c
    database    PostgreSQL and pgbench
    machine     what the figures were measured on

A contender's turn is a namespace of its own, made for it and gone after it: no TIME_WAIT, no conntrack entry and no
process of one turn is there in the next one.
"""
