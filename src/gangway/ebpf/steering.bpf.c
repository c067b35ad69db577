/* Steering: packets for all published ports of a protocol and family go to one socket of the relay.
 *
 * What this file knows: which ports are published, and which socket serves a protocol and family.  What it must not know: where
 * the ports lead.
 *
 * Theory of operation.  A socket for each port is what makes a large range expensive.  But the kernel looks up the socket for a
 * packet that belongs to no connection, and Linux runs a program first (BPF_PROG_TYPE_SK_LOOKUP, attached to the host's network
 * namespace).  `steer` selects the relay's socket of the protocol and family from the map `relay_sockets`: a TCP listener, which
 * accepts a connection whose local address is the one that the client connected to; or a UDP socket, which receives the
 * destination address with each datagram.  Connections, and connected UDP sockets, are found before the program runs.  So are
 * members of a multicast group and receivers of a broadcast: those datagrams are not steered.
 *
 *     packet -> does it belong to a connection?  -> steer: is the port published?  -> yes: the relay's socket
 *                                                                                   -> no:  the socket that listens there
 *
 * Without a socket, another program could bind the port.  So bind(2) runs a program, too (BPF_PROG_TYPE_CGROUP_SOCK_ADDR at the
 * root of the cgroups), which returns EADDRINUSE where a socket would have been in conflict: at the published address, at the
 * unspecified address, or at any address if all are published.  Addresses in `excluded` are neither steered nor refused: there,
 * other programs serve the port.
 *
 * A port is *held* if another program publishes it and has a socket there that it never reads: dockerd without rules and proxies of
 * its own.  Packets go to the relay's socket all the same, as the program runs before the kernel looks for one.  But bind() is
 * allowed: dockerd closes the socket and binds it again whenever the container is restarted.  Nor can the relay bind one to
 * answer from (host/sockets.py, open_raw).  At an excluded address a TCP client would be connected to that socket, and wait for an
 * answer.  There the lookup fails (SK_DROP), so that the connection is refused.  No other program can listen there: the holder's
 * socket does, at all addresses or at this one.  UDP sockets may share a port (SO_REUSEADDR), so datagrams are left alone.
 *
 * A program that lets the kernel choose a port (bind() to port 0, or sendto() without bind()) may get a published one all the
 * same: a setting prevents that (host/reserved_ports.py), but not if nearly all ports to choose from are published.  Such a port
 * is *auto-bound*: while that socket exists, the port is neither steered nor redirected.  Otherwise a program that queries a name
 * server from such a socket would never get the answer.  Firewall rules do not know about it: clients that arrive by an interface
 * get to the container.  Auto-bound ports are recorded by socket (`bind_states`, which the kernel frees with the socket) and by
 * port.  The end of some sockets is not reported (MPTCP's subflows, the kernel's own), so the daemon checks from time to time
 * whether a port is still in use.  A port that listen() chooses without bind() is not recorded: no program runs then.  Nor is a
 * held port, at whose address the kernel chooses it for nobody while its holder has the socket.
 *
 * A UDP answer can leave only from a socket that is bound to the port.  The relay may bind one, even below 1024 although it has
 * no privilege: it writes the socket's cookie into `relay_binding`, memory that only the relay and the daemon have.
 *
 * What it costs other traffic: a lookup in `port_counts`, a table of bytes, for each new connection to the host, each datagram to
 * or from a socket that is not connected, and each bind(); and at the end of a socket a lookup of its storage.
 *
 * Needs: Linux 5.18, for bpf_set_retval: before, bind() would fail with EPERM, which means something else to programs.
 * Sources: net/ipv4/inet_hashtables.c (inet_lookup_run_sk_lookup), net/ipv4/udp.c, net/ipv4/af_inet.c (__inet_bind,
 * inet_release), net/core/filter.c (sock_filter_func_proto, sock_addr_func_proto).
 */
enum { COUNT_ROWS = 8 };                           /* of `port_counts`: keys.py, and row_of below */

#include "published.bpf.h"

