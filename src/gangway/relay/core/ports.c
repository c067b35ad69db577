/* What Python calls: ports, entrances, notes.  How threads find a port, and who frees it. */
#include "parts.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* Notes */

void note(struct core *core, const struct core_note *note)
{
    bool was_empty;
    pthread_mutex_lock(&core->notes_lock);
    was_empty = core->note_count == 0;
    if (was_empty || (core->note_count < NOTES && memcmp(&core->notes[core->note_count - 1], note, sizeof *note) != 0))
        core->notes[core->note_count++] = *note;
    pthread_mutex_unlock(&core->notes_lock);
    if (was_empty)                                 /* else Python has been told, and has not read them yet */
        eventfd_write(core->notes_fd, 1);
}

/* Note what has become of an attempt to reach a port's container, or to answer from `host_port`. */
void note_backend(struct core *core, const struct port *port, uint16_t backend_port, enum core_note_kind kind, int error,
                  uint16_t host_port)
{
    struct core_note about = {.end = port->settings.backend, .kind = (int32_t)kind, .error = error, .host_port = host_port};
    about.end.port = backend_port;
    about.protocol = port->settings.protocol;
    note(core, &about);
}

int core_notes_fd(const struct core *core)
{
    return core->notes_fd;
}

static void free_port(struct port *port)
{
    if (port->raw >= 0)
        close(port->raw);
    free(port->outlets);
    free((void *)port->settings.admitted);
    free(port);
}

int core_read_notes(struct core *core, struct core_note *notes, int most)
{
    int count = 0;
    eventfd_t ignored;
    eventfd_read(core->notes_fd, &ignored);
    pthread_mutex_lock(&core->notes_lock);
    for (; count < most && core->removed != NULL; count++) {
        struct port *port = core->removed;
        core->removed = port->next_removed;
        notes[count] = (struct core_note){.port = (uint64_t)(uintptr_t)port, .kind = NOTE_PORT_REMOVED};
        free_port(port);
    }
    unsigned taken = core->note_count < (unsigned)(most - count) ? core->note_count : (unsigned)(most - count);
    memcpy(notes + count, core->notes, taken * sizeof *notes);
    core->note_count -= taken;
    memmove(core->notes, core->notes + taken, core->note_count * sizeof *notes);
    bool is_more = core->removed != NULL || core->note_count > 0;
    pthread_mutex_unlock(&core->notes_lock);
    if (is_more)
        eventfd_write(core->notes_fd, 1);
    return count + (int)taken;
}

/* References */

void release_port(struct core *core, struct port *port)
{
    if (atomic_fetch_sub(&port->references, 1) > 1)
        return;
    if (port->was_refused) {
        free_port(port);
        return;
    }
    pthread_mutex_lock(&core->notes_lock);
    port->next_removed = core->removed;
    core->removed = port;
    pthread_mutex_unlock(&core->notes_lock);
    eventfd_write(core->notes_fd, 1);
}

void release_entrance(struct core *core, struct entrance *entrance)
{
    if (atomic_fetch_sub(&entrance->references, 1) > 1)
        return;
    close(entrance->fd);
    if (entrance->binding != NULL)
        munmap((void *)(uintptr_t)entrance->binding, sizeof *entrance->binding);
    if (entrance->port != NULL)
        release_port(core, entrance->port);
    free(entrance);
}

/* Put a letter into the inbox of each thread. */
void tell_all(struct core *core, struct letter *letter)
{
    for (unsigned number = 0; number < core->thread_count; number++) {
        struct thread *thread = core->threads[number];
        letter->next[number] = NULL;
        pthread_mutex_lock(&thread->lock);
        *thread->last_letter = letter;
        thread->last_letter = &letter->next[number];
        pthread_mutex_unlock(&thread->lock);
        wake(thread);
    }
}

/* Look-up */

static int compare(const struct core_port_settings *one, const struct core_port_settings *other)
{
    if (one->protocol != other->protocol)
        return one->protocol < other->protocol ? -1 : 1;
    if (one->host.family != other->host.family)
        return one->host.family < other->host.family ? -1 : 1;
    if (one->host.zone != other->host.zone)
        return one->host.zone < other->host.zone ? -1 : 1;
    int order = memcmp(one->host.address, other->host.address, sizeof one->host.address);
    return order != 0 ? order : (int)one->host.port - (int)other->host.port;
}

static bool is_same_address(const struct core_port_settings *one, const struct core_port_settings *other)
{
    struct core_port_settings there = *one;
    there.host.port = other->host.port;
    return compare(&there, other) == 0;
}

