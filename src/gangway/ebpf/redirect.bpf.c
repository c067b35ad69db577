/* The socket redirect: a connection to a published port at a loopback address goes straight to the container.
 *
 * What this file knows: how to find the container's address and port for an address and port, and what a socket requested.
 * What it must not know: which ports are published, and why.
 *
 * Theory of operation.  The kernel routes no packet of 127.0.0.0/8 or ::1, so no rule can carry one to a container.  But
 * connect(2) and sendto(2) run a program before a packet exists (BPF_PROG_TYPE_CGROUP_SOCK_ADDR, attached to the root of the
 * cgroup hierarchy, which includes every process), and that program may replace the address.  From then on it is a connection
 * to the container like any other: no proxy, no translation, no cost for each packet.
 *
 *     connect, sendmsg           127.0.0.1:8000 -> 172.17.0.2:80      and a map remembers the requested address
 *     getpeername, recvmsg       172.17.0.2:80 -> 127.0.0.1:8000      so that the client sees the peer that it requested
 *     close                                                           the map forgets it
 *
 * A server may answer from another port, as TFTP's do.  An unconnected socket then sees that port at the address that it requested,
 * and what it sends there, or a connect(), goes to that port of the container.
 *
 * Not redirected:
 * - Processes in other network namespaces: their loopback is their own.  (Programs are not separated by namespace, so each copy
 *   of them compares the cookie.)
 * - A socket that is bound to an address or a device: its packets might not reach the container, or the answers not get back.
 * - A subflow of MPTCP: getpeername runs for another socket.
 * - An AF_INET6 socket whose container has IPv4 only, if the socket refuses IPv4 (IPV6_V6ONLY), or if it sends without being
 *   connected (udpv6_sendmsg accepts no IPv4 address from a program).
 * The relay serves all of these.  A device that a datagram is pinned to by IP_PKTINFO's index or IP_UNICAST_IF is not visible
 * here: if it is pinned to `lo`, the datagram is redirected and lost.
 *
 * What it costs other traffic: one lookup in a table of bytes, `port_counts`, however many ports are published.  The table has
 * rows for the host ports that clients connect to, and for the container ports that answers come from.  Other traffic to or
 * from a port with such a number also pays for a comparison of the namespace.
 *
 * The requested address is stored by the socket's cookie and the container's address and port, because an unconnected socket may
 * have several destinations.  The same entries tell the daemon which sockets to end when a port is unpublished.  Those of connected
 * sockets are removed when the socket is closed; all connected sockets pay for that by a lookup in `port_counts`.  At most 32,768
 * TCP and 16,384 UDP entries are kept; the least recently used one is dropped, and that socket then sees the container's address.
 * (Storage that lives and ends with the socket makes a connection 3 % more expensive.)
 *
 * An unconnected socket that reaches one container port by two addresses is redirected for the first one only, because the answers
 * could not be distinguished.  One that was redirected and then sends to the container's own address gets its answers from the
 * address that it requested before.
 *
 * Sources: net/ipv4/af_inet.c, net/ipv{4,6}/udp.c, net/core/filter.c (sock_addr_func_proto).
 */
enum { COUNT_ROWS = 4 };                           /* of `port_counts`: keys.py, and enum rows below */

#include "published.bpf.h"

enum { AF_INET = 2 };
enum { PASS = 1 };                                 /* the return value; 0 would refuse the call */
enum rows { HOST_PORTS, CONTAINER_PORTS = 2 };     /* of `port_counts`: for each kind a row for TCP, then one for UDP */

struct peer {                                      /* without padding: it is a part of a key */
    struct address address;
    __u32 port;                                    /* network byte order, as in struct bpf_sock_addr */
};

struct target {
    struct address address;                        /* the container's */
    __u16 shift;                                   /* container port minus host port, modulo 65536 */
    __u16 unused[3];
    __u64 uses;                                    /* connections, and destinations of unconnected sockets */
};

struct flow {                                      /* a socket, and where it was redirected to */
    __u64 socket;
    struct peer target;
} __attribute__((packed));

struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(max_entries, 1 << 20);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct port_key);
    __type(value, struct target);
} targets SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 1 << 15);
    __type(key, struct flow);
    __type(value, struct peer);
} requested_tcp SEC(".maps");

struct {                                           /* separate, because a UDP answer without its entry is lost */
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 1 << 14);
    __type(key, struct flow);
    __type(value, struct peer);
} requested_udp SEC(".maps");

struct {                                           /* marks a socket that was redirected without being connected */
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, int);
    __type(value, __u32);
} unconnected SEC(".maps");

/* Of marked sockets.  A container's address, with the port 0 -> the address that the socket requested, with the port 0.  And a
 * requested address, with a port that the container has answered from -> the container's address, with that port. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 1 << 12);
    __type(key, struct flow);
    __type(value, struct peer);
} other_ports SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);               /* the host's own addresses, if they are redirected, too */
    __uint(max_entries, 1 << 14);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct address);
    __type(value, __u8);
} own_addresses SEC(".maps");

