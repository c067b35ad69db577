/* The clients of UDP ports: how a thread knows them again, and when it forgets them.

   A client has two places in lists that are ordered by when it was last heard of: one of all the thread's clients, one of
   its port's.  Time is counted in ticks of a second, so a datagram moves its client to the end once a second at most.

   Too many.  A port at its limit forgets its own client that was silent longest.  At the limit of all ports, or without
   descriptors, one of the thread's port with the most clients is forgotten: whoever sends to some ports from many addresses
   makes no client of another port be forgotten. */
#include "parts.h"

#include <netinet/udp.h>

enum { TICK_MS = 1000, MOST_REFUSALS = 100 };

struct clients {
    struct link by_age, removed;
    struct link ports;                             /* those that have clients */
    unsigned port_count;                           /* of them */
    uint32_t tick;
    unsigned refusals;                             /* reported in this tick */
    size_t client_count;
    size_t bucket_count;                           /* a power of two: as many as clients are allowed, or more */
    struct client *buckets[];                      /* the hash table */
};

/* The table */

/* Hash words with a secret: multiply, and fold the halves of the product. */
static uint64_t hash_of(uint64_t secret, const struct client_key *key)
{
    uint64_t words[sizeof *key / sizeof(uint64_t)], hash = secret;
    memcpy(words, key, sizeof words);
    for (size_t number = 0; number < sizeof words / sizeof *words; number++) {
        unsigned __int128 product = (unsigned __int128)(hash ^ words[number]) * (secret | 1);
        hash = (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    return hash;
}

static struct client **bucket_of(struct clients *clients, uint64_t hash)
{
    return &clients->buckets[hash & (clients->bucket_count - 1)];
}

static void insert(struct clients *clients, struct client *client)
{
    struct client **bucket = bucket_of(clients, client->hash);
    client->next = *bucket;
    *bucket = client;
    clients->client_count++;
}

static void take_out(struct clients *clients, const struct client *client)
{
    struct client **at = bucket_of(clients, client->hash);
    while (*at != client)
        at = &(*at)->next;
    *at = client->next;
    clients->client_count--;
}

/* Return the client with a key, or NULL; its hash in both cases. */
struct client *find_client(struct thread *thread, const struct client_key *key, uint64_t *hash)
{
    *hash = hash_of(thread->core->secret, key);
    for (struct client *one = *bucket_of(thread->clients, *hash); one != NULL; one = one->next)
        if (one->hash == *hash && memcmp(&one->key, key, sizeof *key) == 0)
            return one;
    return NULL;
}

/* The order */

/* A datagram of the client is moved: it is heard of in this tick. */
void touch(struct thread *thread, struct client *client)
{
    if (client->tick == thread->clients->tick)
        return;
    client->tick = thread->clients->tick;
    link_remove(&client->by_age);
    link_append(&thread->clients->by_age, &client->by_age);
    link_remove(&client->of_port);
    link_append(&client->port->clients, &client->of_port);
}

static void add_to_port(struct thread *thread, struct client *client)
{
    struct port *port = client->port;
    link_append(&thread->clients->by_age, &client->by_age);
    link_append(&port->clients, &client->of_port);
    if (port->client_count++ == 0) {
        link_append(&thread->clients->ports, &port->with_clients);
        thread->clients->port_count++;
    }
    count(&COUNTER(port, connections), 1);
    count(&COUNTER(port, active), 1);
    atomic_fetch_add_explicit(&thread->core->client_count, 1, memory_order_relaxed);
}

/* Forget a client; its sockets are closed after the batch. */
static void forget_client(struct thread *thread, struct client *client)
{
    struct port *port = client->port;
    client->is_removed = true;
    take_out(thread->clients, client);
    link_remove(&client->by_age);
    link_remove(&client->of_port);
    link_append(&thread->clients->removed, &client->by_age);
    if (--port->client_count == 0) {
        link_remove(&port->with_clients);
        thread->clients->port_count--;
    }
    atomic_fetch_sub_explicit(&COUNTER(port, active), 1, memory_order_relaxed);
    atomic_fetch_sub_explicit(&thread->core->client_count, 1, memory_order_relaxed);
}

/* Forget the client of a port that was silent longest; NULL: it has none. */
static struct client *evict(struct thread *thread, struct port *port)
{
    if (link_empty(&port->clients))
        return NULL;
    struct client *client = OWNER(port->clients.next, struct client, of_port);
    count(&COUNTER(port, evicted), 1);
    forget_client(thread, client);
    return client;
}

/* The thread's port with the most clients; `port` if it has more than its share, which is mostly so in a flood. */
static struct port *largest(struct thread *thread, struct port *port)
{
    const struct clients *clients = thread->clients;
    if ((size_t)port->client_count * clients->port_count > clients->client_count)
        return port;
    for (struct link *one = clients->ports.next; one != &clients->ports; one = one->next) {
        struct port *other = OWNER(one, struct port, with_clients);
        if (other->client_count > port->client_count)
            port = other;
    }
    return port;
}

static void make_room(struct thread *thread, struct port *port)
{
    const struct core_settings *settings = &thread->core->settings;
    if (port->client_count >= settings->udp_clients_per_port)
        evict(thread, port);
    else if (atomic_load_explicit(&thread->core->client_count, memory_order_relaxed) >= settings->udp_clients)
        evict(thread, largest(thread, port));
}

/* New clients */

/* Return a socket for a client of a port; without descriptors another client is forgotten, and its socket closed. */
int open_udp(struct thread *thread, struct port *port, int family)
{
    const int kind = SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
    int fd = socket(family, kind, 0);
    if (fd >= 0 || (errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM))
        return fd;
    int error = errno;
    struct client *oldest = evict(thread, largest(thread, port));
    if (oldest == NULL) {
        errno = error;
        return -1;
    }
    close(oldest->fd);                             /* an event that it has left finds `is_removed` */
    oldest->fd = -1;
    return socket(family, kind, 0);
}

/* Give a socket a local port; EAGAIN: none is free. */
static int bind_backend(int fd, int family)
{
    const struct core_end anywhere = {.family = (uint16_t)family};
    const struct name name = name_of(&anywhere, 0);
    int done = bind(fd, &name.as.any, name.size);
    if (done < 0 && errno == EADDRINUSE)
        errno = EAGAIN;
    return done;
}

/* Prepare a socket for a container, which may also answer from another port: so it is not connected. */
static int prepare_backend(struct thread *thread, struct client *client)
{
    const struct core_end *to = &client->port->settings.backend;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
    bool is_ipv4 = to->family == AF_INET;
    int on = 1;
    setsockopt(client->fd, is_ipv4 ? IPPROTO_IP : IPPROTO_IPV6, is_ipv4 ? IP_RECVERR : IPV6_RECVERR, &on, sizeof on);
    if (client->port->raw < 0)                     /* each of its answers needs a header */
        setsockopt(client->fd, IPPROTO_UDP, UDP_GRO, &on, sizeof on);
    if (bind_backend(client->fd, to->family) < 0)
        return -1;
    return epoll_ctl(thread->epoll, EPOLL_CTL_ADD, client->fd, &event);
}

static struct client *new_client(struct port *port, uint16_t backend_port, const struct client_key *key, uint64_t hash,
                                 const struct name *name)
{
    struct client *client = calloc(1, sizeof *client);
    if (client == NULL)
        return NULL;
    client->watched = WATCHED_CLIENT;
    client->fd = -1;
    client->hash = hash;
    client->key = *key;
    client->port = port;
    client->backend_port = backend_port;
    client->burst = 1;
    client->container = name_of(&port->settings.backend, backend_port);
    client->name = port->raw < 0 ? *name : name_of(&key->from, 0);   /* raw(7): no port */
    client->origin_bytes = write_origin(key, client->origin);
    link_init(&client->by_age);
    link_init(&client->of_port);
    return client;
}

/* Give a client its sockets and its places; -1: errno, and it has none. */
static int open_client(struct thread *thread, struct entrance *entrance, struct client *client)
{
    struct port *port = client->port;
    make_room(thread, port);
    client->fd = open_udp(thread, port, port->settings.backend.family);
    client->outlet = client->fd < 0 ? NULL : acquire_outlet(thread, entrance, client);
    if (client->outlet == NULL)
        return -1;
    if (prepare_backend(thread, client) < 0) {
        int error = errno;
        release_outlet(client);
        errno = error;
        return -1;
    }
    client->tick = thread->clients->tick;
    insert(thread->clients, client);
    add_to_port(thread, client);
    if (thread->expire_ms == 0)
        thread->expire_ms = clock_ms() + TICK_MS;
    return 0;
}

/* Return a new client of an entrance; NULL: nothing is published there, the client is not admitted, or it is lost. */
struct client *make_client(struct thread *thread, struct entrance *entrance, const struct client_key *key, uint64_t hash,
                           const struct name *name)
{
    uint16_t backend_port;
    struct port *port = acquire_port(thread->core, entrance, &key->to, &backend_port);
    if (port == NULL)
        return NULL;
    if (atomic_load(&port->is_removed) || !is_admitted(thread, port, &key->from)) {
        count(&COUNTER(port, not_admitted), 1);
        release_port(thread->core, port);
        return NULL;
    }
    struct client *client = new_client(port, backend_port, key, hash, name);
    if (client != NULL && open_client(thread, entrance, client) == 0)
        return client;
    count(&COUNTER(port, lost), 1);
    note_backend(thread->core, port, backend_port, NOTE_UDP_CLIENT_LOST, errno, key->to.port);
    if (client != NULL && client->fd >= 0)
        close(client->fd);
    free(client);
    release_port(thread->core, port);
    return NULL;
}

/* The end */

/* Forget the thread's clients of a port; of all ports with NULL. */
void remove_clients(struct thread *thread, const struct port *port)
{
    for (struct link *one = thread->clients->by_age.next, *next; one != &thread->clients->by_age; one = next) {
        struct client *client = OWNER(one, struct client, by_age);
        next = one->next;
        if (port == NULL || client->port == port)
            forget_client(thread, client);
    }
}

/* Forget the clients that sent to addresses that nobody is served at any more. */
void remove_excluded(struct thread *thread)
{
    struct core *core = thread->core;
    unsigned version = atomic_load(&core->excluded_version);
    if (thread->excluded_seen == version)
        return;
    thread->excluded_seen = version;
    pthread_rwlock_rdlock(&core->lock);
    for (struct link *one = thread->clients->by_age.next, *next; one != &thread->clients->by_age; one = next) {
        struct client *client = OWNER(one, struct client, by_age);
        next = one->next;
        if (is_excluded(core, &client->key.to))
            forget_client(thread, client);
    }
    pthread_rwlock_unlock(&core->lock);
}

/* Close the sockets of the clients that are forgotten, and free them. */
void free_removed_clients(struct thread *thread)
{
    while (!link_empty(&thread->clients->removed)) {
        struct client *client = OWNER(thread->clients->removed.next, struct client, by_age);
        link_remove(&client->by_age);
        if (client->fd >= 0)
            close(client->fd);
        release_outlet(client);
        release_port(thread->core, client->port);
        free(client);
    }
}

/* Once a second while there are clients: forget those that have been silent for too long. */
void expire_clients(struct thread *thread, int64_t now_ms)
{
    struct clients *clients = thread->clients;
    clients->tick++;
    clients->refusals = 0;
    for (struct link *one = clients->by_age.next, *next; one != &clients->by_age; one = next) {
        struct client *client = OWNER(one, struct client, by_age);
        next = one->next;
        if (clients->tick - client->tick <= thread->core->settings.udp_timeout_s)
            break;
        forget_client(thread, client);
    }
    thread->expire_ms = now_ms + TICK_MS;
    if (link_empty(&clients->by_age)) {
        thread->expire_ms = 0;
        release_memory(thread->datagrams);
    }
}

/* True if a client may be told of a refusal: once in a tick, and not too many clients, as the kernel does with its own
   messages (icmp_ratelimit and icmp_msgs_per_sec in ip-sysctl.rst), which is asked for none of these. */
bool may_be_told(struct thread *thread, struct client *client)
{
    struct clients *clients = thread->clients;
    if (client->is_group || client->was_told_at == clients->tick + 1 || clients->refusals == MOST_REFUSALS)
        return false;
    client->was_told_at = clients->tick + 1;
    clients->refusals++;
    return true;
}

/* Return what a thread knows of its clients, of whom there are `most` in all threads; NULL: there is no memory. */
struct clients *make_clients(uint32_t most)
{
    size_t bucket_count = 1;
    while (bucket_count < most)
        bucket_count *= 2;
    struct clients *clients = calloc(1, sizeof *clients + bucket_count * sizeof *clients->buckets);
    if (clients == NULL)
        return NULL;
    clients->bucket_count = bucket_count;
    link_init(&clients->by_age);
    link_init(&clients->removed);
    link_init(&clients->ports);
    return clients;
}