/* Return how many ports come before `wanted`, itself included if it is there. */
static size_t position(const struct core *core, const struct core_port_settings *wanted)
{
    size_t low = 0, high = core->port_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (compare(&core->ports[middle]->settings, wanted) <= 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Return the port whose range holds the host address and port of `wanted`. */
static struct port *find(const struct core *core, const struct core_port_settings *wanted)
{
    size_t at = position(core, wanted);
    struct port *found = at == 0 ? NULL : core->ports[at - 1];
    if (found == NULL || !is_same_address(&found->settings, wanted))
        return NULL;
    return wanted->host.port <= found->settings.last ? found : NULL;
}

/* Return the address and port in a socket address; IPv4 if they are mapped into IPv6. */
struct core_end end_of(const struct name *name)
{
    const struct sockaddr_in *ipv4 = &name->as.ipv4;
    const struct sockaddr_in6 *ipv6 = &name->as.ipv6;
    if (name->as.any.sa_family == AF_INET) {
        struct core_end end = {.family = AF_INET, .port = ntohs(ipv4->sin_port)};
        memcpy(end.address, &ipv4->sin_addr, 4);
        return end;
    }
    struct core_end end = {.family = AF_INET6, .port = ntohs(ipv6->sin6_port), .zone = ipv6->sin6_scope_id};
    if (IN6_IS_ADDR_V4MAPPED(&ipv6->sin6_addr)) {
        end.family = AF_INET;
        memcpy(end.address, ipv6->sin6_addr.s6_addr + 12, 4);
    } else {
        memcpy(end.address, &ipv6->sin6_addr, 16);
    }
    return end;
}

/* Return the socket address of an address and a port. */
struct name name_of(const struct core_end *end, uint16_t port)
{
    struct name name = {0};
    if (end->family == AF_INET) {
        name.as.ipv4 = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
        memcpy(&name.as.ipv4.sin_addr, end->address, 4);
        name.size = sizeof name.as.ipv4;
    } else {
        name.as.ipv6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_scope_id = end->zone};
        memcpy(&name.as.ipv6.sin6_addr, end->address, 16);
        name.size = sizeof name.as.ipv6;
    }
    return name;
}

/* True if the addresses are the same, whatever the ports and zones are. */
bool have_same_address(const struct core_end *one, const struct core_end *other)
{
    return one->family == other->family && memcmp(one->address, other->address, sizeof one->address) == 0;
}

bool is_excluded(const struct core *core, const struct core_end *at)
{
    for (uint32_t number = 0; number < core->excluded_count; number++)
        if (have_same_address(&core->excluded[number], at))
            return true;
    return false;
}

/* Return the port that serves a host address and port, or all addresses of its family. */
static struct port *find_shared(const struct core *core, uint16_t protocol, const struct core_end *host)
{
    struct core_port_settings wanted = {.protocol = protocol, .host = *host};
    struct port *port = find(core, &wanted);
    if (port != NULL)
        return port;
    memset(wanted.host.address, 0, sizeof wanted.host.address);
    wanted.host.zone = 0;
    return find(core, &wanted);
}

/* Return the port of an entrance for a client that came to `host`, and the container's port for it; release it
   afterwards.  NULL: it is unpublished, or the address is excluded. */
struct port *acquire_port(struct core *core, const struct entrance *entrance, const struct core_end *host,
                          uint16_t *backend_port)
{
    struct port *port = entrance->port;
    pthread_rwlock_rdlock(&core->lock);
    if (port == NULL) {
        port = find_shared(core, entrance->protocol, host);
        *backend_port = port == NULL ? 0 : (uint16_t)(port->settings.backend.port + host->port - port->settings.host.port);
    } else {
        *backend_port = port->settings.backend.port;
        if (entrance->is_anywhere && is_excluded(core, host))
            port = NULL;
    }
    if (port != NULL)
        atomic_fetch_add(&port->references, 1);
    pthread_rwlock_unlock(&core->lock);
    return port;
}

/* Ports and entrances */

/* Add a port to the array; return an errno, EEXIST if its range overlaps another one. */
static int insert(struct core *core, struct port *port)
{
    const struct core_port_settings *settings = &port->settings;
    size_t at = position(core, settings);
    const struct core_port_settings *before = at > 0 ? &core->ports[at - 1]->settings : NULL;
    const struct core_port_settings *after = at < core->port_count ? &core->ports[at]->settings : NULL;
    if (before != NULL && is_same_address(before, settings) && before->last >= settings->host.port)
        return EEXIST;
    if (after != NULL && is_same_address(after, settings) && after->host.port <= settings->last)
        return EEXIST;
    if (core->port_count == core->port_room) {
        size_t room = core->port_room == 0 ? 64 : core->port_room * 2;
        struct port **grown = realloc(core->ports, room * sizeof *grown);
        if (grown == NULL)
            return ENOMEM;
        core->ports = grown;
        core->port_room = room;
    }
    memmove(core->ports + at + 1, core->ports + at, (core->port_count - at) * sizeof *core->ports);
    core->ports[at] = port;
    core->port_count++;
    return 0;
}

static void take_out(struct core *core, struct port *port)
{
    size_t at = position(core, &port->settings) - 1;
    core->port_count--;
    memmove(core->ports + at, core->ports + at + 1, (core->port_count - at) * sizeof *core->ports);
}

/* The thread that serves a socket for datagrams: a shared one is always the same thread's, also if it is passed again. */
static struct thread *choose_home(struct core *core, bool is_shared, int family)
{
    unsigned number = is_shared ? family != AF_INET : core->homes++;
    return core->threads[number % core->thread_count];
}

static void prepare_listener(const struct core *core, const struct entrance *entrance)
{
    fcntl(entrance->fd, F_SETFL, fcntl(entrance->fd, F_GETFL) | O_NONBLOCK);   /* all threads may go for the same client */
    disable_delay(entrance->fd, entrance->protocol);
    enable_keepalive(entrance->fd, entrance->protocol, (int)core->settings.keepalive_s);
}

/* Map the variable; NULL: errno.  A file that is too short could be mapped, but not read: a map is none. */
static _Atomic uint64_t *map_binding(int binding)
{
    struct stat status;
    if (fstat(binding, &status) < 0)
        return NULL;
    if (S_ISREG(status.st_mode) && status.st_size < (off_t)sizeof(uint64_t)) {
        errno = EINVAL;
        return NULL;
    }
    void *mapped = mmap(NULL, sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED, binding, 0);
    return mapped == MAP_FAILED ? NULL : mapped;
}

/* Return an entrance that nobody waits at yet; NULL: errno, and the socket is closed. */
static struct entrance *make_entrance(struct core *core, int fd, struct port *port, int binding)
{
    struct entrance *entrance = calloc(1, sizeof *entrance);
    struct name name = {.size = sizeof name.as};
    int protocol = 0;
    socklen_t size = sizeof protocol;
    getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size);
    bool is_udp = protocol == IPPROTO_UDP;
    if (entrance == NULL || getsockname(fd, &name.as.any, &name.size) < 0)
        goto failed;
    const struct core_end end = end_of(&name);
    static const uint8_t anywhere[16];
    *entrance = (struct entrance){
        .letter.kind = LETTER_ENTRANCE_CLOSED, .leaving.kind = LETTER_ENTRANCE_LEFT,
        .port = port, .fd = fd, .protocol = (uint16_t)protocol,
        .host_port = port == NULL ? 0 : end.port, .is_anywhere = memcmp(end.address, anywhere, sizeof anywhere) == 0,
        .home = is_udp ? choose_home(core, port == NULL, end.family) : NULL,
        .binding = binding < 0 ? NULL : map_binding(binding),
    };
    if (binding >= 0 && entrance->binding == NULL)
        goto failed;
    if (is_udp && prepare_receiver(fd, end.family, port == NULL) < 0)
        goto failed;
    if (!is_udp)
        prepare_listener(core, entrance);
    atomic_init(&entrance->family, port == NULL ? end.family : port->settings.backend.family);
    atomic_init(&entrance->references, core->thread_count);
    return entrance;
failed:;
    int error = errno;
    close(fd);
    if (entrance != NULL && entrance->binding != NULL)
        munmap((void *)(uintptr_t)entrance->binding, sizeof *entrance->binding);
    free(entrance);
    errno = error;
    return NULL;
}