const volatile struct {                            /* set by loader.py before the programs are loaded */
    __u64 netns_cookie;                            /* of the host's network namespace */
    bool own_addresses;                            /* redirect also connections to the host's own addresses */
} settings;

/* Besides the fields in published.bpf.h. */
struct tcp_sock {
    bool is_mptcp;
} __attribute__((preserve_access_index));

static bool is_loopback(const struct address *address) {
    if (is_ipv4(address)) return (address->words[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
    return !address->words[0] && !address->words[1] && !address->words[2] && address->words[3] == bpf_htonl(1);
}

static bool is_same(const struct peer *one, const struct peer *other) {
    return one->address.words[0] == other->address.words[0] && one->address.words[1] == other->address.words[1] &&
           one->address.words[2] == other->address.words[2] && one->address.words[3] == other->address.words[3] &&
           one->port == other->port;
}

static bool is_udp(struct bpf_sock_addr *ctx) {
    return ctx->protocol == IPPROTO_UDP;
}

static __always_inline bool is_candidate(struct bpf_sock_addr *ctx, __u32 rows) {
    return is_counted(rows + is_udp(ctx), bpf_ntohs(ctx->user_port));
}

static bool is_in_host_netns(struct bpf_sock_addr *ctx) {
    return bpf_get_netns_cookie(ctx) == settings.netns_cookie;
}

static bool is_mptcp_subflow(struct bpf_sock *sk) {
    struct tcp_sock *tcp = (void *)bpf_skc_to_tcp_sock(sk);
    return tcp && bpf_core_field_exists(tcp->is_mptcp) && tcp->is_mptcp;
}

/* The entry for a destination of a socket in the host's namespace; NULL if there is none. */
static struct target *find_target(struct bpf_sock_addr *ctx, const struct peer *at) {
    if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP) return NULL;
    if (!is_in_host_netns(ctx)) return NULL;
    if (!is_loopback(&at->address) &&
        !(settings.own_addresses && bpf_map_lookup_elem(&own_addresses, &at->address))) return NULL;

    struct port_key key = { PORT_KEY_BITS, ctx->protocol, unspecified_like(&at->address), at->port };
    struct target *found = bpf_map_lookup_elem(&targets, &key);
    if (!found) {
        key.address = at->address;
        found = bpf_map_lookup_elem(&targets, &key);
    }
    return found && !is_auto_bound(is_udp(ctx), bpf_ntohs(at->port)) && !is_excluded(&at->address) ? found : NULL;
}

/* Whether an unconnected socket of the host's namespace has been redirected before. */
static bool is_marked(struct bpf_sock_addr *ctx) {
    return is_udp(ctx) && ctx->sk && bpf_sk_storage_get(&unconnected, ctx->sk, NULL, 0);
}

static void mark_unconnected(struct bpf_sock_addr *ctx, const struct peer *at, const struct peer *to) {
    struct flow flow = { bpf_get_socket_cookie(ctx), { to->address, 0 } };
    struct peer host = { at->address, 0 };
    if (ctx->sk && bpf_sk_storage_get(&unconnected, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE))
        bpf_map_update_elem(&other_ports, &flow, &host, BPF_ANY);
}

/* Whether a socket with this source that is about to connect or send to `at` is redirected, and where `to`. */
static bool find_redirect(struct bpf_sock_addr *ctx, const struct address *source, const struct peer *at, struct peer *to,
                          bool connects) {
    struct bpf_sock *sk = ctx->sk;
    struct target *target = find_target(ctx, at);
    if (!target || !sk) return false;
    if (sk->bound_dev_if || !is_unspecified(source) || is_mptcp_subflow(sk)) return false;
    *to = (struct peer){ target->address, bpf_htons(bpf_ntohs(at->port) + target->shift) };
    bool changes_family = is_ipv4(&to->address) != is_ipv4(&at->address);
    if (changes_family && (!connects || is_ipv4(&at->address) || is_ipv6_only(sk))) return false;

    struct flow flow = { bpf_get_socket_cookie(ctx), *to };
    struct peer *known = connects ? NULL : bpf_map_lookup_elem(&requested_udp, &flow);
    if (known) return is_same(known, at);          /* the relay distinguishes two addresses of one container port */
    if (is_udp(ctx) ? bpf_map_update_elem(&requested_udp, &flow, at, BPF_ANY) : bpf_map_update_elem(&requested_tcp, &flow, at, BPF_ANY))
        return false;
    __sync_fetch_and_add(&target->uses, 1);
    if (!connects) mark_unconnected(ctx, at, to);
    return true;
}

/* Whether a socket that is about to connect or send to `at` has got an answer from there, and where it came from. */
static bool find_answered(struct bpf_sock_addr *ctx, const struct peer *at, struct peer *to) {
    if (!is_marked(ctx)) return false;
    struct flow flow = { bpf_get_socket_cookie(ctx), *at };
    struct peer *found = bpf_map_lookup_elem(&other_ports, &flow);
    if (found) *to = *found;
    return found;
}

static bool find_destination(struct bpf_sock_addr *ctx, const struct address *source, const struct peer *at, struct peer *to,
                             bool connects) {
    return (is_candidate(ctx, HOST_PORTS) && find_redirect(ctx, source, at, to, connects)) || find_answered(ctx, at, to);
}

/* What a marked socket sees as the source of an answer from another port of a container. */
static bool find_requested_host(struct bpf_sock_addr *ctx, const struct peer *peer, struct peer *requested) {
    if (!is_marked(ctx)) return false;
    struct flow flow = { bpf_get_socket_cookie(ctx), { peer->address, 0 } };
    struct peer *found = bpf_map_lookup_elem(&other_ports, &flow);
    if (!found) return false;
    *requested = (struct peer){ found->address, peer->port };
    flow.target = *requested;
    return !bpf_map_update_elem(&other_ports, &flow, peer, BPF_ANY);
}

/* Whether the socket was redirected to `peer`, and the address that it had requested. */
static bool find_requested(struct bpf_sock_addr *ctx, const struct peer *peer, struct peer *requested) {
    if (is_candidate(ctx, CONTAINER_PORTS)) {
        if (!is_in_host_netns(ctx)) return false;
        struct flow flow = { bpf_get_socket_cookie(ctx), *peer };
        struct peer *found = is_udp(ctx) ? bpf_map_lookup_elem(&requested_udp, &flow) : bpf_map_lookup_elem(&requested_tcp, &flow);
        if (found) {
            *requested = *found;
            return true;
        }
    }
    return find_requested_host(ctx, peer, requested);
}

static struct peer peer4(struct bpf_sock_addr *ctx) {
    return (struct peer){ map_ipv4(ctx->user_ip4), ctx->user_port };
}

static struct peer peer6(struct bpf_sock_addr *ctx) {
    return (struct peer){ { { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] } }, ctx->user_port };
}

