/* Where answers to UDP clients leave from, and the addresses that they need.

   No other socket than one that is bound to a port can send from there.  The kernel refuses to bind a socket to a port
   that is steered to the shared ones (ebpf/steering.bpf.c), except the one whose cookie is in `binding` at that moment:
   memory that the program shares with us.  If another program has bound the port, a raw socket (raw(7)) serves: the
   kernel makes the IP header, and for IPv6 the checksum (IPV6_CHECKSUM); the UDP header comes with the data.

   Kernel facts:
   * ip(7), struct in_pktinfo: given to sendmsg, `ipi_spec_dst` is the source of the datagram.  With `ipi_ifindex` 0 routing
     chooses the interface.  ipv6(7), struct in6_pktinfo: the interface matters for link-local addresses only; a multicast
     address cannot be a source: the kernel chooses one.
   * A client's socket is told that nobody listens (ECONNREFUSED, if it is connected) by an ICMP message that holds the
     first bytes of its datagram (RFC 792, RFC 4443); addresses and ports are what the kernel looks at (net/ipv4/udp.c,
     __udp4_lib_err). */
#include "parts.h"

#include <linux/filter.h>
#include <netinet/icmp6.h>
#include <netinet/ip.h>
#include <netinet/ip6.h>
#include <netinet/ip_icmp.h>
#include <netinet/udp.h>

enum { SMALLEST_BUFFER = 1 };                      /* the kernel raises it to its minimum: an outlet receives nothing */

/* Where answers leave from */

/* Write a control message; return how much room it takes. */
socklen_t write_control(char *control, int level, int type, const void *data, size_t bytes)
{
    struct cmsghdr *header = (struct cmsghdr *)control;
    *header = (struct cmsghdr){.cmsg_len = CMSG_LEN(bytes), .cmsg_level = level, .cmsg_type = type};
    memcpy(CMSG_DATA(header), data, bytes);
    return CMSG_SPACE(bytes);
}

/* Write the control message that has answers leave from where the client sent to; return its size, 0 if the kernel has to
   choose. */
socklen_t write_origin(const struct client_key *key, char *control)
{
    if (key->to.family == AF_INET) {
        struct in_pktinfo info = {0};
        memcpy(&info.ipi_spec_dst, key->to.address, 4);
        return write_control(control, IPPROTO_IP, IP_PKTINFO, &info, sizeof info);
    }
    struct in6_pktinfo info = {.ipi6_ifindex = key->to.zone};
    memcpy(&info.ipi6_addr, key->to.address, 16);
    if (key->to.family != AF_INET6 || IN6_IS_ADDR_MULTICAST(&info.ipi6_addr))
        return 0;
    return write_control(control, IPPROTO_IPV6, IPV6_PKTINFO, &info, sizeof info);
}

/* Outlets */

static uint64_t cookie_of(int fd)
{
    uint64_t cookie = 0;
    socklen_t size = sizeof cookie;
    getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &size);
    return cookie;
}

static int bind_outlet(struct core *core, const struct entrance *entrance, const struct port *port, int fd,
                       uint16_t host_port)
{
    const struct name name = name_of(&port->settings.host, host_port);
    int on = 1, smallest = SMALLEST_BUFFER;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);   /* the shared socket may have that very port */
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &smallest, sizeof smallest);
    if (port->settings.host.family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    pthread_mutex_lock(&core->binding_lock);
    atomic_store(entrance->binding, cookie_of(fd));
    int done = bind(fd, &name.as.any, name.size);
    int error = errno;
    atomic_store(entrance->binding, 0);
    pthread_mutex_unlock(&core->binding_lock);
    errno = error;
    return done;
}

static struct outlet *outlet_at(struct port *port, uint16_t host_port)
{
    if (port->only.fd >= 0)
        return &port->only;
    size_t count = (size_t)port->settings.last - port->settings.host.port + 1;
    if (port->outlets == NULL)
        port->outlets = calloc(count, sizeof *port->outlets);
    return port->outlets == NULL ? NULL : &port->outlets[host_port - port->settings.host.port];
}

/* Return the outlet of a client's port, for as long as the client lives; it is opened if there is none.  NULL: errno. */
struct outlet *acquire_outlet(struct thread *thread, struct entrance *entrance, const struct client *client)
{
    struct port *port = client->port;
    struct outlet *outlet = outlet_at(port, client->key.to.port);
    if (outlet == NULL)
        return NULL;
    if (outlet != &port->only && outlet->clients == 0) {
        outlet->fd = open_udp(thread, port, port->settings.host.family);
        if (outlet->fd < 0)
            return NULL;
        if (bind_outlet(thread->core, entrance, port, outlet->fd, client->key.to.port) < 0) {
            int error = errno;
            close(outlet->fd);
            errno = error;
            return NULL;
        }
    }
    outlet->clients++;
    return outlet;
}

void release_outlet(struct client *client)
{
    struct outlet *outlet = client->outlet;
    outlet->clients--;
    if (outlet != &client->port->only && outlet->clients == 0)
        close(outlet->fd);
}

/* Raw sockets */