/* Have the threads wait at a socket; NULL: errno, and the socket is closed. */
static struct entrance *listen_at(struct core *core, int fd, struct port *port, int binding)
{
    struct entrance *entrance = make_entrance(core, fd, port, binding);
    int error = 0;
    if (entrance == NULL)
        return NULL;
    if (port != NULL) {
        atomic_fetch_add(&port->references, 1);
        port->only.fd = port->raw < 0 ? fd : port->raw;
    }
    for (unsigned number = 0; number < core->thread_count; number++) {
        enum watched watched = entrance->home != NULL ? WATCHED_RECEIVER : WATCHED_ENTRANCE;
        entrance->watches[number] = (struct watch){.watched = watched, .entrance = entrance};
        link_init(&entrance->watches[number].paused);
    }
    for (unsigned number = 0; number < core->thread_count && error == 0; number++)
        if (entrance->home == NULL || entrance->home == core->threads[number])
            error = watch_entrance(core->threads[number], &entrance->watches[number]) < 0 ? errno : 0;
    if (error == 0)
        return entrance;
    core_close_entrance(core, entrance);
    errno = error;
    return NULL;
}

struct entrance *core_listen(struct core *core, int fd, int binding)
{
    return listen_at(core, fd, NULL, binding);
}

void core_close_entrance(struct core *core, struct entrance *entrance)
{
    atomic_store(&entrance->is_closed, true);
    tell_all(core, &entrance->letter);
}

