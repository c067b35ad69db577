/* Accepts connections at entrances.

   Entrances are level-triggered: one client for each report, so a long queue shares the thread with all other sockets.
   A thread that has reached a limit pauses: it accepts nobody there until one of its flows has ended, or RETRY_MS later. */
#include "parts.h"

enum { RETRY_MS = 100 };

/* Have a thread wait at an entrance; -1: errno. */
int watch_entrance(struct thread *thread, struct watch *watch)
{
    uint32_t exclusive = watch->watched == WATCHED_ENTRANCE ? EPOLLEXCLUSIVE : 0;
    struct epoll_event event = {.events = EPOLLIN | exclusive, .data.ptr = watch};
    return epoll_ctl(thread->epoll, EPOLL_CTL_ADD, watch->entrance->fd, &event);
}

static void pause_accepting(struct thread *thread, struct watch *watch)
{
    epoll_ctl(thread->epoll, EPOLL_CTL_DEL, watch->entrance->fd, NULL);
    link_append(&thread->paused, &watch->paused);
    if (thread->resume_ms == 0)
        thread->resume_ms = clock_ms() + RETRY_MS;
}

/* Wait at all paused entrances again. */
void resume_accepting(struct thread *thread)
{
    struct link waiting;
    link_init(&waiting);
    link_move_all(&thread->paused, &waiting);
    thread->resume_ms = 0;
    while (!link_empty(&waiting)) {
        struct watch *watch = OWNER(waiting.next, struct watch, paused);
        link_remove(&watch->paused);
        if (watch_entrance(thread, watch) < 0) {
            link_append(&thread->paused, &watch->paused);
            thread->resume_ms = clock_ms() + RETRY_MS;
        }
    }
}

/* True for a while after a client was lost: the next ones wait in the kernel's queue. */
static bool is_starved(struct core *core)
{
    int64_t until_ms = atomic_load_explicit(&core->starved_until_ms, memory_order_relaxed);
    if (until_ms == 0 || clock_ms() < until_ms)
        return until_ms != 0;
    atomic_store_explicit(&core->starved_until_ms, 0, memory_order_relaxed);
    return false;
}

/* Report an accepted client that cannot be served, and accept no other for a while. */
void lose_client(struct core *core, struct port *port, int error)
{
    count(&COUNTER(port, lost), 1);
    note(core, &(struct core_note){.kind = NOTE_CLIENT_LOST, .error = error});
    atomic_store_explicit(&core->starved_until_ms, clock_ms() + RETRY_MS, memory_order_relaxed);
}

/* Return a new socket for a container; -1: errno. */
static int open_backend(uint16_t family, uint16_t protocol)
{
    return socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol);
}

/* A socket for a container, made before its family is known for certain. */
struct backend {
    int fd;
    uint16_t family;
};

/* Reset a client; for it it is as if nobody listened. */
static void refuse(struct core *core, struct port *port, int client)
{
    reset_on_close(client);
    close(client);
    if (port != NULL)
        release_port(core, port);
}

/* Serve a client of a port, which is acquired. */
static void serve(struct thread *thread, struct entrance *entrance, struct port *port, uint16_t backend_port, int client,
                  struct backend backend)
{
    uint16_t family = port->settings.backend.family;
    if (family != backend.family) {
        atomic_store_explicit(&entrance->family, family, memory_order_relaxed);
        close(backend.fd);
        backend.fd = open_backend(family, entrance->protocol);
    }
    struct flow *flow = backend.fd < 0 ? NULL : make_flow(port, backend_port, client, backend.fd);
    if (flow != NULL) {
        assign_flow(thread, flow);
        return;
    }
    lose_client(thread->core, port, errno);
    if (backend.fd >= 0)
        close(backend.fd);
    refuse(thread->core, port, client);
}

