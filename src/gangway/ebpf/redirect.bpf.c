/* The socket redirect: whoever connects to a published port at a loopback address is aimed at the container.
 *
 * What this file knows: how to find what an address and port lead to, and what a socket had asked for.  What it must not
 * know: which ports are published where, and why.
 *
 * Theory of operation.  The kernel routes no packet of 127.0.0.0/8 or ::1, so no rule can carry one to a container.  But
 * connect(2) and sendto(2) on the host run a program of ours before a packet exists (BPF_PROG_TYPE_CGROUP_SOCK_ADDR, attached
 * to the root of the cgroup hierarchy, which has every process in it), and that may exchange the address.  From then on it is
 * a connection to the container like any other: no proxy, no translation, nothing for each packet.
 *
 *     connect, sendmsg           127.0.0.1:8000 → 172.17.0.2:80      and a map remembers what was asked
 *     getpeername, recvmsg       172.17.0.2:80 → 127.0.0.1:8000      so that the program sees the peer that it knows
 *
 * Who is left alone.  Processes of other network namespaces: their loopback is their own.  (The kernel's programs are not
 * apart by namespace, so each copy of them compares.)  A socket that is bound to an address, or to a device: its packets might
 * not get to the container, or not back.  A subflow of MPTCP: getpeername is asked of another socket.  An AF_INET6 socket whose
 * container has IPv4 only, if it refuses IPv4 (IPV6_V6ONLY), or sends without being connected (udpv6_sendmsg takes no IPv4
 * address from a program).  For all of them the relay listens.  Not seen here is the device that a datagram is pinned to by
 * IP_PKTINFO's index or IP_UNICAST_IF: pinned to `lo` it is redirected, and lost.
 *
 * What it costs those who are not concerned: one look at a table of bytes, `ports`, whatever is published.  It has rows for the
 * ports that clients ask, and for those that containers answer from; who by chance has to do with a port of that number pays
 * for a look at the namespace besides.
 *
 * What is remembered of a socket goes by its cookie and the container that it got to, as an unconnected one may ask several.
 * Of more than 8,192 of TCP or 16,384 of UDP the longest unused is forgotten: from then on that program sees the container's
 * address.  (Storage that lives and ends with the socket costs a connection 3 % more, a map four times as large 2 %: it does
 * not stay in the processor's caches.)  An unconnected socket that asks one port of a container in two ways is redirected the
 * first way only, or the answers could not be told apart.  One that was redirected once and then asks the container's own
 * address is taken to ask what it asked before.
 *
 * Sources: net/ipv4/af_inet.c, net/ipv{4,6}/udp.c, net/core/filter.c (sock_addr_func_proto).
 */
#include "published.bpf.h"

enum { PASS = 1 };                                 /* what these programs return; 0 would refuse the call */
enum rows { ASKED, SERVING = 2 };                  /* of `ports`: of each kind one for TCP, then one for UDP */

struct peer {                                      /* without a gap: it is a part of a key */
    struct address address;
    __u32 port;                                    /* network byte order, as in struct bpf_sock_addr */
};

struct backend {
    struct address address;                        /* the container's */
    __u16 shift;                                   /* container port minus host port, modulo 65536 */
    __u16 unused[3];
    __u64 redirected;                              /* how often: connections, and peers of unconnected sockets */
};

struct flow {                                      /* a socket, and where it was led */
    __u64 socket;
    struct peer backend;
} __attribute__((packed));

struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(max_entries, 1 << 20);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct published);
    __type(value, struct backend);
} backends SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 1 << 13);
    __type(key, struct flow);
    __type(value, struct peer);
} asked_tcp SEC(".maps");

struct {                                           /* apart, as an answer of UDP is lost without */
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 1 << 14);
    __type(key, struct flow);
    __type(value, struct peer);
} asked_udp SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);               /* the host's own addresses, where asking those is redirected, too */
    __uint(max_entries, 1 << 14);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct address);
    __type(value, __u8);
} own_addresses SEC(".maps");

const volatile struct {                            /* kernel/bpf.py sets it before the programs are loaded */
    __u64 netns_cookie;                            /* of the host's network namespace */
    bool host_too;                                 /* redirect also whoever asks the host's own addresses */
} settings;

/* Besides what published.bpf.h needs of the kernel's sockets. */
struct tcp_sock {
    bool is_mptcp;
} __attribute__((preserve_access_index));