enum { AF_INET = 2, SOCK_STREAM = 1, SOCK_DGRAM = 2, EADDRINUSE = 98, IPPROTO_SCTP = 132 };
enum { REFUSE = 0, ALLOW = 1, ALLOW_UNPRIVILEGED = 3 };  /* return values of a bind program: include/linux/bpf-cgroup.h */
enum { RESERVED = 1, SERVED = 2, HELD = 3 };       /* SteeringState in keys.py */
enum { SOCKET_ROWS = 4, RESERVED_ROWS = 4 };       /* how many sockets there are; the first row that counts reserved ports only */
/* Of `bind_states`: the relay's socket; one that the kernel is choosing a port for; any other value is a key of `auto_bound`. */
enum { RELAY_SOCKET = 1 << 30, PORT_BY_KERNEL = 1 << 29 };

struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(max_entries, 1 << 20);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct port_key);
    __type(value, __u8);                           /* RESERVED: no other program can bind it; SERVED: and it is steered; HELD: only that */
} published SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_SOCKMAP);            /* the relay's socket of each row */
    __uint(max_entries, SOCKET_ROWS);
    __type(key, __u32);
    __type(value, __u64);
} relay_sockets SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);              /* the cookie of the socket that the relay is about to bind */
    __uint(max_entries, 1);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, __u64);
} relay_binding SEC(".maps");

struct {                                           /* for a socket that has a published port, or may get one */
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, int);
    __type(value, __u32);
} bind_states SEC(".maps");

const volatile struct {                            /* set by loader.py before the programs are loaded */
    __u64 netns_cookie;                            /* of the host's network namespace */
} settings;

/* A row of `relay_sockets`, and of `port_counts`, where it counts all entries. */
static __u32 row_of(bool is_udp, bool is_ipv6) {
    return is_udp + 2 * is_ipv6;
}

/* Whether any entry reserves the port. */
static bool is_reserved(bool is_udp, bool is_ipv6, __u32 port) {
    return is_counted(RESERVED_ROWS + row_of(is_udp, is_ipv6), port);
}

/* RESERVED, SERVED, HELD, or 0: not published. */
static __u8 find_state(bool is_udp, const struct address *at, __be16 port) {
    struct port_key key = { PORT_KEY_BITS, is_udp ? IPPROTO_UDP : IPPROTO_TCP, unspecified_like(at), port };
    __u8 *found = bpf_map_lookup_elem(&published, &key);
    if (found) return *found;
    key.address = *at;
    found = bpf_map_lookup_elem(&published, &key);
    return found ? *found : 0;
}

SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx) {
    bool is_udp = ctx->protocol == IPPROTO_UDP, is_ipv6 = ctx->family != AF_INET;
    __u32 row = row_of(is_udp, is_ipv6), port = ctx->local_port;
    if (!is_counted(row, port)) return SK_PASS;

    __be32 local_ip4 = ctx->local_ip4;
    barrier_var(local_ip4);                        /* or the compiler computes a pointer to one of the two, which the verifier rejects */
    struct address at = map_ipv4(local_ip4);
    if (is_ipv6) at = (struct address){ { ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3] } };
    __u8 state = find_state(is_udp, &at, bpf_htons(port));
    if (is_excluded(&at)) return state == HELD && !is_udp ? SK_DROP : SK_PASS;
    if ((state != SERVED && state != HELD) || is_auto_bound(is_udp, port)) return SK_PASS;
    struct bpf_sock *sk = bpf_map_lookup_elem(&relay_sockets, &row);
    if (!sk) return SK_PASS;
    bpf_sk_assign(ctx, sk, 0);
    bpf_sk_release(sk);
    return SK_PASS;
}

/* Whether a socket for the published port would be in conflict with a bind(). */
static bool is_in_conflict(bool is_udp, const struct address *at, __be16 port) {
    if (!is_reserved(is_udp, !is_ipv4(at), bpf_ntohs(port)) || is_excluded(at)) return false;
    if (is_unspecified(at)) return true;
    __u8 state = find_state(is_udp, at, port);
    return state && state != HELD;
}

static bool is_relay_binding(struct bpf_sock_addr *ctx) {
    __u32 first = 0;
    __u64 *cookie = bpf_map_lookup_elem(&relay_binding, &first);
    return cookie && *cookie == bpf_get_socket_cookie(ctx);
}

static bool is_in_host_netns(void *ctx) {
    return bpf_get_netns_cookie(ctx) == settings.netns_cookie;
}

