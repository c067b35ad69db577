/* Drives the relay's core with real sockets; built with sanitizers and run by test_core.py.  Exits with 0 if all holds.

   Calls that only fail when the machine is at a limit are made to fail by the linker's --wrap. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core.h"

enum { THREADS = 3, CLIENTS = 40, ROUNDS = 30, MOST_BYTES = 2000000, MOST_CLIENTS = 4 };

static atomic_int watches_left = -1;               /* -1: any number */
static atomic_bool has_pipes = true;
static struct core *core;

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
            _exit(1); \
        } \
    } while (0)

int __real_epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event);
int __wrap_epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event);

int __wrap_epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    if (operation == EPOLL_CTL_ADD && watches_left == 0) {
        errno = ENOSPC;
        return -1;
    }
    return __real_epoll_ctl(epoll, operation, fd, event);
}

int __real_pipe2(int ends[2], int flags);
int __wrap_pipe2(int ends[2], int flags);

int __wrap_pipe2(int ends[2], int flags)
{
    if (!has_pipes) {
        errno = EMFILE;
        return -1;
    }
    return __real_pipe2(ends, flags);
}

/* Sockets */

static int listening(struct sockaddr_in *address)
{
    socklen_t size = sizeof *address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)address, size) == 0 && listen(fd, 128) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)address, &size) == 0);
    return fd;
}

static int connected(const struct sockaddr_in *to)
{
    struct timeval limit = {20, 0};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) == 0);
    CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) == 0);
    return connect(fd, (const struct sockaddr *)to, sizeof *to) == 0 ? fd : (close(fd), -1);
}

static void *echo_one(void *argument)
{
    char buffer[1 << 16];
    int fd = (int)(long)argument;
    for (ssize_t got; (got = recv(fd, buffer, sizeof buffer, 0)) > 0;)
        if (send(fd, buffer, (size_t)got, MSG_NOSIGNAL) != got)
            break;
    close(fd);
    return NULL;
}

/* Send back what clients send, each in a thread of its own; ends when the socket is shut down. */
static void *echo_server(void *argument)
{
    int listener = *(int *)argument;
    for (int fd; (fd = accept(listener, NULL, NULL)) >= 0;) {
        pthread_t id;
        CHECK(pthread_create(&id, NULL, echo_one, (void *)(long)fd) == 0);
        pthread_detach(id);
    }
    return NULL;
}

static struct port *publish_as(uint16_t protocol, const struct sockaddr_in *backend, int fd)
{
    struct core_port_settings settings = {.backend = {.family = AF_INET}, .protocol = protocol};
    settings.backend.port = ntohs(backend->sin_port);
    memcpy(settings.backend.address, &backend->sin_addr, 4);
    return core_add_port(core, &settings, fd, -1);
}

static struct port *publish(const struct sockaddr_in *backend, int fd)
{
    return publish_as(IPPROTO_TCP, backend, fd);
}

static struct port *publish_udp(const struct sockaddr_in *backend, int fd)
{
    return publish_as(IPPROTO_UDP, backend, fd);
}

/* Wait for a note of a kind, and return it. */
static struct core_note expect(enum core_note_kind kind)
{
    struct core_note note;
    for (;;) {
        struct pollfd ready = {core_notes_fd(core), POLLIN, 0};
        CHECK(poll(&ready, 1, 20000) == 1);
        while (core_read_notes(core, &note, 1) == 1)
            if (note.kind == (int)kind)
                return note;
    }
}

static void remove_port(struct port *port)
{
    core_remove_port(core, port);
    CHECK(expect(NOTE_PORT_REMOVED).port == (uint64_t)(uintptr_t)port);
}

static struct core_counters read_counters(const struct port *port)
{
    struct core_counters counters;
    core_read_counters(port, &counters);
    return counters;
}

static void expect_reset(int fd)
{
    char byte;
    CHECK(fd < 0 || (recv(fd, &byte, 1, 0) < 0 && errno == ECONNRESET));
    if (fd >= 0)
        close(fd);
}

