/* Moves datagrams: UDP.

   A thread receives what has arrived at a socket together (recvmmsg), and sends what has the same client together
   (sendmmsg).  Answers of one round wait until its end, or for one that leaves from another outlet.  A client that sends
   or is sent much does so in datagrams that the kernel has joined and cuts again (UDP_GRO, UDP_SEGMENT; udp(7)).

   Another port may answer.  A container's socket for a client is not connected, and takes what comes from any port of the
   container's address.  The client goes on sending to the published port, with one exception: a TFTP server answers from
   a new port, which the rest of the transfer goes to (RFC 1350, 4).

   Kernel facts:
   * sendmmsg(2) stops at the first datagram that cannot be sent, and returns how many were sent; it reports the error only
     if that was the first one.
   * With IP_RECVERR a socket that is not connected learns of ICMP errors, too (ip(7)): of all that quote its port, whatever
     the destination.  So anybody can send some, and only those are heeded whose datagram went to the client's container.
     They are read from a queue of their own; until then the next call of any kind reports one, and a send that does so has
     sent nothing (net/core/sock.c, sock_error).
   * ip(7), struct in_pktinfo: `ipi_spec_dst` is the local address of the datagram: its destination or, for a broadcast,
     the address of the interface.  A dual-stack socket reports it, too, besides IPv6's (net/ipv6/datagram.c).
   * IP_RECVORIGDSTADDR and IPV6_RECVORIGDSTADDR report the address and port that a datagram was sent to, as a socket
     address: a socket that serves many ports needs the port.
   * The kernel refuses to cut datagrams that would not fit the MTU, which those of the client did (net/ipv4/udp.c,
     udp_send_skb).  Then each is sent by itself, and fragmented. */
#include "parts.h"

#include <linux/errqueue.h>
#include <netinet/udp.h>
#include <sys/mman.h>

enum { MESSAGES = 32, DATAGRAM_BYTES = 1 << 16, MOST_ERRORS = 16 };
enum { ARRIVED_BYTES = CMSG_SPACE(20) + CMSG_SPACE(12) + CMSG_SPACE(28) + CMSG_SPACE(sizeof(int)) };
enum { LEAVING_BYTES = ORIGIN_BYTES + CMSG_SPACE(sizeof(uint16_t)) };
#ifndef IPV6_ORIGDSTADDR
enum { IPV6_ORIGDSTADDR = 74 };                    /* include/uapi/linux/in6.h */
#endif

/* Datagrams that are received, one in each slot. */
struct inbox {
    struct mmsghdr headers[MESSAGES];
    struct iovec parts[MESSAGES];
    struct name names[MESSAGES];
    char controls[MESSAGES][ARRIVED_BYTES] __attribute__((aligned(8)));
    char data[MESSAGES][DATAGRAM_BYTES];           /* the kernel gives it memory when a datagram of the size arrives */
};

/* Datagrams that leave by the same socket. */
struct outbox {
    unsigned count;
    struct mmsghdr headers[MESSAGES];
    struct iovec parts[MESSAGES][2];               /* a UDP header, which a raw socket needs; and the data */
    uint16_t segments[MESSAGES];                   /* the kernel cuts it into such parts; 0: into none */
    struct udphdr udp[MESSAGES];
    char controls[MESSAGES][LEAVING_BYTES] __attribute__((aligned(8)));
};

struct datagrams {
    struct inbox arrived, answers;
    struct outbox up, down;
    unsigned answer_count;                         /* slots of `answers` whose datagrams are in `down`, or dropped */
    const struct client *answered;                 /* the client of the last one; its outlet is that of all */
};

struct datagrams *make_datagrams(void)
{
    return calloc(1, sizeof(struct datagrams));
}

/* Give back the memory of datagrams that have been moved; nothing is in an outbox. */
void release_memory(struct datagrams *datagrams)
{
    struct inbox *const inboxes[] = {&datagrams->arrived, &datagrams->answers};
    for (size_t number = 0; number < sizeof inboxes / sizeof *inboxes; number++) {
        uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), data = (uintptr_t)inboxes[number]->data;
        uintptr_t first = (data + page - 1) / page * page, end = (data + sizeof inboxes[number]->data) / page * page;
        madvise((void *)first, end - first, MADV_DONTNEED);
    }
}

