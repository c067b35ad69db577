/* Steering: whatever arrives for a published port gets to the one socket that the relay has for all of them.
 *
 * What this file knows: which ports are published, and which socket serves a protocol and family.  What it must not know:
 * where they lead.
 *
 * Theory of operation.  A socket for each port is what makes a large range expensive.  But which socket takes a packet that
 * belongs to no connection is decided by looking one up, and Linux asks a program first (BPF_PROG_TYPE_SK_LOOKUP, attached to
 * the host's network namespace).  `steer` gives it the relay's socket of the protocol and family, out of the map `shared`: a
 * listener of TCP, which accepts a connection whose local address is the one that was asked; or a socket of UDP, which is told
 * the address that was asked with each datagram.  Connections, and UDP sockets that are connected, are found before a program
 * is asked.  So are the members of a multicast group, and those who hear a broadcast: those datagrams are not steered.
 *
 *     packet → has it a connection?  → steer: is the port published?  → yes: the relay's socket
 *                                                                     → no:  who listens there
 *
 * A port without a socket would be anybody's.  So bind(2) runs a program of ours, too (BPF_PROG_TYPE_CGROUP_SOCK_ADDR at the
 * root of the cgroups), which says EADDRINUSE where a socket would have been in the way: at the published address, at the
 * unspecified one, or at any if all are published.
 *
 * Who leaves the choice to the kernel (bind() to port 0, or sendto() without any) may get a published port all the same: it is
 * kept from that by a setting (daemon/ephemeral.py), but not if nearly all that it may choose from are published.  Then the port
 * is lent: as long as that socket lives, nothing is steered from it, nor redirected.  Otherwise whoever asks a name server from
 * such a socket would wait in vain for an answer.  What rules translate knows nothing of that: who comes by an interface gets to
 * the container.  What is lent is known by the socket (`owners`, which the kernel frees with it), and by port.  Not all sockets
 * tell their end (MPTCP's subflows, the kernel's own do not), so the daemon looks now and then whether a port is still in use.
 * Not lent is what listen() chooses, without bind(): no program is asked then.
 *
 * An answer by UDP can leave only from a socket that is bound to the port.  The relay's own may be, for a port below 1024, too,
 * though the relay has no privilege: it writes the socket's cookie into `binding`, memory that only it and the daemon have.
 *
 * What it costs others: a look at `ports`, a table of bytes, for each new connection to the host, each datagram to a socket that
 * is not connected or from one, and each bind(); and at the end of a socket a look whether it has a storage.
 *
 * Needs: Linux 5.18, for bpf_set_retval: before, bind() would fail with EPERM, which means something else to programs.
 * Sources: net/ipv4/inet_hashtables.c (inet_lookup_run_sk_lookup), net/ipv4/udp.c, net/ipv4/af_inet.c (__inet_bind,
 * inet_release), net/core/filter.c (sock_filter_func_proto, sock_addr_func_proto).
 */
#include "published.bpf.h"

enum { AF_INET = 2, SOCK_STREAM = 1, SOCK_DGRAM = 2, EADDRINUSE = 98, IPPROTO_SCTP = 132 };
enum { REFUSE = 0, ALLOW = 1, ALLOW_UNPRIVILEGED = 3 };    /* of a bind program: include/linux/bpf-cgroup.h */
enum { TAKEN = 1, SERVED = 2 };                    /* steering/entries.py */
enum { RELAYS = 1 << 30, CHOOSES = 1 << 29 };      /* of `owners`: it is the relay's, or about to get a port; else a key of `lent` */

struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(max_entries, 1 << 20);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct published);
    __type(value, __u8);                           /* TAKEN: nobody else gets it; SERVED: and it is steered */
} kept SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_SOCKMAP);            /* by row: the relay's sockets */
    __uint(max_entries, TABLE_ROWS);
    __type(key, __u32);
    __type(value, __u64);
} shared SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);              /* the cookie of the socket that the relay is about to bind */
    __uint(max_entries, 1);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, __u64);
} binding SEC(".maps");

struct {                                           /* of a socket that has a published port, or may get one */
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, int);
    __type(value, __u32);
} owners SEC(".maps");

const volatile struct {                            /* kernel/bpf.py sets it before the programs are loaded */
    __u64 netns_cookie;                            /* of the host's network namespace */
} settings;

/* Of `ports`, and of `shared`. */
static __u32 row_of(bool is_udp, bool is_ipv6) {
    return is_udp + 2 * is_ipv6;
}

/* TAKEN or SERVED, or neither. */
static __u8 kept_at(bool is_udp, const struct address *at, __be16 port) {
    struct published key = { PUBLISHED_BITS, is_udp ? IPPROTO_UDP : IPPROTO_TCP, any_of(at), port };
    __u8 *found = bpf_map_lookup_elem(&kept, &key);
    if (found) return *found;
    key.address = *at;
    found = bpf_map_lookup_elem(&kept, &key);
    return found ? *found : 0;
}

SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx) {
    bool is_udp = ctx->protocol == IPPROTO_UDP, is_ipv6 = ctx->family != AF_INET;
    __u32 row = row_of(is_udp, is_ipv6), port = ctx->local_port;
    if (!has_port(row, port)) return SK_PASS;

    __be32 local_ip4 = ctx->local_ip4;
    barrier_var(local_ip4);                        /* a compiler that reads one of the two by a pointer is not let through */
    struct address at = mapped(local_ip4);
    if (is_ipv6) at = (struct address){ { ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3] } };
    if (kept_at(is_udp, &at, bpf_htons(port)) != SERVED || is_lent(is_udp, port)) return SK_PASS;
    struct bpf_sock *sk = bpf_map_lookup_elem(&shared, &row);
    if (!sk) return SK_PASS;
    bpf_sk_assign(ctx, sk, 0);
    bpf_sk_release(sk);
    return SK_PASS;
}

/* Whether a socket would have been in the way. */
static bool is_taken(bool is_udp, const struct address *at, __be16 port) {
    if (!has_port(row_of(is_udp, !is_mapped(at)), bpf_ntohs(port))) return false;
    return is_any(at) || kept_at(is_udp, at, port);
}

static bool is_relays(struct bpf_sock_addr *ctx) {
    __u32 first = 0;
    __u64 *cookie = bpf_map_lookup_elem(&binding, &first);
    return cookie && *cookie == bpf_get_socket_cookie(ctx);
}

static bool is_hosts(void *ctx) {
    return bpf_get_netns_cookie(ctx) == settings.netns_cookie;
}

/* Says of a socket what it is, for later programs. */
static void mark(struct bpf_sock_addr *ctx, __u32 what) {
    __u32 *owner = ctx->sk ? bpf_sk_storage_get(&owners, ctx->sk, NULL, what ? BPF_SK_STORAGE_GET_F_CREATE : 0) : NULL;
    if (owner) *owner = what;
}

static int judge(struct bpf_sock_addr *ctx, const struct address *at, bool ipv4_too) {
    bool is_udp = ctx->type == SOCK_DGRAM;
    __be16 port = ctx->user_port;
    struct address any4 = mapped(0);
    if (!is_udp && (ctx->type != SOCK_STREAM || ctx->protocol == IPPROTO_SCTP)) return ALLOW;
    mark(ctx, port || !is_hosts(ctx) ? 0 : CHOOSES);
    if (!is_taken(is_udp, at, port) && !(ipv4_too && is_taken(is_udp, &any4, port))) return ALLOW;
    if (!is_hosts(ctx)) return ALLOW;
    if (is_relays(ctx)) {
        mark(ctx, RELAYS);
        return ALLOW_UNPRIVILEGED;
    }
    bpf_set_retval(-EADDRINUSE);
    return REFUSE;
}

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx) {
    struct address at = mapped(ctx->user_ip4);
    return judge(ctx, &at, false);
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx) {
    struct address at = { { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] } };
    return judge(ctx, &at, is_any(&at) && !is_mapped(&at) && ctx->sk && !takes_ipv6_only(ctx->sk));
}

/* A socket of the host's has got a published port by the kernel's choice, and `owner` is its storage. */
static void lend(__u32 *owner, bool is_udp, __u32 port) {
    __u32 key = lent_key(is_udp, port), none = 0, *count;
    bpf_map_update_elem(&lent, &key, &none, BPF_NOEXIST);
    count = bpf_map_lookup_elem(&lent, &key);
    *owner = key;
    if (count) __sync_fetch_and_add(count, 1);
}

static int bound(struct bpf_sock *sk) {
    bool is_udp = sk->type == SOCK_DGRAM;
    __u32 port = sk->src_port, *owner = bpf_sk_storage_get(&owners, sk, NULL, 0);
    if (owner && *owner == CHOOSES && (has_port(row_of(is_udp, false), port) || has_port(row_of(is_udp, true), port)))
        lend(owner, is_udp, port);
    return ALLOW;
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *sk) {
    return bound(sk);
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *sk) {
    return bound(sk);
}

/* Whoever sends and has no port gets one from the kernel, without bind(); it has it by now.  Who has bound the port himself was
 * allowed to: nothing is published where he has it. */
static int sends(struct bpf_sock_addr *ctx, const struct address *source, bool ipv4_too) {
    struct bpf_sock *sk = ctx->sk;
    struct address any4 = mapped(0);
    if (!sk) return ALLOW;
    __be16 port = bpf_htons(sk->src_port);
    if (!is_taken(true, source, port) && !(ipv4_too && is_taken(true, &any4, port))) return ALLOW;
    if (!is_hosts(ctx)) return ALLOW;
    __u32 *owner = bpf_sk_storage_get(&owners, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
    if (owner && !*owner) lend(owner, true, sk->src_port);
    return ALLOW;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx) {
    struct address source = ctx->sk ? mapped(ctx->sk->src_ip4) : mapped(0);
    return sends(ctx, &source, false);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx) {
    struct bpf_sock *sk = ctx->sk;
    if (!sk) return ALLOW;
    struct address source = { { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] } };
    return sends(ctx, &source, is_any(&source) && !takes_ipv6_only(sk));
}

SEC("cgroup/sock_release")
int release(struct bpf_sock *sk) {
    __u32 *owner = bpf_sk_storage_get(&owners, sk, NULL, 0);
    if (!owner || !*owner || *owner == RELAYS || *owner == CHOOSES) return ALLOW;
    __u32 key = *owner, *count = bpf_map_lookup_elem(&lent, &key);
    if (count) __sync_fetch_and_add(count, -1);
    return ALLOW;
}
