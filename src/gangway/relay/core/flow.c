/* The life of a flow: it connects to the container, carries out what the table says, and ends.

   Kernel facts:
   * A client may send data, and end, before its backend has answered.  Nothing is read from it until then; the edges
     that epoll reports meanwhile are recorded (`client_events`) and handled afterwards.
   * The connecting side of TCP's handshake ends it with an acknowledgement.  With TCP_QUICKACK off (tcp(7)) that waits
     for the first data, which a client has mostly sent by the time that its backend answers: this saves a packet and a
     wake-up of the backend.  If the client has sent none, turning the option on sends the acknowledgement at once
     (net/ipv4/tcp.c, __tcp_sock_set_quickack): a backend that speaks first must not wait.
   * A socket has the host's congestion control (tcp(7), tcp_congestion_control).  BBR paces what it sends, by timers that cost
     more than all else on the way to a container, and keep it below the speed of that way (net/ipv4/tcp_output.c,
     tcp_pacing_check).  It is within the host: there is no bottleneck to find.  So a backend's socket uses reno, which every
     kernel has and everybody may use (net/ipv4/tcp_cong.c).  A client's keeps the host's: it may be far away.
   * Keepalive is set on a backend's socket when its flow is a second old.  Most flows never are. */
#include "parts.h"

#include <netinet/tcp.h>

enum { SCTP_NODELAY_OPTION = 3 };                  /* include/uapi/linux/sctp.h */
enum { YOUNG_MS = 1000 };

static void set(int fd, int level, int option, int value)
{
    setsockopt(fd, level, option, &value, sizeof value);   /* a connection that has ended reports it as an event */
}

void disable_delay(int fd, uint16_t protocol)
{
    if (protocol == IPPROTO_TCP)
        set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    else
        set(fd, IPPROTO_SCTP, SCTP_NODELAY_OPTION, 1);
}

/* Detect a peer that has disappeared.  SCTP does so by its own heartbeats. */
void enable_keepalive(int fd, uint16_t protocol, int idle_s)
{
    if (protocol != IPPROTO_TCP)
        return;
    set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set(fd, IPPROTO_TCP, TCP_KEEPIDLE, idle_s);
    set(fd, IPPROTO_TCP, TCP_KEEPINTVL, idle_s);
}

/* For a connection within the host, and before it is made: pacing that has begun never ends. */
static void do_not_pace(int fd, uint16_t protocol)
{
    static const char name[] = "reno";
    if (protocol == IPPROTO_TCP)
        setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, sizeof name - 1);
}

static void set_quick_ack(struct flow *flow, int enabled)
{
    if (flow->port->settings.protocol == IPPROTO_TCP)
        set(flow->backend.fd, IPPROTO_TCP, TCP_QUICKACK, enabled);
}

/* Begin and end */

static void init_half(struct half *half, struct flow *flow, struct half *peer, int fd)
{
    *half = (struct half){.watched = WATCHED_HALF, .fd = fd, .flow = flow, .peer = peer, .pipe.read_end = -1};
    link_init(&half->soon);
}

/* Return a flow of an accepted client of a port, which is acquired; NULL: there is no memory. */
struct flow *make_flow(struct port *port, uint16_t backend_port, int client, int backend)
{
    struct flow *flow = calloc(1, sizeof *flow);
    if (flow == NULL)
        return NULL;
    init_half(&flow->client, flow, &flow->backend, client);
    init_half(&flow->backend, flow, &flow->client, backend);
    flow->client.stalled = UP_STALLED, flow->client.drained = UP_DRAINED;
    flow->client.ended = UP_ENDED, flow->client.was_reset = CLIENT_RESET;
    flow->backend.stalled = DOWN_STALLED, flow->backend.drained = DOWN_DRAINED;
    flow->backend.ended = DOWN_ENDED, flow->backend.was_reset = BACKEND_RESET;
    flow->port = port;
    flow->backend_port = backend_port;
    flow->state = CONNECTING;
    link_init(&flow->all);
    link_init(&flow->young);
    return flow;
}