/* Receive */

/* Have the kernel say what each datagram was sent to, and join those of a client. */
int prepare_receiver(int fd, int family, bool is_shared)
{
    const struct { int level, option; bool is_wanted; } options[] = {
        {IPPROTO_IP, IP_PKTINFO, true},
        {IPPROTO_IPV6, IPV6_RECVPKTINFO, family == AF_INET6},
        {IPPROTO_IP, IP_RECVORIGDSTADDR, is_shared && family == AF_INET},
        {IPPROTO_IPV6, IPV6_ORIGDSTADDR, is_shared && family == AF_INET6},
    };
    int on = 1;
    for (size_t number = 0; number < sizeof options / sizeof *options; number++)
        if (options[number].is_wanted && setsockopt(fd, options[number].level, options[number].option, &on, sizeof on) < 0)
            return -1;
    setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof on);   /* Linux 5.0 */
    return 0;
}

static int receive(struct inbox *inbox, int fd, unsigned first, unsigned most)
{
    for (unsigned slot = first; slot < first + most; slot++) {
        inbox->parts[slot] = (struct iovec){inbox->data[slot], DATAGRAM_BYTES};
        inbox->headers[slot].msg_hdr = (struct msghdr){
            .msg_name = &inbox->names[slot].as, .msg_namelen = sizeof inbox->names[slot].as,
            .msg_iov = &inbox->parts[slot], .msg_iovlen = 1,
            .msg_control = inbox->controls[slot], .msg_controllen = ARRIVED_BYTES,
        };
    }
    int count = recvmmsg(fd, inbox->headers + first, most, MSG_DONTWAIT, NULL);
    for (unsigned slot = first; count > 0 && slot < first + (unsigned)count; slot++)
        inbox->names[slot].size = inbox->headers[slot].msg_hdr.msg_namelen;
    return count;
}

/* What a datagram's control messages say, besides its destination. */
struct arrival {
    uint16_t segment;                              /* the size of its parts, if several were joined; else 0 */
    bool is_group;                                 /* it was a broadcast or multicast */
};

static void read_destination4(const struct in_pktinfo *info, struct client_key *key, struct arrival *arrival)
{
    key->to.family = AF_INET;
    memcpy(key->to.address, &info->ipi_spec_dst, 4);
    arrival->is_group = info->ipi_addr.s_addr != info->ipi_spec_dst.s_addr;
}

static void read_destination6(const struct in6_pktinfo *info, struct client_key *key, struct arrival *arrival)
{
    if (IN6_IS_ADDR_V4MAPPED(&info->ipi6_addr))    /* IPv4's says more */
        return;
    key->to.family = AF_INET6;
    memcpy(key->to.address, &info->ipi6_addr, 16);
    key->to.zone = IN6_IS_ADDR_LINKLOCAL(&info->ipi6_addr) ? info->ipi6_ifindex : 0;
    arrival->is_group = IN6_IS_ADDR_MULTICAST(&info->ipi6_addr);
}

/* Return the data of a control message of a kind; NULL: it is another one, or too short. */
static const void *data_of(const struct cmsghdr *one, int level, int kind, size_t bytes)
{
    bool is_it = one->cmsg_level == level && one->cmsg_type == kind && one->cmsg_len >= CMSG_LEN(bytes);
    return is_it ? CMSG_DATA(one) : NULL;
}

/* Read the control messages of a datagram; its destination is a part of the client's key. */
static struct arrival read_control(struct msghdr *message, struct client_key *key)
{
    struct arrival arrival = {0};
    for (struct cmsghdr *one = CMSG_FIRSTHDR(message); one != NULL; one = CMSG_NXTHDR(message, one)) {
        const void *data;
        if ((data = data_of(one, IPPROTO_IP, IP_PKTINFO, sizeof(struct in_pktinfo))) != NULL)
            read_destination4(data, key, &arrival);
        else if ((data = data_of(one, IPPROTO_IPV6, IPV6_PKTINFO, sizeof(struct in6_pktinfo))) != NULL)
            read_destination6(data, key, &arrival);
        else if ((data = data_of(one, IPPROTO_IP, IP_ORIGDSTADDR, sizeof(struct sockaddr_in))) != NULL)
            key->to.port = ntohs(((const struct sockaddr_in *)data)->sin_port);
        else if ((data = data_of(one, IPPROTO_IPV6, IPV6_ORIGDSTADDR, sizeof(struct sockaddr_in6))) != NULL)
            key->to.port = ntohs(((const struct sockaddr_in6 *)data)->sin6_port);
        else if ((data = data_of(one, IPPROTO_UDP, UDP_GRO, sizeof(int))) != NULL)
            arrival.segment = (uint16_t)*(const int *)data;
    }
    return arrival;
}

