/* One thread: an epoll set, and the flows that it serves.

   Waking up costs more than polling again: some 20 µs until a core that was idle runs the thread, more on a virtual
   machine, and twice for every request and answer.  So after a short wait a thread polls for up to AWAKE_NS before it
   sleeps, and yields the core in between (sched_yield(2)).  A thread without traffic never does it. */
#include "parts.h"

#include <sched.h>
#include <sys/eventfd.h>
#include <time.h>

enum { AWAKE_NS = 100 * 1000 };

static int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t clock_ms(void)
{
    return clock_ns() / 1000000;
}

/* Have a thread look into its inbox; if it is awake it does so before it sleeps. */
void wake(struct thread *thread)
{
    if (atomic_load(&thread->is_asleep))
        eventfd_write(thread->wake, 1);
}

/* The inbox */

/* Reset the thread's flows of a port; of all ports with NULL. */
static void reset_flows_of(struct thread *thread, const struct port *port)
{
    for (struct link *one = thread->flows.next, *next; one != &thread->flows; one = next) {
        struct flow *flow = OWNER(one, struct flow, all);
        next = one->next;
        if (port == NULL || flow->port == port)
            handle(flow, UNPUBLISHED);
    }
}

/* Carry out a letter; what it is about may be freed only after the batch, so its reference is dropped then. */
static void open_letter(struct thread *thread, struct letter *letter)
{
    switch (letter->kind) {
    case LETTER_STOP:
        thread->is_stopping = true;
        break;
    case LETTER_PORT_REMOVED:
        reset_flows_of(thread, OWNER(letter, struct port, letter));
        remove_clients(thread, OWNER(letter, struct port, letter));
        break;
    case LETTER_ENTRANCE_LEFT:
        leave_entrance(thread, &OWNER(letter, struct entrance, leaving)->watches[thread->number]);
        break;
    case LETTER_ENTRANCE_CLOSED:
        forget_entrance(thread, &OWNER(letter, struct entrance, letter)->watches[thread->number]);
        break;
    }
}

static void drop_letter(struct thread *thread, struct letter *letter)
{
    if (letter->kind == LETTER_PORT_REMOVED)
        release_port(thread->core, OWNER(letter, struct port, letter));
    else if (letter->kind == LETTER_ENTRANCE_CLOSED)
        release_entrance(thread->core, OWNER(letter, struct entrance, letter));
}

/* After a batch of events, none of which leads to what has ended any more. */
static void free_ended(struct thread *thread)
{
    close_flows(thread);
    free_removed_clients(thread);
}

/* Take over flows from other threads, and carry out what Python wants.  Comes after a batch of events, so nothing that
   is freed here has an event left. */
static void read_inbox(struct thread *thread)
{
    struct link passed;
    link_init(&passed);
    pthread_mutex_lock(&thread->lock);
    struct letter *letters = thread->letters;
    thread->letters = NULL;
    thread->last_letter = &thread->letters;
    link_move_all(&thread->passed, &passed);
    pthread_mutex_unlock(&thread->lock);
    remove_excluded(thread);
    while (!link_empty(&passed)) {
        struct link *one = passed.next;
        link_remove(one);
        connect_flow(thread, OWNER(one, struct flow, all));
    }
    for (struct letter *one = letters; one != NULL; one = one->next[thread->number])
        open_letter(thread, one);
    free_ended(thread);
    for (struct letter *one = letters, *next; one != NULL; one = next) {
        next = one->next[thread->number];
        drop_letter(thread, one);
    }
}

static bool has_mail(struct thread *thread)
{
    pthread_mutex_lock(&thread->lock);
    bool has = thread->letters != NULL || !link_empty(&thread->passed);
    pthread_mutex_unlock(&thread->lock);
    return has || thread->excluded_seen != atomic_load(&thread->core->excluded_version);
}

/* The loop */

static int64_t first_ms(int64_t one_ms, int64_t other_ms)
{
    return one_ms == 0 || (other_ms != 0 && other_ms < one_ms) ? other_ms : one_ms;
}