/* The thread that serves a new client: the one with the fewest flows, if the others are not about even. */
static struct thread *choose_thread(struct thread *thread)
{
    struct core *core = thread->core;
    unsigned fewest = atomic_load_explicit(&thread->flow_count, memory_order_relaxed);
    struct thread *chosen = thread;
    for (unsigned number = 0; number < core->thread_count; number++) {
        struct thread *other = core->threads[number];
        unsigned flows = atomic_load_explicit(&other->flow_count, memory_order_relaxed);
        if (flows + 1 < fewest)
            fewest = flows, chosen = other;
    }
    return chosen;
}

/* Give a new flow to a thread. */
void assign_flow(struct thread *thread, struct flow *flow)
{
    count(&COUNTER(flow->port, connections), 1);
    count(&COUNTER(flow->port, active), 1);
    struct thread *chosen = choose_thread(thread);
    atomic_fetch_add_explicit(&chosen->flow_count, 1, memory_order_relaxed);
    if (chosen == thread) {
        connect_flow(thread, flow);
        return;
    }
    pthread_mutex_lock(&chosen->lock);
    link_append(&chosen->passed, &flow->all);
    pthread_mutex_unlock(&chosen->lock);
    wake(chosen);
}

/* Have close(2) send a reset. */
void reset_on_close(int fd)
{
    const struct linger at_once = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
}

static bool watch_half(struct half *half)
{
    struct epoll_event event = {.events = EDGES, .data.ptr = half};
    return epoll_ctl(half->flow->thread->epoll, EPOLL_CTL_ADD, half->fd, &event) == 0;
}

static int connect_backend(const struct flow *flow)
{
    const struct name name = name_of(&flow->port->settings.backend, flow->backend_port);
    return connect(flow->backend.fd, &name.as.any, name.size) < 0 ? errno : 0;
}

static void connect_failed(struct flow *flow, int error)
{
    count(error == ETIMEDOUT ? &COUNTER(flow->port, timeouts) : &COUNTER(flow->port, failed), 1);
    note_backend(flow->thread->core, flow->port, flow->backend_port, NOTE_CANNOT_CONNECT, error, 0);
    handle(flow, CONNECT_FAILED);
}

/* Connect a flow to its container; meanwhile the client is watched, but not read. */
void connect_flow(struct thread *thread, struct flow *flow)
{
    flow->thread = thread;
    flow->began_ms = clock_ms();
    link_append(&thread->flows, &flow->all);
    link_append(&thread->young, &flow->young);
    if (thread->tick_ms == 0)
        thread->tick_ms = flow->began_ms + YOUNG_MS;
    if (atomic_load(&flow->port->is_removed)) {
        handle(flow, UNPUBLISHED);
        return;
    }
    disable_delay(flow->backend.fd, flow->port->settings.protocol);
    do_not_pace(flow->backend.fd, flow->port->settings.protocol);
    set_quick_ack(flow, 0);
    int error = connect_backend(flow);
    if (error != 0 && error != EINPROGRESS) {
        connect_failed(flow, error);
        return;
    }
    /* The client first: its events must be known when the backend's answer is handled. */
    if (!watch_half(&flow->client) || !watch_half(&flow->backend)) {
        lose_client(thread->core, flow->port, errno);
        handle(flow, CONNECT_FAILED);
    }
}

/* End a flow: its sockets are closed after the batch of events. */
static void end_flow(struct flow *flow)
{
    link_remove(&flow->all);
    link_remove(&flow->young);
    discard(&flow->client);
    discard(&flow->backend);
    link_append(&flow->thread->closing, &flow->all);
}

static void reset_flow(struct flow *flow)
{
    reset_on_close(flow->client.fd);
    reset_on_close(flow->backend.fd);
    end_flow(flow);
}