/* Send */

/* Add a datagram to an outbox; `origin` says where it leaves from. */
static void put(struct outbox *outbox, struct name *name, const struct client *origin, void *data, size_t bytes,
                uint16_t segment)
{
    unsigned at = outbox->count++;
    struct msghdr *message = &outbox->headers[at].msg_hdr;
    bool is_raw = origin != NULL && origin->port->raw >= 0, is_cut = segment != 0 && segment < bytes;
    outbox->parts[at][0] = (struct iovec){&outbox->udp[at], sizeof outbox->udp[at]};
    outbox->parts[at][1] = (struct iovec){data, bytes};
    outbox->segments[at] = is_cut ? segment : 0;
    *message = (struct msghdr){
        .msg_name = &name->as, .msg_namelen = name->size, .msg_iov = &outbox->parts[at][!is_raw], .msg_iovlen = 1 + is_raw,
        .msg_control = outbox->controls[at],
    };
    if (is_raw)
        write_udp_header(origin, data, bytes, &outbox->udp[at]);
    if (origin != NULL) {
        memcpy(outbox->controls[at], origin->origin, origin->origin_bytes);
        message->msg_controllen = origin->origin_bytes;
    }
    if (is_cut) {
        char *cut = outbox->controls[at] + message->msg_controllen;
        message->msg_controllen += write_control(cut, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof segment);
    }
}

/* What an outbox is sent for. */
struct sending {
    struct thread *thread;
    const struct client *client;                   /* of one of the datagrams */
    int fd;
    enum core_note_kind kind;                      /* of a note about one that is not sent */
    size_t bytes;                                  /* that were sent */
};

static void report_loss(const struct sending *sending, int error)
{
    const struct client *client = sending->client;
    count(&COUNTER(client->port, dropped), 1);
    if (error != EAGAIN)                           /* a full buffer: UDP guarantees no delivery */
        note_backend(sending->thread->core, client->port, client->backend_port, sending->kind, error, 0);
}

