/* Inputs for the relay's core that libFuzzer makes up; built by clang with sanitizers and run by test_core.py.

   The first byte says what the others are: control messages of a datagram, or steps of a client and a container. */
#define _GNU_SOURCE
#include "datagram.c"

#include <arpa/inet.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>

enum { PATIENCE_MS = 20000, MOST_READ = 100000, CLIENTS = 3, MODULUS = 251 };

static struct core *core;
static struct port *ports[2];                      /* epoll has the only other pointers to them, which LSan cannot see */

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
            abort(); \
        } \
    } while (0)

static int bound(int kind, struct sockaddr_in *address)
{
    socklen_t size = sizeof *address;
    int fd = socket(AF_INET, kind | SOCK_CLOEXEC, 0);
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)address, size) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)address, &size) == 0);
    CHECK(kind == SOCK_DGRAM || listen(fd, 128) == 0);
    return fd;
}

static void wait_for(int fd, short events)
{
    struct pollfd ready = {fd, events, 0};
    int count;
    do                                             /* libFuzzer has an alarm, which interrupts */
        count = poll(&ready, 1, PATIENCE_MS);
    while (count < 0 && errno == EINTR);
    CHECK(count == 1);
}

/* Publish a port for a backend; return the address to reach it at. */
static struct sockaddr_in published(int kind, const struct sockaddr_in *backend)
{
    struct sockaddr_in front;
    struct core_port_settings settings = {.backend = {.family = AF_INET, .port = ntohs(backend->sin_port)}};
    settings.protocol = kind == SOCK_DGRAM ? IPPROTO_UDP : IPPROTO_TCP;
    memcpy(settings.backend.address, &backend->sin_addr, 4);
    struct port *port = core_add_port(core, &settings, bound(kind, &front), -1);
    CHECK(port != NULL);
    ports[kind == SOCK_DGRAM] = port;
    return front;
}

/* Control messages */

static void control(const uint8_t *data, size_t bytes)
{
    char *copy = malloc(bytes + 1);                /* of the very size, so that reading beyond it is found */
    struct msghdr message = {.msg_control = copy, .msg_controllen = bytes};
    struct client_key key = {0};
    memcpy(copy, data, bytes);
    is_tftp_request(copy, bytes);
    if (bytes >= sizeof(struct cmsghdr))
        read_control(&message, &key);
    free(copy);
}

/* Streams */

/* One end: it sends numbers modulo MODULUS, and checks that it receives them in order. */
struct end {
    int fd;
    size_t sent, received;
    bool has_ended, has_shut;
};

static char numbers[MODULUS * 500];