/* Add 16-bit words, in network byte order, to a sum in ones' complement (RFC 1071). */
static uint64_t add_words(uint64_t sum, const void *data, size_t bytes)
{
    const uint8_t *at = data;
    for (; bytes >= 2; at += 2, bytes -= 2) {
        uint16_t word;
        memcpy(&word, at, 2);
        sum += word;
    }
    if (bytes == 1) {
        uint16_t last = 0;
        memcpy(&last, at, 1);
        sum += last;
    }
    return sum;
}

static uint16_t checksum(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

/* Write the header of an answer; for IPv4 with the checksum. */
void write_udp_header(const struct client *client, const void *data, size_t bytes, struct udphdr *header)
{
    const struct client_key *key = &client->key;
    uint16_t length = htons((uint16_t)(sizeof *header + bytes)), protocol = htons(IPPROTO_UDP);
    *header = (struct udphdr){.source = htons(client->key.to.port), .dest = htons(key->from.port), .len = length};
    if (key->to.family != AF_INET)
        return;
    uint64_t sum = add_words(add_words(0, key->to.address, 4), key->from.address, 4) + protocol + length;
    header->check = checksum(add_words(add_words(sum, header, sizeof *header), data, bytes));
    if (header->check == 0)
        header->check = 0xffff;                    /* RFC 768: 0 would mean that there is none */
}

/* Refusals */

struct quoted4 {
    struct icmphdr icmp;
    struct iphdr ip;
    struct udphdr udp;
};

struct quoted6 {
    struct icmp6_hdr icmp;
    struct ip6_hdr ip;
    struct udphdr udp;
};

static struct udphdr quoted_udp(const struct client *client)
{
    return (struct udphdr){
        .source = htons(client->key.from.port), .dest = htons(client->key.to.port), .len = htons(sizeof(struct udphdr)),
    };
}

static struct quoted4 quote4(const struct client *client)
{
    struct quoted4 quoted = {.icmp = {.type = ICMP_DEST_UNREACH, .code = ICMP_PORT_UNREACH}, .udp = quoted_udp(client)};
    quoted.ip = (struct iphdr){.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_UDP};
    quoted.ip.tot_len = htons(sizeof quoted.ip + sizeof quoted.udp);
    memcpy(&quoted.ip.saddr, client->key.from.address, 4);
    memcpy(&quoted.ip.daddr, client->key.to.address, 4);
    quoted.ip.check = checksum(add_words(0, &quoted.ip, sizeof quoted.ip));
    quoted.icmp.checksum = checksum(add_words(0, &quoted, sizeof quoted));
    return quoted;
}

static struct quoted6 quote6(const struct client *client)
{
    struct quoted6 quoted = {.icmp = {.icmp6_type = ICMP6_DST_UNREACH, .icmp6_code = ICMP6_DST_UNREACH_NOPORT}};
    quoted.udp = quoted_udp(client);
    quoted.ip.ip6_vfc = 6 << 4;
    quoted.ip.ip6_plen = quoted.udp.len;
    quoted.ip.ip6_nxt = IPPROTO_UDP;
    quoted.ip.ip6_hlim = 64;
    memcpy(&quoted.ip.ip6_src, client->key.from.address, 16);
    memcpy(&quoted.ip.ip6_dst, client->key.to.address, 16);
    return quoted;                                 /* the kernel adds the checksum (RFC 3542, 3.1) */
}

int core_open_icmp(int family)
{
    static const struct sock_filter drop_all[] = {BPF_STMT(BPF_RET | BPF_K, 0)};
    const struct sock_fprog program = {1, (struct sock_filter *)(uintptr_t)drop_all};
    int fd = socket(family, SOCK_RAW | SOCK_CLOEXEC, family == AF_INET ? IPPROTO_ICMP : IPPROTO_ICMPV6), on = 1;
    if (fd < 0)
        return -1;
    bool is_deaf = setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0 &&
        setsockopt(fd, SOL_SOCKET, SO_LOCK_FILTER, &on, sizeof on) == 0;
    while (is_deaf && recv(fd, NULL, 0, MSG_DONTWAIT) >= 0)
        ;                                          /* what had arrived before the filter */
    if (is_deaf)
        return fd;
    close(fd);
    return -1;
}

/* Tell a client that its container refused a datagram. */
void report_refusal(const struct core *core, const struct client *client)
{
    bool is_ipv4 = client->key.from.family == AF_INET;
    int fd = is_ipv4 ? core->settings.icmp : core->settings.icmp6;
    if (fd < 0 || client->origin_bytes == 0)
        return;
    struct name name = name_of(&client->key.from, 0);
    struct quoted4 four = quote4(client);
    struct quoted6 six = quote6(client);
    struct iovec part = {is_ipv4 ? (void *)&four : (void *)&six, is_ipv4 ? sizeof four : sizeof six};
    char origin[ORIGIN_BYTES] __attribute__((aligned(8)));
    memcpy(origin, client->origin, sizeof origin);
    struct msghdr message = {
        .msg_name = &name.as, .msg_namelen = name.size, .msg_iov = &part, .msg_iovlen = 1,
        .msg_control = origin, .msg_controllen = client->origin_bytes,
    };
    sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}
