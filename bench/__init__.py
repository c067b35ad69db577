"""The benchmark: gangway beside docker-proxy, socat and haproxy in dockerd's service, beside iptables without Docker;
its loopback beside a client that asks the container directly.

    python -m bench                     every row, some 50 minutes on two cores; bench/RESULTS.md and bench/results.png
    python -m bench --only rr1 up8      some rows; these and --quick write to build/bench, not over the published table

What each module knows:

    rows        the issues' tables: what is promised for each row                                 pure
    tally       medians, ratios, whether a row holds                                              pure
    report      the tables in Markdown                                                            pure
    chart       the picture
    measures    how each row is measured
    rounds      who has a turn when, and what is done if it fails
    stage       a host, a container and a client, fresh for each turn
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