static int64_t due_ms_of(const struct thread *thread)
{
    return first_ms(thread->tick_ms, first_ms(thread->resume_ms, thread->expire_ms));
}

static int timeout_ms(const struct thread *thread)
{
    if (!link_empty(&thread->soon))
        return 0;
    int64_t due_ms = due_ms_of(thread);
    if (due_ms == 0)
        return -1;
    int64_t left_ms = due_ms - clock_ms();
    return left_ms < 0 ? 0 : (int)left_ms;
}

/* Sleep until there are events, a timer is due, or somebody wakes the thread. */
static int sleep_for(struct thread *thread, struct epoll_event *events, int timeout)
{
    flush_tally(thread);
    atomic_store(&thread->is_asleep, true);
    if (has_mail(thread))
        timeout = 0;
    int count = epoll_wait(thread->epoll, events, BATCH, timeout);
    atomic_store(&thread->is_asleep, false);
    return count;
}

/* Return the next batch of events; poll for a while first if the last one came quickly. */
static int wait_for_events(struct thread *thread, struct epoll_event *events)
{
    int timeout = timeout_ms(thread);
    if (timeout == 0)
        return epoll_wait(thread->epoll, events, BATCH, 0);
    int64_t began_ns = clock_ns();
    while (thread->is_chatty && clock_ns() - began_ns < AWAKE_NS) {
        int count = epoll_wait(thread->epoll, events, BATCH, 0);
        if (count != 0 || has_mail(thread))
            return count;
        sched_yield();
    }
    int count = sleep_for(thread, events, timeout);
    thread->is_chatty = clock_ns() - began_ns < AWAKE_NS;
    return count;
}

static void dispatch(struct thread *thread, const struct epoll_event *event)
{
    eventfd_t ignored;
    switch (*(enum watched *)event->data.ptr) {
    case WATCHED_WAKE:
        eventfd_read(thread->wake, &ignored);
        break;
    case WATCHED_ENTRANCE:
        accept_client(thread, event->data.ptr);
        break;
    case WATCHED_HALF:
        half_event(event->data.ptr, event->events);
        break;
    case WATCHED_RECEIVER:
        receive_datagrams(thread, ((struct watch *)event->data.ptr)->entrance);
        break;
    case WATCHED_CLIENT:
        receive_answers(thread, event->data.ptr, event->events);
        break;
    }
}

/* Call the halves that asked for it, in the order in which they did; those that ask again have to wait. */
static void call_waiting(struct link *waiting)
{
    while (!link_empty(waiting)) {
        struct half *half = OWNER(waiting->next, struct half, soon);
        link_remove(&half->soon);
        ready(half, UNTIL_EMPTY);
    }
}

static void call_due(struct thread *thread)
{
    if (due_ms_of(thread) == 0)
        return;
    int64_t now_ms = clock_ms();
    if (thread->tick_ms != 0 && now_ms >= thread->tick_ms)
        tick(thread, now_ms);
    if (thread->resume_ms != 0 && now_ms >= thread->resume_ms)
        resume_accepting(thread);
    if (thread->expire_ms != 0 && now_ms >= thread->expire_ms)
        expire_clients(thread, now_ms);
    free_ended(thread);
}

enum { COUNTED_ROUNDS = 256 };                     /* a busy thread adds to the ports' counters so often */

static void run_round(struct thread *thread)
{
    struct epoll_event events[BATCH];
    struct link waiting;
    int count = wait_for_events(thread, events);
    link_init(&waiting);
    link_move_all(&thread->soon, &waiting);
    for (int number = 0; number < count; number++)
        dispatch(thread, &events[number]);
    send_answers(thread);
    call_waiting(&waiting);
    free_ended(thread);
    if (has_mail(thread))
        read_inbox(thread);
    call_due(thread);
    if (++thread->rounds % COUNTED_ROUNDS == 0)
        flush_tally(thread);
}

void *run_thread(void *argument)
{
    struct thread *thread = argument;
    while (!thread->is_stopping)
        run_round(thread);
    reset_flows_of(thread, NULL);
    remove_clients(thread, NULL);
    free_ended(thread);
    return NULL;
}