/* Cases */

/* A client that sends a number of bytes, reads them back, and ends in one of several ways. */
struct client {
    const struct sockaddr_in *to;
    unsigned seed;
    bool may_be_reset;
};

static void *be_client(void *argument)
{
    const struct client *client = argument;
    unsigned seed = client->seed;
    static _Thread_local char sent[MOST_BYTES], got[MOST_BYTES];
    for (int round = 0; round < ROUNDS; round++) {
        size_t bytes = rand_r(&seed) % 6 == 0 ? rand_r(&seed) % MOST_BYTES : rand_r(&seed) % 100 + 1, done = 0, back = 0;
        int fd = connected(client->to);
        CHECK(fd >= 0 || client->may_be_reset);
        if (fd < 0)
            return NULL;
        memset(sent, (int)rand_r(&seed), bytes);
        while (back < bytes) {
            size_t part = bytes - done < 20000 ? bytes - done : 20000;
            ssize_t now = part == 0 ? 0 : send(fd, sent + done, part, MSG_NOSIGNAL);
            done += now > 0 ? (size_t)now : 0;
            if (done == bytes && rand_r(&seed) % 2 == 0)
                shutdown(fd, SHUT_WR);
            ssize_t came = now < 0 ? -1 : recv(fd, got + back, bytes - back, 0);
            CHECK(came > 0 || client->may_be_reset);
            if (came <= 0)
                break;
            back += (size_t)came;
        }
        CHECK(client->may_be_reset || memcmp(sent, got, bytes) == 0);
        if (rand_r(&seed) % 4 == 0)
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){1, 0}, sizeof(struct linger));
        close(fd);
    }
    return NULL;
}

/* Many clients at once, of a port that stays, and of one that is removed and published again all the time. */
static void crowd(const struct sockaddr_in *server)
{
    struct sockaddr_in stays, moves;
    struct port *port = publish(server, listening(&stays));
    struct client clients[CLIENTS];
    pthread_t ids[CLIENTS];
    int moving = listening(&moves);
    CHECK(port != NULL);
    for (unsigned number = 0; number < CLIENTS; number++) {
        clients[number] = (struct client){number % 2 ? &stays : &moves, number + 1, number % 2 == 0};
        CHECK(pthread_create(&ids[number], NULL, be_client, &clients[number]) == 0);
    }
    for (int times = 0; times < 50; times++) {
        struct port *again = publish(server, dup(moving));
        CHECK(again != NULL);
        usleep(2000);
        remove_port(again);
    }
    shutdown(moving, SHUT_RDWR);
    close(moving);
    for (unsigned number = 0; number < CLIENTS; number++)
        pthread_join(ids[number], NULL);
    struct core_counters counters = read_counters(port);
    CHECK(counters.connections == CLIENTS / 2 * ROUNDS);
    CHECK(counters.down_bytes > 0 && counters.down_bytes <= counters.up_bytes);
    remove_port(port);
    CHECK(core_active(core) == 0);
}

/* Without watches a thread loses one client at most, and says so; the others wait, and are served afterwards. */
static void no_watches(const struct sockaddr_in *server)
{
    enum { WAITING = 12 };
    struct sockaddr_in front;
    struct port *port = publish(server, listening(&front));
    int fds[WAITING], served = 0;
    char byte;
    watches_left = 0;
    for (int number = 0; number < WAITING; number++)
        fds[number] = connected(&front);
    CHECK(expect(NOTE_CLIENT_LOST).error == ENOSPC);
    CHECK(publish(server, listening(&(struct sockaddr_in){0})) == NULL && errno == ENOSPC);
    watches_left = -1;
    for (int number = 0; number < WAITING; number++) {
        served += fds[number] >= 0 && send(fds[number], "x", 1, MSG_NOSIGNAL) == 1 && recv(fds[number], &byte, 1, 0) == 1;
        close(fds[number]);
    }
    CHECK(served >= WAITING - THREADS);
    CHECK(read_counters(port).lost == (uint64_t)(WAITING - served));
    remove_port(port);
}

