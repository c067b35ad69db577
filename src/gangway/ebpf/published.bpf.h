/* What the programs in the kernel have in common: how a published port is found, and what they ask of a socket.
 *
 * All addresses are IPv6's in here: IPv4's are mapped (::ffff:127.0.0.1), as the kernel has them in AF_INET6 sockets.
 * What is published is a key of a longest-prefix trie of protocol, host address and port, so that a range of ports takes a few
 * entries; the port is in network byte order, for in the host's its prefix would mean nothing.
 *
 * Needs: Linux 5.14 (SO_NETNS_COOKIE for whoever loads them; all else is older), BTF for what no helper tells.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum { IPPROTO_TCP = 6, IPPROTO_UDP = 17 };
enum { TABLE_ROWS = 4, TABLE_PORTS = 65536 };     /* of a table of ports: kernel/port_table.py */

struct address {                                   /* network byte order */
    __u32 words[4];
};

struct published {                                 /* a trie's key: the bits after `prefix_bits` of them are not compared */
    __u32 prefix_bits;
    __u32 protocol;                                /* as wide as what follows has to be aligned */
    struct address address;                        /* of the host; zero, or ::ffff:0.0.0.0, for all of its family */
    __be16 port;
} __attribute__((packed));

enum { PUBLISHED_BITS = 8 * (sizeof(struct published) - sizeof(__u32)) };

/* These files may be had under the GPL, version 2, too: the kernel lets no other program look at its structures. */
char LICENSE[] SEC("license") = "GPL";

/* What is needed of the kernel's sockets; CO-RE finds where it is in the kernel that runs. */
struct sock_common {
    unsigned char skc_ipv6only : 1;
} __attribute__((preserve_access_index));

struct sock {
    struct sock_common __sk_common;
} __attribute__((preserve_access_index));

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);              /* for each port, how many entries of the trie have to do with it */
    __uint(max_entries, TABLE_ROWS);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, __u8[TABLE_PORTS]);
} ports SEC(".maps");

struct {                                           /* to how many sockets a port is lent (steer.bpf.c says what that means) */
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 2 * TABLE_PORTS);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32);
    __type(value, __u32);
} lent SEC(".maps");

/* Whether anything published has the port: all that there is to do for most. */
static __always_inline bool has_port(__u32 row, __u32 port) {
    __u8 *count = bpf_map_lookup_elem(&ports, &row);
    barrier_var(port);                             /* the verifier of Linux 6.1 does not know what a swap of bytes leaves */
    return count && count[port & 0xffff];
}

static inline __u32 lent_key(bool is_udp, __u32 port) {
    return is_udp << 16 | (port & 0xffff);
}

static inline bool is_lent(bool is_udp, __u32 port) {
    __u32 key = lent_key(is_udp, port), *count = bpf_map_lookup_elem(&lent, &key);
    return count && *count;
}

static inline struct address mapped(__be32 address) {
    return (struct address){ { 0, 0, bpf_htonl(0xffff), address } };
}

static inline bool is_mapped(const struct address *address) {
    return !address->words[0] && !address->words[1] && address->words[2] == bpf_htonl(0xffff);
}

static inline bool is_any(const struct address *address) {
    return !address->words[3] && !address->words[0] && !address->words[1] && (!address->words[2] || is_mapped(address));
}

/* The unspecified address of the same family. */
static inline struct address any_of(const struct address *address) {
    return is_mapped(address) ? mapped(0) : (struct address){};
}

/* Of an AF_INET6 socket. */
static inline bool takes_ipv6_only(struct bpf_sock *sk) {
    struct sock *sock = sk->protocol == IPPROTO_TCP ? (void *)bpf_skc_to_tcp6_sock(sk) : (void *)bpf_skc_to_udp6_sock(sk);
    return !sock || BPF_CORE_READ_BITFIELD(&sock->__sk_common, skc_ipv6only);
}