void core_leave_entrance(struct core *core, struct entrance *entrance)
{
    tell_all(core, &entrance->leaving);
}

void core_leave_port(struct core *core, struct port *port)
{
    if (port->entrance != NULL)
        core_leave_entrance(core, port->entrance);
}

/* Return a port that nobody can find yet; NULL: there is no memory. */
static struct port *make_port(const struct core_port_settings *settings, int raw)
{
    struct port *port = calloc(1, sizeof *port);
    size_t bytes = settings->admitted_count * sizeof *settings->admitted;
    struct core_subnet *admitted = malloc(bytes + 1);
    if (port == NULL || admitted == NULL) {
        free(port);
        free(admitted);
        return NULL;
    }
    if (bytes > 0)
        memcpy(admitted, settings->admitted, bytes);
    port->settings = *settings;
    port->settings.admitted = admitted;
    port->letter.kind = LETTER_PORT_REMOVED;
    port->raw = port->only.fd = raw;
    link_init(&port->clients);
    link_init(&port->with_clients);
    atomic_init(&port->references, 1);
    return port;
}

/* Have all threads reset their flows of a port that no client finds any more. */
static void reset_flows(struct core *core, struct port *port)
{
    atomic_store(&port->is_removed, true);
    if (atomic_load(&port->references) > 1) {
        atomic_fetch_add(&port->references, core->thread_count);
        tell_all(core, &port->letter);
    }
    release_port(core, port);
}

static void close_if_open(int fd)
{
    if (fd >= 0)
        close(fd);
}

static int add_shared(struct core *core, struct port *port)
{
    pthread_rwlock_wrlock(&core->lock);
    int error = insert(core, port);
    pthread_rwlock_unlock(&core->lock);
    return error;
}

struct port *core_add_port(struct core *core, const struct core_port_settings *settings, int fd, int raw)
{
    struct port *port = make_port(settings, raw);
    if (port == NULL) {
        close_if_open(fd);
        close_if_open(raw);
        errno = ENOMEM;
        return NULL;
    }
    int error;
    if (fd >= 0) {
        port->entrance = listen_at(core, fd, port, -1);
        error = port->entrance == NULL ? errno : 0;
    } else {
        error = add_shared(core, port);
    }
    if (error == 0)
        return port;
    port->was_refused = true;
    reset_flows(core, port);                       /* some threads may have accepted clients already */
    errno = error;
    return NULL;
}

void core_remove_port(struct core *core, struct port *port)
{
    struct entrance *entrance = port->entrance;
    if (entrance != NULL) {
        atomic_store(&entrance->is_closed, true);
    } else {
        pthread_rwlock_wrlock(&core->lock);        /* threads acquire ports under it: those that do so are done now */
        take_out(core, port);
        pthread_rwlock_unlock(&core->lock);
    }
    reset_flows(core, port);                       /* before the entrance is closed: UDP clients are answered from it */
    if (entrance != NULL)
        tell_all(core, &entrance->letter);
}

void core_read_counters(const struct port *port, struct core_counters *counters)
{
    uint64_t *into = (uint64_t *)counters;
    for (size_t number = 0; number < sizeof port->counters / sizeof *port->counters; number++)
        into[number] = atomic_load_explicit(&port->counters[number], memory_order_relaxed);
}

int core_exclude(struct core *core, const struct core_end *addresses, uint32_t count)
{
    struct core_end *copy = malloc(count * sizeof *copy + 1);
    if (copy == NULL)
        return -1;
    memcpy(copy, addresses, count * sizeof *copy);
    pthread_rwlock_wrlock(&core->lock);
    struct core_end *former = core->excluded;
    core->excluded = copy;
    core->excluded_count = count;
    pthread_rwlock_unlock(&core->lock);
    free(former);
    atomic_fetch_add(&core->excluded_version, 1);
    for (unsigned number = 0; number < core->thread_count; number++)
        wake(core->threads[number]);
    return 0;
}