/* Without pipes bulk transfers go on, in smaller steps. */
static void no_pipes(const struct sockaddr_in *server)
{
    struct sockaddr_in front;
    struct port *port = publish(server, listening(&front));
    has_pipes = false;
    for (unsigned seed = 1; seed < 4; seed++)
        be_client(&(struct client){&front, seed, false});
    has_pipes = true;
    remove_port(port);
}

/* A container that refuses resets the client. */
static void refused(void)
{
    struct sockaddr_in nobody, front;
    int fd = listening(&nobody);
    struct port *port = publish(&nobody, listening(&front));
    close(fd);
    int client = connected(&front);
    struct core_note note = expect(NOTE_CANNOT_CONNECT);
    CHECK(note.error == ECONNREFUSED && note.end.port == ntohs(nobody.sin_port));
    expect_reset(client);
    CHECK(read_counters(port).failed == 1 && read_counters(port).resets == 0);
    remove_port(port);
}

/* UDP */

enum { UDP_CLIENTS = 30, ASKED = 400, LARGEST = 9000, MOST_ATTEMPTS = 50 };

static int datagram_socket(struct sockaddr_in *address)
{
    struct timeval limit = {0, 200000};
    socklen_t size = sizeof *address;
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)address, size) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)address, &size) == 0);
    CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) == 0);
    return fd;
}

/* Send back what clients send, sometimes from another port; ends with an empty datagram from the main thread. */
static void *echo_datagrams(void *argument)
{
    struct sockaddr_in from, ignored;
    char buffer[1 << 16];
    int fd = *(int *)argument, other = datagram_socket(&ignored);
    for (unsigned count = 0;; count++) {
        socklen_t size = sizeof from;
        ssize_t got = recvfrom(fd, buffer, sizeof buffer, 0, (struct sockaddr *)&from, &size);
        if (got == 0)
            break;
        if (got > 0)
            sendto(count % 7 ? fd : other, buffer, (size_t)got, 0, (struct sockaddr *)&from, size);
    }
    close(other);
    return NULL;
}

/* Send a datagram, which begins with a number, until it is answered; answers to others are skipped. */
static ssize_t ask(int fd, const struct sockaddr_in *to, unsigned number, const char *sent, size_t bytes, char *got,
                   int attempts)
{
    for (; attempts > 0; attempts--) {
        CHECK(sendto(fd, sent, bytes, 0, (const struct sockaddr *)to, sizeof *to) == (ssize_t)bytes);
        for (ssize_t came; (came = recv(fd, got, LARGEST, 0)) > 0;)
            if (memcmp(got, &number, sizeof number) == 0)
                return came;
    }
    return -1;
}

static void *ask_datagrams(void *argument)
{
    const struct client *client = argument;
    unsigned seed = client->seed, answered = 0;
    struct sockaddr_in ignored;
    char sent[LARGEST], got[LARGEST];
    int fd = datagram_socket(&ignored);
    for (unsigned number = 0; number < ASKED / UDP_CLIENTS; number++) {
        size_t bytes = rand_r(&seed) % (LARGEST - sizeof number) + sizeof number;
        if (number % 5 == 4) {                     /* another client, by the port that it sends from */
            close(fd);
            fd = datagram_socket(&ignored);
        }
        memset(sent, (int)rand_r(&seed), bytes);
        memcpy(sent, &number, sizeof number);
        ssize_t came = ask(fd, client->to, number, sent, bytes, got, client->may_be_reset ? 1 : MOST_ATTEMPTS);
        CHECK(came > 0 || client->may_be_reset);
        CHECK(came <= 0 || ((size_t)came == bytes && memcmp(sent, got, bytes) == 0));
        answered += came > 0;
    }
    close(fd);
    CHECK(answered > 0 || client->may_be_reset);
    return NULL;
}