/* Close the sockets of a flow of this thread, and free it. */
void abandon_flow(struct thread *thread, struct flow *flow)
{
    close(flow->client.fd);
    close(flow->backend.fd);
    if (thread->tally.port == flow->port)
        flush_tally(thread);
    atomic_fetch_sub_explicit(&COUNTER(flow->port, active), 1, memory_order_relaxed);
    atomic_fetch_sub_explicit(&thread->flow_count, 1, memory_order_relaxed);
    release_port(thread->core, flow->port);
    free(flow);
}

void close_flows(struct thread *thread)
{
    if (link_empty(&thread->closing))
        return;
    while (!link_empty(&thread->closing)) {
        struct flow *flow = OWNER(thread->closing.next, struct flow, all);
        link_remove(&flow->all);
        abandon_flow(thread, flow);
    }
    resume_accepting(thread);
}

/* Events */

static void act(struct flow *flow, enum action action)
{
    switch (action) {
    case NO_ACTION:
        break;
    case PUMP_UP:                                  /* edges were ignored during the stall: read until the queue is empty */
        ready(&flow->client, UNTIL_EMPTY);
        break;
    case PUMP_DOWN:
        ready(&flow->backend, UNTIL_EMPTY);
        break;
    case END_BACKEND:
        shutdown(flow->backend.fd, SHUT_WR);       /* ENOTCONN: it has ended already, which is an event of its own */
        break;
    case END_CLIENT:
        shutdown(flow->client.fd, SHUT_WR);
        break;
    case CLOSE:
        end_flow(flow);
        break;
    case RESET:
        reset_flow(flow);
        break;
    }
}

/* Enter the state that follows from an event, and carry out the action. */
void handle(struct flow *flow, enum event event)
{
    const struct transition *transition = &TRANSITIONS[flow->state][event];
    if (transition->action == RESET && (event == CLIENT_RESET || event == BACKEND_RESET))
        count(&COUNTER(flow->port, resets), 1);
    flow->state = transition->state;
    flow->client.is_reading = READS[flow->state].up;
    flow->backend.is_reading = READS[flow->state].down;
    act(flow, transition->action);
}

static void backend_answered(struct flow *flow, uint32_t events)
{
    int error = 0;
    socklen_t size = sizeof error;
    if (events & EPOLLERR)
        getsockopt(flow->backend.fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) {
        connect_failed(flow, error);
        return;
    }
    handle(flow, CONNECTED);
    if (flow->client_events & ~(uint32_t)EPOLLOUT)
        ready(&flow->client, flow->client_events);
    else
        set_quick_ack(flow, 1);
    if (events & ~(uint32_t)EPOLLOUT)
        ready(&flow->backend, events);
}

void half_event(struct half *half, uint32_t events)
{
    struct flow *flow = half->flow;
    if (flow->state == CLOSED)
        return;
    if (flow->state != CONNECTING) {
        ready(half, events);
    } else if (half == &flow->backend) {
        backend_answered(flow, events);
    } else {
        flow->client_events |= events;
        if (events & EPOLLERR)
            handle(flow, CLIENT_RESET);
    }
}

/* Once a second while there are flows that are younger, or not connected yet. */
void tick(struct thread *thread, int64_t now_ms)
{
    for (struct link *one = thread->young.next, *next; one != &thread->young; one = next) {
        struct flow *flow = OWNER(one, struct flow, young);
        int64_t age_ms = now_ms - flow->began_ms;
        next = one->next;
        if (age_ms < YOUNG_MS)
            break;
        if (flow->state != CONNECTING) {
            enable_keepalive(flow->backend.fd, flow->port->settings.protocol, (int)thread->core->settings.keepalive_s);
            link_remove(one);
        } else if (age_ms >= (int64_t)thread->core->settings.connect_timeout_ms) {
            connect_failed(flow, ETIMEDOUT);
        }
    }
    thread->tick_ms = link_empty(&thread->young) ? 0 : now_ms + YOUNG_MS;
}