static int set_peer4(struct bpf_sock_addr *ctx, const struct peer *peer) {
    ctx->user_ip4 = peer->address.words[3];
    ctx->user_port = peer->port;
    return PASS;
}

static int set_peer6(struct bpf_sock_addr *ctx, const struct peer *peer) {
    ctx->user_ip6[0] = peer->address.words[0];
    ctx->user_ip6[1] = peer->address.words[1];
    ctx->user_ip6[2] = peer->address.words[2];
    ctx->user_ip6[3] = peer->address.words[3];
    ctx->user_port = peer->port;
    return PASS;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx) {
    if (!ctx->sk) return PASS;
    struct address source = map_ipv4(ctx->sk->src_ip4);
    struct peer at = peer4(ctx), to;
    return find_destination(ctx, &source, &at, &to, true) ? set_peer4(ctx, &to) : PASS;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx) {
    struct bpf_sock *sk = ctx->sk;
    if (!sk) return PASS;
    struct address source = { { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] } };
    struct peer at = peer6(ctx), to;
    return find_destination(ctx, &source, &at, &to, true) ? set_peer6(ctx, &to) : PASS;
}

/* Also runs for an AF_INET6 socket that sends to an IPv4-mapped address (udpv6_sendmsg). */
SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx) {
    struct address source = map_ipv4(ctx->msg_src_ip4);
    struct peer at = peer4(ctx), to;
    return find_destination(ctx, &source, &at, &to, false) ? set_peer4(ctx, &to) : PASS;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx) {
    struct address source = { { ctx->msg_src_ip6[0], ctx->msg_src_ip6[1], ctx->msg_src_ip6[2], ctx->msg_src_ip6[3] } };
    struct peer at = peer6(ctx), to;
    return find_destination(ctx, &source, &at, &to, false) ? set_peer6(ctx, &to) : PASS;
}

/* recvmsg and getpeername: report the requested address as the peer. */
static int restore_peer4(struct bpf_sock_addr *ctx) {
    struct peer peer = peer4(ctx), requested;
    return find_requested(ctx, &peer, &requested) ? set_peer4(ctx, &requested) : PASS;
}

static int restore_peer6(struct bpf_sock_addr *ctx) {
    struct peer peer = peer6(ctx), requested;
    return find_requested(ctx, &peer, &requested) ? set_peer6(ctx, &requested) : PASS;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx) {
    return restore_peer4(ctx);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx) {
    return restore_peer6(ctx);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx) {
    return restore_peer4(ctx);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx) {
    return restore_peer6(ctx);
}

SEC("cgroup/sock_release")
int release(struct bpf_sock *sk) {
    bool is_udp = sk->protocol == IPPROTO_UDP;
    __be16 port = sk->dst_port;
    if (!port || !is_counted(CONTAINER_PORTS + is_udp, bpf_ntohs(port)) || bpf_get_netns_cookie(sk) != settings.netns_cookie) return PASS;
    struct flow flow = { bpf_get_socket_cookie(sk), { map_ipv4(sk->dst_ip4), port } };
    if (sk->family != AF_INET)
        flow.target.address = (struct address){ { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] } };
    if (is_udp)
        bpf_map_delete_elem(&requested_udp, &flow);
    else
        bpf_map_delete_elem(&requested_tcp, &flow);
    return PASS;
}