/* Clients of more ports than there are threads, one of which comes and goes, while addresses are excluded. */
static void datagrams(void)
{
    enum { PORTS = THREADS + 2 };
    struct sockaddr_in server, fronts[PORTS];
    struct port *ports[PORTS];
    struct client clients[UDP_CLIENTS];
    pthread_t serving, ids[UDP_CLIENTS];
    int fd = datagram_socket(&server), moving = datagram_socket(&fronts[0]);
    CHECK(pthread_create(&serving, NULL, echo_datagrams, &fd) == 0);
    for (int number = 1; number < PORTS; number++) {
        ports[number] = publish_udp(&server, datagram_socket(&fronts[number]));
        CHECK(ports[number] != NULL);
    }
    for (unsigned number = 0; number < UDP_CLIENTS; number++) {
        clients[number] = (struct client){&fronts[number % PORTS], number + 1, number % PORTS == 0};
        CHECK(pthread_create(&ids[number], NULL, ask_datagrams, &clients[number]) == 0);
    }
    const struct core_end nowhere = {.family = AF_INET, .address = {192, 0, 2, 1}};
    for (int times = 0; times < 50; times++) {
        struct port *again = publish_udp(&server, dup(moving));
        CHECK(again != NULL && core_exclude(core, &nowhere, times % 2) == 0);
        usleep(2000);
        remove_port(again);
    }
    close(moving);
    for (unsigned number = 0; number < UDP_CLIENTS; number++)
        pthread_join(ids[number], NULL);
    for (int number = 1; number < PORTS; number++) {
        struct core_counters counters = read_counters(ports[number]);
        CHECK(counters.connections > 0 && counters.active <= MOST_CLIENTS && counters.lost == 0);
        CHECK(counters.down_bytes > 0 && counters.down_bytes <= counters.up_bytes);
        remove_port(ports[number]);
    }
    CHECK(sendto(fd, "", 0, 0, (struct sockaddr *)&server, sizeof server) == 0);
    pthread_join(serving, NULL);
    close(fd);
}

/* Without watches new clients are lost, and are served as soon as there are some. */
static void no_watches_for_datagrams(void)
{
    struct sockaddr_in server, front, ignored;
    char byte;
    int backend = datagram_socket(&server), client = datagram_socket(&ignored);
    struct port *port = publish_udp(&server, datagram_socket(&front));
    watches_left = 0;
    CHECK(sendto(client, "x", 1, 0, (struct sockaddr *)&front, sizeof front) == 1);
    CHECK(expect(NOTE_UDP_CLIENT_LOST).error == ENOSPC);
    CHECK(publish_udp(&server, datagram_socket(&ignored)) == NULL && errno == ENOSPC);
    watches_left = -1;
    CHECK(sendto(client, "y", 1, 0, (struct sockaddr *)&front, sizeof front) == 1);
    CHECK(recv(backend, &byte, 1, 0) == 1 && byte == 'y');
    CHECK(read_counters(port).lost == 1 && read_counters(port).active == 1);
    remove_port(port);
    close(backend);
    close(client);
}

int main(void)
{
    const struct core_settings settings = {
        .threads = THREADS, .keepalive_s = 15, .connect_timeout_ms = 10000, .udp_timeout_s = 1, .udp_clients = 20,
        .udp_clients_per_port = MOST_CLIENTS, .icmp = -1, .icmp6 = -1,
    };
    struct sockaddr_in server;
    pthread_t serving;
    int listener = listening(&server);
    CHECK(pthread_create(&serving, NULL, echo_server, &listener) == 0);
    core = core_start(&settings);
    CHECK(core != NULL);
    refused();
    no_watches(&server);
    no_pipes(&server);
    crowd(&server);
    no_watches_for_datagrams();
    datagrams();
    core_stop(core);
    shutdown(listener, SHUT_RDWR);
    pthread_join(serving, NULL);
    close(listener);
    return 0;
}