/* Return the port that a client was accepted for; NULL: there is none, or the client has ended. */
static struct port *port_of_client(struct core *core, const struct entrance *entrance, int client, uint16_t *backend_port)
{
    struct core_end host = {0};                    /* asked for only if the port, or whether there is one, depends on it */
    if (entrance->port == NULL || (entrance->is_anywhere && core->excluded_count > 0)) {
        struct name local = {.size = sizeof local.as};
        if (getsockname(client, &local.as.any, &local.size) < 0)
            return NULL;
        host = end_of(&local);
    }
    return acquire_port(core, entrance, &host, backend_port);
}

/* True if a port is for a client; false also if the client has ended, and the port is not for everybody. */
static bool may_connect(const struct thread *thread, const struct port *port, int client)
{
    struct name peer = {.size = sizeof peer.as};
    if (port->settings.admitted_count == 0)
        return true;
    if (getpeername(client, &peer.as.any, &peer.size) < 0)
        return false;
    const struct core_end end = end_of(&peer);
    return is_admitted(thread, port, &end);
}

/* Find the port of a client that was accepted at an entrance, and serve it. */
static void receive(struct thread *thread, struct entrance *entrance, int client, struct backend backend)
{
    uint16_t backend_port;
    struct port *port = port_of_client(thread->core, entrance, client, &backend_port);
    if (port != NULL && may_connect(thread, port, client)) {
        serve(thread, entrance, port, backend_port, client, backend);
        return;
    }
    /* Unpublished while the client waited, at an excluded address, or not for this client. */
    close(backend.fd);
    if (port != NULL)
        count(&COUNTER(port, not_admitted), 1);
    refuse(thread->core, port, client);
}

/* True if accept failed because there is no client: another thread was faster, or it has ended (accept(2)). */
static bool is_nobody(int error)
{
    static const int errors[] = {EAGAIN, EINTR, ECONNABORTED, EPROTO, ENETDOWN, ENOPROTOOPT, EHOSTDOWN, ENONET,
                                 EHOSTUNREACH, EOPNOTSUPP, ENETUNREACH, ETIMEDOUT, EPERM};
    for (size_t number = 0; number < sizeof errors / sizeof *errors; number++)
        if (errors[number] == error)
            return true;
    return false;
}

/* Accept a client, and return 0; an errno if that failed, EAGAIN if there is none. */
static int accept_one(struct thread *thread, struct entrance *entrance)
{
    struct backend backend = {.family = atomic_load_explicit(&entrance->family, memory_order_relaxed)};
    backend.fd = open_backend(backend.family, entrance->protocol);
    if (backend.fd < 0)
        return errno;
    int client = accept4(entrance->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (client >= 0) {
        receive(thread, entrance, client, backend);
        return 0;
    }
    int error = is_nobody(errno) ? EAGAIN : errno;
    close(backend.fd);
    return error;
}

/* Accept a client, if there is one and the process has descriptors for it. */
void accept_client(struct thread *thread, struct watch *watch)
{
    if (atomic_load(&watch->entrance->is_closed))
        return;
    if (is_starved(thread->core)) {
        pause_accepting(thread, watch);
        return;
    }
    int error = accept_one(thread, watch->entrance);
    if (error != 0 && error != EAGAIN) {
        note(thread->core, &(struct core_note){.kind = NOTE_CLIENTS_WAIT, .error = error});
        pause_accepting(thread, watch);
    }
}

/* Stop waiting at an entrance. */
void forget_entrance(struct thread *thread, struct watch *watch)
{
    if (link_is_free(&watch->paused))
        epoll_ctl(thread->epoll, EPOLL_CTL_DEL, watch->entrance->fd, NULL);
    else
        link_remove(&watch->paused);
}

/* Stop waiting at an entrance where another epoll set waits, too, perhaps another process's.  For each client the kernel has
   woken one of the two only (EPOLLEXCLUSIVE), so those that this one was woken for have to be accepted.  Later ones wake the
   other. */
void leave_entrance(struct thread *thread, struct watch *watch)
{
    forget_entrance(thread, watch);
    while (watch->watched == WATCHED_ENTRANCE && accept_one(thread, watch->entrance) == 0)
        ;
}