static void send_some(struct end *end, size_t bytes)
{
    bytes = bytes < sizeof numbers - MODULUS ? bytes : sizeof numbers - MODULUS;
    ssize_t sent = end->has_shut ? 0 : send(end->fd, numbers + end->sent % MODULUS, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    end->sent += sent > 0 ? (size_t)sent : 0;
}

static void receive_some(struct end *end, size_t most)
{
    static char got[MOST_READ];
    ssize_t came = end->has_ended ? -1 : recv(end->fd, got, most, MSG_DONTWAIT);
    CHECK(came >= 0 || end->has_ended || errno == EAGAIN || errno == ECONNRESET);
    if (came == 0 || (came < 0 && errno == ECONNRESET))
        end->has_ended = true;
    CHECK(came <= 0 || memcmp(got, numbers + end->received % MODULUS, (size_t)came) == 0);
    end->received += came > 0 ? (size_t)came : 0;
}

static void shut(struct end *end)
{
    if (!end->has_shut)
        shutdown(end->fd, SHUT_WR);
    end->has_shut = true;
}

static void receive_all(struct end *end)
{
    while (!end->has_ended) {
        wait_for(end->fd, POLLIN);
        receive_some(end, MOST_READ);
    }
}

/* Carry out a step; true if it resets the connection. */
static bool step(struct end *end, unsigned kind, unsigned amount)
{
    switch (kind) {
    case 0:
        send_some(end, amount * 7 + 1);
        return false;
    case 1:
        send_some(end, amount * 4000);
        return false;
    case 2:
        receive_some(end, amount * 3000 + 1);
        return false;
    default:
        if (amount < 8)
            shut(end);
        else if (amount < 10)
            usleep(amount * 50);
        return amount == 31;
    }
}

static void stream(const uint8_t *data, size_t bytes)
{
    static struct sockaddr_in server, front;
    static int listener = -1;
    if (listener < 0) {
        listener = bound(SOCK_STREAM, &server);
        front = published(SOCK_STREAM, &server);
    }
    struct end ends[2] = {{.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)}};
    bool is_reset = false;
    CHECK(connect(ends[0].fd, (struct sockaddr *)&front, sizeof front) == 0);
    wait_for(listener, POLLIN);
    ends[1].fd = accept(listener, NULL, NULL);
    for (size_t at = 0; at < bytes && !is_reset; at++) {
        struct end *end = &ends[data[at] & 1];
        is_reset = step(end, data[at] >> 1 & 3, data[at] >> 3);
        if (is_reset) {
            const struct linger at_once = {1, 0};
            setsockopt(end->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
            close(end->fd);
            receive_all(&ends[!(data[at] & 1)]);
            close(ends[!(data[at] & 1)].fd);
        }
    }
    if (is_reset)
        return;
    for (int turn = 0; !(ends[0].has_ended && ends[1].has_ended); turn = !turn) {
        shut(&ends[turn]);
        receive_some(&ends[turn], MOST_READ);
    }
    CHECK(ends[0].received == ends[1].sent && ends[1].received == ends[0].sent);
    close(ends[0].fd);
    close(ends[1].fd);
}

/* Datagrams */

static void datagram(const uint8_t *data, size_t bytes)
{
    static struct sockaddr_in server, front, ignored;
    static int backend = -1, clients[CLIENTS];
    static char got[1 << 16];
    if (backend < 0) {
        backend = bound(SOCK_DGRAM, &server);
        front = published(SOCK_DGRAM, &server);
        for (int number = 0; number < CLIENTS; number++)
            clients[number] = bound(SOCK_DGRAM, &ignored);
    }
    for (size_t at = 0; at + 1 < bytes; at += 2) {
        int number = data[at] % CLIENTS, segment = data[at] / CLIENTS * 10;
        size_t size = data[at + 1] * 20 + 1;
        struct sockaddr_in from;
        socklen_t from_size = sizeof from;
        setsockopt(clients[number], IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof segment);
        memset(got, data[at + 1], size);
        if (sendto(clients[number], got, size, 0, (struct sockaddr *)&front, sizeof front) < 0)
            continue;                              /* more parts than the kernel makes */
        for (size_t left = size; left > 0;) {
            wait_for(backend, POLLIN);
            ssize_t came = recvfrom(backend, got, sizeof got, 0, (struct sockaddr *)&from, &from_size);
            CHECK(came > 0 && (size_t)came <= left && got[0] == (char)data[at + 1] && got[came - 1] == got[0]);
            CHECK(sendto(backend, got, (size_t)came, 0, (struct sockaddr *)&from, from_size) == came);
            wait_for(clients[number], POLLIN);
            CHECK(recv(clients[number], got, sizeof got, 0) == came);
            left -= (size_t)came;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static void (*const targets[])(const uint8_t *, size_t) = {control, stream, datagram};
    const struct core_settings settings = {
        .threads = 1, .keepalive_s = 15, .connect_timeout_ms = 10000, .udp_timeout_s = 60, .udp_clients = 2,
        .udp_clients_per_port = 2, .icmp = -1, .icmp6 = -1,
    };
    if (bytes == 0)
        return 0;
    if (core == NULL) {
        for (size_t at = 0; at < sizeof numbers; at++)
            numbers[at] = (char)(at % MODULUS);
        core = core_start(&settings);
        CHECK(core != NULL);
    }
    targets[data[0] % 3](data + 1, bytes - 1);
    return 0;
}
