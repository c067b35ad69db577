/* Starts the threads, and ends them. */
#include "parts.h"

#include <linux/netlink.h>
#include <signal.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/random.h>

uint64_t core_active(const struct core *core)
{
    uint64_t active = atomic_load_explicit(&core->client_count, memory_order_relaxed);
    for (unsigned number = 0; number < core->thread_count; number++)
        active += atomic_load_explicit(&core->threads[number]->flow_count, memory_order_relaxed);
    return active;
}

static struct thread *make_thread(struct core *core, unsigned number)
{
    struct thread *thread = calloc(1, sizeof *thread);
    if (thread == NULL)
        return NULL;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &thread->watched};
    thread->core = core;
    thread->number = number;
    thread->watched = WATCHED_WAKE;
    thread->last_letter = &thread->letters;
    pthread_mutex_init(&thread->lock, NULL);
    struct link *heads[] = {&thread->passed, &thread->flows, &thread->young, &thread->closing, &thread->soon, &thread->paused};
    for (size_t at = 0; at < sizeof heads / sizeof *heads; at++)
        link_init(heads[at]);
    thread->epoll = epoll_create1(EPOLL_CLOEXEC);
    thread->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    thread->routes = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    thread->datagrams = make_datagrams();
    thread->clients = make_clients(core->settings.udp_clients);
    if (thread->epoll < 0 || thread->wake < 0 || thread->routes < 0)
        return NULL;                               /* the process exits: nothing to clean up for */
    if (thread->datagrams == NULL || thread->clients == NULL)
        return NULL;
    return epoll_ctl(thread->epoll, EPOLL_CTL_ADD, thread->wake, &event) == 0 ? thread : NULL;
}

/* Start a thread that takes no signals: they are Python's. */
static int start_thread(struct thread *thread)
{
    char name[16];                                 /* with its end: pthread_setname_np(3) */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&thread->id, NULL, run_thread, thread);
    if (error == 0) {
        snprintf(name, sizeof name, "relay-%u", thread->number);
        pthread_setname_np(thread->id, name);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

struct core *core_start(const struct core_settings *settings)
{
    struct core *core = calloc(1, sizeof *core);
    pthread_rwlockattr_t writers_first;            /* many clients must not keep a port from being published */
    if (core == NULL)
        return NULL;
    core->settings = *settings;
    if (getrandom(&core->secret, sizeof core->secret, 0) < 0)
        return NULL;
    pthread_rwlockattr_init(&writers_first);
    pthread_rwlockattr_setkind_np(&writers_first, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&core->lock, &writers_first);
    pthread_rwlockattr_destroy(&writers_first);
    pthread_mutex_init(&core->notes_lock, NULL);
    pthread_mutex_init(&core->binding_lock, NULL);
    core->notes_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (core->notes_fd < 0)
        return NULL;
    for (unsigned number = 0; number < settings->threads && number < MAX_THREADS; number++) {
        core->threads[number] = make_thread(core, number);
        if (core->threads[number] == NULL)
            return NULL;
        core->thread_count++;
    }
    for (unsigned number = 0; number < core->thread_count; number++) {
        int error = start_thread(core->threads[number]);
        if (error != 0) {
            errno = error;
            return NULL;
        }
    }
    return core;
}

static void free_thread(struct thread *thread)
{
    while (!link_empty(&thread->passed)) {
        struct flow *flow = OWNER(thread->passed.next, struct flow, all);
        link_remove(&flow->all);
        reset_on_close(flow->client.fd);
        abandon_flow(thread, flow);
    }
    while (thread->spares > 0)
        close_pipe(&thread->spare[--thread->spares]);
    close(thread->epoll);
    close(thread->wake);
    close(thread->routes);
    pthread_mutex_destroy(&thread->lock);
    free(thread->datagrams);
    free(thread->clients);
    free(thread);
}

void core_stop(struct core *core)
{
    struct letter stop = {.kind = LETTER_STOP};
    struct core_note note;
    tell_all(core, &stop);
    for (unsigned number = 0; number < core->thread_count; number++)
        pthread_join(core->threads[number]->id, NULL);
    for (unsigned number = 0; number < core->thread_count; number++)
        free_thread(core->threads[number]);
    while (core_read_notes(core, &note, 1) > 0)
        ;
    close(core->settings.icmp);
    close(core->settings.icmp6);
    pthread_rwlock_destroy(&core->lock);
    pthread_mutex_destroy(&core->notes_lock);
    pthread_mutex_destroy(&core->binding_lock);
    close(core->notes_fd);
    free(core->ports);
    free(core->excluded);
    free(core);
}