/* Send a datagram by itself; the first attempt may report the error of an earlier one. */
static void send_one(struct sending *sending, const struct msghdr *message, size_t bytes)
{
    for (int attempt = 0; attempt < 2; attempt++) {
        if (sendmsg(sending->fd, message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
            sending->bytes += bytes;
            return;
        }
        if (errno == EAGAIN)
            break;
    }
    report_loss(sending, errno);
}

/* Send the parts of a datagram that the kernel has not cut. */
static void send_parts(struct sending *sending, const struct outbox *outbox, unsigned at)
{
    struct msghdr message = outbox->headers[at].msg_hdr;
    struct iovec part = outbox->parts[at][1];
    size_t left = part.iov_len;
    message.msg_iov = &part, message.msg_iovlen = 1;
    message.msg_controllen -= CMSG_SPACE(sizeof(uint16_t));
    while (left > 0) {
        part.iov_len = left < outbox->segments[at] ? left : outbox->segments[at];
        send_one(sending, &message, part.iov_len);
        left -= part.iov_len;
        part.iov_base = (char *)part.iov_base + part.iov_len;
    }
}

/* Send the rest of an outbox, from a datagram on; return how many were sent, or -1.  For a plain one sendto costs least. */
static int send_from(int fd, struct outbox *outbox, unsigned first)
{
    const struct msghdr *message = &outbox->headers[first].msg_hdr;
    const struct iovec *part = message->msg_iov;
    const int flags = MSG_DONTWAIT | MSG_NOSIGNAL;
    if (first + 1 < outbox->count || message->msg_controllen > 0 || message->msg_iovlen > 1)
        return sendmmsg(fd, outbox->headers + first, outbox->count - first, flags);
    return sendto(fd, part->iov_base, part->iov_len, flags, message->msg_name, message->msg_namelen) < 0 ? -1 : 1;
}

/* Send all of an outbox, in order. */
static void send_all(struct sending *sending, struct outbox *outbox)
{
    unsigned done = 0;
    while (done < outbox->count) {
        int sent = send_from(sending->fd, outbox, done);
        if (sent < 0 && errno == EAGAIN)
            report_loss(sending, EAGAIN);
        else if (sent < 0 && outbox->segments[done] != 0)
            send_parts(sending, outbox, done);
        else if (sent < 0)
            send_one(sending, &outbox->headers[done].msg_hdr, outbox->parts[done][1].iov_len);
        for (int number = 0; number < sent; number++)
            sending->bytes += outbox->parts[done + (unsigned)number][1].iov_len;
        done += sent < 0 ? 1 : (unsigned)sent;
    }
    outbox->count = 0;
}

/* From clients to containers */

/* True for the request of a TFTP client: RRQ or WRQ, a file's name, a mode (RFC 1350, 5). */
static bool is_tftp_request(const char *data, size_t bytes)
{
    static const char *const modes[] = {"octet", "netascii", "mail"};
    const char *end = data + bytes;
    if (bytes < 9 || data[0] != 0 || (data[1] != 1 && data[1] != 2) || data[2] == 0)
        return false;
    const char *mode = memchr(data + 2, 0, bytes - 2);
    if (mode == NULL || memchr(mode + 1, 0, (size_t)(end - mode - 1)) == NULL)
        return false;
    for (size_t number = 0; number < sizeof modes / sizeof *modes; number++)
        if (strcasecmp(mode + 1, modes[number]) == 0)
            return true;
    return false;
}

static void set_container_port(struct client *client, uint16_t port)
{
    client->container = name_of(&client->port->settings.backend, port);
}

static void send_up(struct thread *thread, struct client *client)
{
    struct outbox *outbox = &thread->datagrams->up;
    if (client == NULL || outbox->count == 0)
        return;
    struct sending sending = {.thread = thread, .client = client, .fd = client->fd, .kind = NOTE_NOT_SENT_UP};
    touch(thread, client);
    send_all(&sending, outbox);
    count(&COUNTER(client->port, up_bytes), sending.bytes);
}

/* Send the datagrams that have arrived at an entrance to the containers. */
void receive_datagrams(struct thread *thread, struct entrance *entrance)
{
    struct datagrams *datagrams = thread->datagrams;
    struct inbox *inbox = &datagrams->arrived;
    struct client *client = NULL;
    if (atomic_load(&entrance->is_closed))         /* what waits is the next relay's */
        return;
    int arrived = receive(inbox, entrance->fd, 0, MESSAGES);
    for (int slot = 0; slot < arrived; slot++) {
        struct client_key key = {.own = entrance->port, .from = end_of(&inbox->names[slot]), .to.port = entrance->host_port};
        uint64_t hash;
        struct arrival arrival = read_control(&inbox->headers[slot].msg_hdr, &key);
        if (client == NULL || memcmp(&client->key, &key, sizeof key) != 0) {
            send_up(thread, client);
            client = find_client(thread, &key, &hash);
            if (client == NULL)
                client = make_client(thread, entrance, &key, hash, &inbox->names[slot]);
            if (client == NULL)
                continue;
        }
        size_t bytes = inbox->headers[slot].msg_len;
        client->is_group = arrival.is_group;
        if (is_tftp_request(inbox->data[slot], bytes)) {
            send_up(thread, client);               /* what came before the request goes where the last transfer went */
            client->is_tftp = true;
            set_container_port(client, client->backend_port);
        }
        put(&datagrams->up, &client->container, NULL, inbox->data[slot], bytes, arrival.segment);
    }
    send_up(thread, client);
}

/* From containers to clients */

void send_answers(struct thread *thread)
{
    struct datagrams *datagrams = thread->datagrams;
    const struct client *client = datagrams->answered;
    if (datagrams->down.count > 0) {
        struct sending sending = {.thread = thread, .client = client, .fd = client->outlet->fd, .kind = NOTE_NOT_SENT_DOWN};
        send_all(&sending, &datagrams->down);
        count(&COUNTER(client->port, down_bytes), sending.bytes);
    }
    datagrams->answer_count = 0;
}

/* True if an error is an ICMP message about a datagram that a client sent to `destination`, its container. */
static bool is_about(const struct sock_extended_err *error, const struct client *client, const struct name *destination)
{
    const struct core_end container = end_of(&client->container), to = end_of(destination);
    bool is_icmp = error->ee_origin == SO_EE_ORIGIN_ICMP || error->ee_origin == SO_EE_ORIGIN_ICMP6;
    return is_icmp && have_same_address(&to, &container) && (to.port == container.port || to.port == client->backend_port);
}

/* Handle what has become of a datagram: the container refused it, or it did not get there. */
static void handle_error(struct thread *thread, struct client *client, uint32_t error)
{
    if (error == ECONNREFUSED) {
        count(&COUNTER(client->port, resets), 1);
        set_container_port(client, client->backend_port);
        if (may_be_told(thread, client))
            report_refusal(thread->core, client);
    } else if (error != EMSGSIZE) {                /* the kernel has learned the path's MTU */
        count(&COUNTER(client->port, failed), 1);
        note_backend(thread->core, client->port, client->backend_port, NOTE_UNREACHABLE, (int)error, 0);
    }
}

static void read_errors(struct thread *thread, struct client *client)
{
    for (int number = 0; number < MOST_ERRORS; number++) {
        char control[CMSG_SPACE(sizeof(struct sock_extended_err) + sizeof(struct sockaddr_in6))] __attribute__((aligned(8)));
        struct name name = {0};
        struct msghdr message = {
            .msg_name = &name.as, .msg_namelen = sizeof name.as, .msg_control = control, .msg_controllen = sizeof control,
        };
        const struct sock_extended_err *error;
        if (recvmsg(client->fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0)
            return;
        for (struct cmsghdr *one = CMSG_FIRSTHDR(&message); one != NULL; one = CMSG_NXTHDR(&message, one))
            if (((error = data_of(one, IPPROTO_IP, IP_RECVERR, sizeof *error)) != NULL ||
                 (error = data_of(one, IPPROTO_IPV6, IPV6_RECVERR, sizeof *error)) != NULL) &&
                is_about(error, client, &name))
                handle_error(thread, client, error->ee_errno);
    }
}

/* True if a datagram comes from the client's container; during a TFTP transfer the next ones go where it came from. */
static bool is_from_container(struct client *client, const struct name *name)
{
    const struct core_end container = end_of(&client->container), from = end_of(name);
    if (!have_same_address(&from, &container))
        return false;
    if (client->is_tftp && from.port != container.port)
        set_container_port(client, from.port);
    return true;
}

/* Receive answers from a client's container; epoll reports again if there are more. */
void receive_answers(struct thread *thread, struct client *client, uint32_t events)
{
    struct datagrams *datagrams = thread->datagrams;
    struct inbox *inbox = &datagrams->answers;
    if (client->is_removed)
        return;
    if (events & EPOLLERR)
        read_errors(thread, client);
    if (datagrams->answer_count == MESSAGES || (datagrams->answer_count > 0 && datagrams->answered->outlet != client->outlet))
        send_answers(thread);
    unsigned first = datagrams->answer_count, room = MESSAGES - first, most = client->burst < room ? client->burst : room;
    int arrived = receive(inbox, client->fd, first, most);
    if (arrived <= 0)
        return;
    datagrams->answered = client;
    datagrams->answer_count += (unsigned)arrived;
    if ((unsigned)arrived == most)
        client->burst = client->burst < MESSAGES / 2 ? client->burst * 2 : MESSAGES;
    else
        client->burst = 1;
    for (unsigned slot = first; slot < first + (unsigned)arrived; slot++) {
        struct client_key ignored = {0};
        struct arrival arrival = read_control(&inbox->headers[slot].msg_hdr, &ignored);
        size_t bytes = inbox->headers[slot].msg_len;
        if (!is_from_container(client, &inbox->names[slot])) {
            count(&COUNTER(client->port, dropped), 1);
            continue;
        }
        touch(thread, client);
        put(&datagrams->down, &client->name, client, inbox->data[slot], bytes, arrival.segment);
    }
}
