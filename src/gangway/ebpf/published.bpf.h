/* What both programs share: how a published port is found, and what they read of a socket.
 *
 * All addresses are IPv6 addresses here.  IPv4 addresses are mapped (::ffff:127.0.0.1), as the kernel has them in AF_INET6
 * sockets.  Published ports are the keys of a longest-prefix trie: protocol, host address, port.  A range of ports takes a few
 * entries.  The port is in network byte order, because in the host's byte order its prefix would mean nothing.
 *
 * Needs: Linux 5.14 (SO_NETNS_COOKIE for the process that loads them; everything else is older), and BTF for what no helper
 * returns.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum { IPPROTO_TCP = 6, IPPROTO_UDP = 17 };
enum { COUNTED_PORTS = 65536 };                    /* of each row of `port_counts`: port_map.py */

struct address {                                   /* network byte order */
    __u32 words[4];
};

struct port_key {                                  /* of a trie: the bits after the first `prefix_bits` are not compared */
    __u32 prefix_bits;
    __u32 protocol;                                /* 32 bits, so that the address is aligned */
    struct address address;                        /* of the host; zero, or ::ffff:0.0.0.0, for all of its family */
    __be16 port;
} __attribute__((packed));

enum { PORT_KEY_BITS = 8 * (sizeof(struct port_key) - sizeof(__u32)) };

/* These files may also be used under the GPL, version 2: the kernel lets no other program read its structures. */
char LICENSE[] SEC("license") = "GPL";

/* The fields of the kernel's sockets that are read; CO-RE finds their offsets in the running kernel. */
struct sock_common {
    unsigned char skc_ipv6only : 1;
} __attribute__((preserve_access_index));

struct sock {
    struct sock_common __sk_common;
} __attribute__((preserve_access_index));

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);              /* for each port, the number of the trie's entries that include it */
    __uint(max_entries, COUNT_ROWS);               /* the including file's */
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, __u8[COUNTED_PORTS]);
} port_counts SEC(".maps");

struct {                                           /* for each auto-bound port (steering.bpf.c), the number of its sockets */
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 2 * COUNTED_PORTS);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32);
    __type(value, __u32);
} auto_bound SEC(".maps");

struct {                                           /* addresses of the host at which nothing is published */
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1 << 14);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct address);
    __type(value, __u8);
} excluded SEC(".maps");

static inline bool is_excluded(const struct address *address) {
    return bpf_map_lookup_elem(&excluded, address);
}

/* Whether any entry includes the port: for most packets and calls this is the only lookup. */
static __always_inline bool is_counted(__u32 row, __u32 port) {
    __u8 *count = bpf_map_lookup_elem(&port_counts, &row);
    barrier_var(port);                             /* the verifier of Linux 6.1 does not know the range of a byte swap's result */
    return count && count[port & 0xffff];
}

static inline __u32 auto_bound_key(bool is_udp, __u32 port) {
    return is_udp << 16 | (port & 0xffff);
}

static inline bool is_auto_bound(bool is_udp, __u32 port) {
    __u32 key = auto_bound_key(is_udp, port), *count = bpf_map_lookup_elem(&auto_bound, &key);
    return count && *count;
}

static inline struct address map_ipv4(__be32 address) {
    return (struct address){ { 0, 0, bpf_htonl(0xffff), address } };
}

static inline bool is_ipv4(const struct address *address) {
    return !address->words[0] && !address->words[1] && address->words[2] == bpf_htonl(0xffff);
}

static inline bool is_unspecified(const struct address *address) {
    return !address->words[3] && !address->words[0] && !address->words[1] && (!address->words[2] || is_ipv4(address));
}

/* The unspecified address of the same family. */
static inline struct address unspecified_like(const struct address *address) {
    return is_ipv4(address) ? map_ipv4(0) : (struct address){};
}

/* Of an AF_INET6 socket. */
static inline bool is_ipv6_only(struct bpf_sock *sk) {
    struct sock *sock = sk->protocol == IPPROTO_TCP ? (void *)bpf_skc_to_tcp6_sock(sk) : (void *)bpf_skc_to_udp6_sock(sk);
    return !sock || BPF_CORE_READ_BITFIELD(&sock->__sk_common, skc_ipv6only);
}