static bool is_loopback(const struct address *address) {
    if (is_mapped(address)) return (address->words[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
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

static __always_inline bool concerns(struct bpf_sock_addr *ctx, __u32 rows) {
    return has_port(rows + is_udp(ctx), bpf_ntohs(ctx->user_port));
}

static bool is_hosts(struct bpf_sock_addr *ctx) {
    return bpf_get_netns_cookie(ctx) == settings.netns_cookie;
}

static bool is_subflow(struct bpf_sock *sk) {
    struct tcp_sock *tcp = (void *)bpf_skc_to_tcp_sock(sk);
    return tcp && bpf_core_field_exists(tcp->is_mptcp) && tcp->is_mptcp;
}

/* What is published where a client of the host's asks; NULL if nothing is. */
static struct backend *published_at(struct bpf_sock_addr *ctx, const struct peer *at) {
    if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP) return NULL;
    if (!is_hosts(ctx)) return NULL;
    if (!is_loopback(&at->address) && !(settings.host_too && bpf_map_lookup_elem(&own_addresses, &at->address))) return NULL;

    struct published key = { PUBLISHED_BITS, ctx->protocol, any_of(&at->address), at->port };
    struct backend *found = bpf_map_lookup_elem(&backends, &key);
    if (!found) {
        key.address = at->address;
        found = bpf_map_lookup_elem(&backends, &key);
    }
    return found && !is_lent(is_udp(ctx), bpf_ntohs(at->port)) ? found : NULL;
}

/* A socket with this source is about to connect to `at`, or to send there: true if it is to be `to` instead. */
static bool leads(struct bpf_sock_addr *ctx, const struct address *source, const struct peer *at, struct peer *to, bool connects) {
    struct bpf_sock *sk = ctx->sk;
    struct backend *backend = published_at(ctx, at);
    if (!backend || !sk) return false;
    if (sk->bound_dev_if || !is_any(source) || is_subflow(sk)) return false;
    *to = (struct peer){ backend->address, bpf_htons(bpf_ntohs(at->port) + backend->shift) };
    bool is_turned = is_mapped(&to->address) != is_mapped(&at->address);
    if (is_turned && (!connects || is_mapped(&at->address) || takes_ipv6_only(sk))) return false;

    struct flow flow = { bpf_get_socket_cookie(ctx), *to };
    struct peer *known = connects ? NULL : bpf_map_lookup_elem(&asked_udp, &flow);
    if (known) return is_same(known, at);          /* the relay can tell two that lead to one apart */
    if (is_udp(ctx) ? bpf_map_update_elem(&asked_udp, &flow, at, BPF_ANY) : bpf_map_update_elem(&asked_tcp, &flow, at, BPF_ANY))
        return false;
    __sync_fetch_and_add(&backend->redirected, 1);
    return true;
}

/* What the socket asked when it was led to `peer`; NULL if it was not. */
static const struct peer *asked_for(struct bpf_sock_addr *ctx, const struct peer *peer) {
    if (!is_hosts(ctx)) return NULL;
    struct flow flow = { bpf_get_socket_cookie(ctx), *peer };
    return is_udp(ctx) ? bpf_map_lookup_elem(&asked_udp, &flow) : bpf_map_lookup_elem(&asked_tcp, &flow);
}

static struct peer peer4(struct bpf_sock_addr *ctx) {
    return (struct peer){ mapped(ctx->user_ip4), ctx->user_port };
}

static struct peer peer6(struct bpf_sock_addr *ctx) {
    return (struct peer){ { { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] } }, ctx->user_port };
}

static int become4(struct bpf_sock_addr *ctx, const struct peer *peer) {
    ctx->user_ip4 = peer->address.words[3];
    ctx->user_port = peer->port;
    return PASS;
}

static int become6(struct bpf_sock_addr *ctx, const struct peer *peer) {
    ctx->user_ip6[0] = peer->address.words[0];
    ctx->user_ip6[1] = peer->address.words[1];
    ctx->user_ip6[2] = peer->address.words[2];
    ctx->user_ip6[3] = peer->address.words[3];
    ctx->user_port = peer->port;
    return PASS;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx) {
    if (!concerns(ctx, ASKED) || !ctx->sk) return PASS;
    struct address source = mapped(ctx->sk->src_ip4);
    struct peer at = peer4(ctx), to;
    return leads(ctx, &source, &at, &to, true) ? become4(ctx, &to) : PASS;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx) {
    struct bpf_sock *sk = ctx->sk;
    if (!concerns(ctx, ASKED) || !sk) return PASS;
    struct address source = { { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] } };
    struct peer at = peer6(ctx), to;
    return leads(ctx, &source, &at, &to, true) ? become6(ctx, &to) : PASS;
}

/* An AF_INET6 socket that sends to a mapped address comes by here, too (udpv6_sendmsg). */
SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx) {
    if (!concerns(ctx, ASKED)) return PASS;
    struct address source = mapped(ctx->msg_src_ip4);
    struct peer at = peer4(ctx), to;
    return leads(ctx, &source, &at, &to, false) ? become4(ctx, &to) : PASS;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx) {
    if (!concerns(ctx, ASKED)) return PASS;
    struct address source = { { ctx->msg_src_ip6[0], ctx->msg_src_ip6[1], ctx->msg_src_ip6[2], ctx->msg_src_ip6[3] } };
    struct peer at = peer6(ctx), to;
    return leads(ctx, &source, &at, &to, false) ? become6(ctx, &to) : PASS;
}

/* recvmsg and getpeername: the peer becomes the one that was asked. */
static int look_back4(struct bpf_sock_addr *ctx) {
    struct peer peer = peer4(ctx);
    const struct peer *found = asked_for(ctx, &peer);
    return found ? become4(ctx, found) : PASS;
}

static int look_back6(struct bpf_sock_addr *ctx) {
    struct peer peer = peer6(ctx);
    const struct peer *found = asked_for(ctx, &peer);
    return found ? become6(ctx, found) : PASS;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx) {
    return concerns(ctx, SERVING) ? look_back4(ctx) : PASS;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx) {
    return concerns(ctx, SERVING) ? look_back6(ctx) : PASS;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx) {
    return concerns(ctx, SERVING) ? look_back4(ctx) : PASS;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx) {
    return concerns(ctx, SERVING) ? look_back6(ctx) : PASS;
}