/* Store the state for the programs that run later for this socket. */
static void set_bind_state(struct bpf_sock_addr *ctx, __u32 value) {
    __u32 *state = ctx->sk ? bpf_sk_storage_get(&bind_states, ctx->sk, NULL, value ? BPF_SK_STORAGE_GET_F_CREATE : 0) : NULL;
    if (state) *state = value;
}

static int check_bind(struct bpf_sock_addr *ctx, const struct address *at, bool ipv4_too) {
    bool is_udp = ctx->type == SOCK_DGRAM;
    __be16 port = ctx->user_port;
    struct address any4 = map_ipv4(0);
    if (!is_udp && (ctx->type != SOCK_STREAM || ctx->protocol == IPPROTO_SCTP)) return ALLOW;
    set_bind_state(ctx, port || !is_in_host_netns(ctx) ? 0 : PORT_BY_KERNEL);
    if (!is_in_conflict(is_udp, at, port) && !(ipv4_too && is_in_conflict(is_udp, &any4, port))) return ALLOW;
    if (!is_in_host_netns(ctx)) return ALLOW;
    if (is_relay_binding(ctx)) {
        set_bind_state(ctx, RELAY_SOCKET);
        return ALLOW_UNPRIVILEGED;
    }
    bpf_set_retval(-EADDRINUSE);
    return REFUSE;
}

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx) {
    struct address at = map_ipv4(ctx->user_ip4);
    return check_bind(ctx, &at, false);
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx) {
    struct address at = { { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] } };
    return check_bind(ctx, &at, is_unspecified(&at) && !is_ipv4(&at) && ctx->sk && !is_ipv6_only(ctx->sk));
}

/* The kernel has chosen a published port for a socket of the host's namespace; `state` is its storage. */
static void record_auto_bound(__u32 *state, bool is_udp, __u32 port) {
    __u32 key = auto_bound_key(is_udp, port), none = 0, *count;
    bpf_map_update_elem(&auto_bound, &key, &none, BPF_NOEXIST);
    count = bpf_map_lookup_elem(&auto_bound, &key);
    *state = key;
    if (count) __sync_fetch_and_add(count, 1);
}

static int after_bind(struct bpf_sock *sk) {
    bool is_udp = sk->type == SOCK_DGRAM;
    __u32 port = sk->src_port, *state = bpf_sk_storage_get(&bind_states, sk, NULL, 0);
    if (state && *state == PORT_BY_KERNEL &&
        (is_reserved(is_udp, false, port) || is_reserved(is_udp, true, port)))
        record_auto_bound(state, is_udp, port);
    return ALLOW;
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *sk) {
    return after_bind(sk);
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *sk) {
    return after_bind(sk);
}

/* The kernel has chosen a port by now for a socket that sends without bind().  If the program had bound the port itself, that was
 * allowed because nothing is published at its address. */
static int record_sender(struct bpf_sock_addr *ctx, const struct address *source, bool ipv4_too) {
    struct bpf_sock *sk = ctx->sk;
    struct address any4 = map_ipv4(0);
    if (!sk) return ALLOW;
    __be16 port = bpf_htons(sk->src_port);
    if (!is_in_conflict(true, source, port) && !(ipv4_too && is_in_conflict(true, &any4, port))) return ALLOW;
    if (!is_in_host_netns(ctx)) return ALLOW;
    __u32 *state = bpf_sk_storage_get(&bind_states, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
    if (state && !*state) record_auto_bound(state, true, sk->src_port);
    return ALLOW;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx) {
    struct address source = ctx->sk ? map_ipv4(ctx->sk->src_ip4) : map_ipv4(0);
    return record_sender(ctx, &source, false);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx) {
    struct bpf_sock *sk = ctx->sk;
    if (!sk) return ALLOW;
    struct address source = { { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] } };
    return record_sender(ctx, &source, is_unspecified(&source) && !is_ipv6_only(sk));
}

SEC("cgroup/sock_release")
int release(struct bpf_sock *sk) {
    __u32 *state = bpf_sk_storage_get(&bind_states, sk, NULL, 0);
    if (!state || !*state || *state == RELAY_SOCKET || *state == PORT_BY_KERNEL) return ALLOW;
    __u32 key = *state, *count = bpf_map_lookup_elem(&auto_bound, &key);
    if (count) __sync_fetch_and_add(count, -1);
    return ALLOW;
}
