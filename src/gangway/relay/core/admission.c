/* Decides whether a port is for a client, by its address: those of some subnets, and the host's own.

   rtnetlink(7) answers RTM_GETROUTE with the route to an address; its type is RTN_LOCAL for an address of the host.
   Binding a socket would not do as a test: with net.ipv4.ip_nonlocal_bind any address can be bound. */
#include "parts.h"

#include <linux/rtnetlink.h>

static bool has_prefix(const uint8_t *address, const uint8_t *prefix, unsigned bits)
{
    unsigned whole = bits / 8, rest = bits % 8;
    if (memcmp(address, prefix, whole) != 0)
        return false;
    return rest == 0 || (address[whole] ^ prefix[whole]) >> (8 - rest) == 0;
}

/* True if the host has an address; false also if the kernel does not say. */
static bool is_the_hosts(int routes, const struct core_end *end)
{
    struct {
        struct nlmsghdr header;
        struct rtmsg route;
        struct rtattr attribute;
        uint8_t address[16];
    } question = {0};
    char answer[4096] __attribute__((aligned(NLMSG_ALIGNTO)));
    unsigned bytes = end->family == AF_INET ? 4 : 16;
    question.header = (struct nlmsghdr){.nlmsg_type = RTM_GETROUTE, .nlmsg_flags = NLM_F_REQUEST, .nlmsg_seq = 1};
    question.header.nlmsg_len = (uint32_t)(offsetof(__typeof__(question), address) + bytes);
    question.route = (struct rtmsg){.rtm_family = (uint8_t)end->family, .rtm_dst_len = (uint8_t)(bytes * 8)};
    question.attribute = (struct rtattr){.rta_len = (unsigned short)RTA_LENGTH(bytes), .rta_type = RTA_DST};
    memcpy(question.address, end->address, bytes);
    bool is_asked = send(routes, &question, question.header.nlmsg_len, 0) >= 0;
    ssize_t got = is_asked ? recv(routes, answer, sizeof answer, MSG_DONTWAIT) : -1;
    const struct nlmsghdr *header = (const struct nlmsghdr *)answer;
    if (got < (ssize_t)NLMSG_LENGTH(sizeof(struct rtmsg)) || header->nlmsg_type != RTM_NEWROUTE)
        return false;
    return ((const struct rtmsg *)NLMSG_DATA(header))->rtm_type == RTN_LOCAL;
}

int core_admits(const struct core_subnet *subnets, uint32_t count, const struct core_end *client)
{
    for (uint32_t number = 0; number < count; number++) {
        const struct core_subnet *subnet = &subnets[number];
        if (subnet->family == client->family && has_prefix(client->address, subnet->address, subnet->length))
            return true;
    }
    return false;
}

/* True if a port is for a client. */
bool is_admitted(const struct thread *thread, const struct port *port, const struct core_end *client)
{
    const struct core_port_settings *settings = &port->settings;
    return settings->admitted_count == 0 || core_admits(settings->admitted, settings->admitted_count, client) ||
        is_the_hosts(thread->routes, client);
}
