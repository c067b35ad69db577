/* What the files of the core share. */
#ifndef GANGWAY_PARTS_H
#define GANGWAY_PARTS_H

#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core.h"
#include "flow_table.h"

enum { MAX_THREADS = 16, SPARE_PIPES = 4, NOTES = 256, BATCH = 128 };
enum {
    SMALL_BYTES = 64 * 1024,
    MESSAGE_BYTES = 256 * 1024,                    /* SCTP: one send passes 212,992 at most (Linux 6.1) */
    PIPE_BYTES = 256 * 1024,
};
enum {
    EDGES = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET,
    ENDED_EVENTS = EPOLLRDHUP | EPOLLHUP | EPOLLPRI,
    UNTIL_EMPTY = EPOLLIN | EPOLLRDHUP,            /* not from epoll: edges may have been missed */
};

/* A doubly linked list in a circle; a head of its own. */
struct link {
    struct link *next, *previous;
};

static inline void link_init(struct link *head) { head->next = head->previous = head; }
static inline bool link_empty(const struct link *head) { return head->next == head; }
static inline bool link_is_free(const struct link *one) { return one->next == one; }
static inline void link_append(struct link *head, struct link *one)
{
    one->next = head, one->previous = head->previous;
    head->previous->next = one, head->previous = one;
}
static inline void link_remove(struct link *one)
{
    one->next->previous = one->previous, one->previous->next = one->next;
    link_init(one);
}
/* Move a whole list to the end of another. */
static inline void link_move_all(struct link *from, struct link *to)
{
    if (link_empty(from))
        return;
    from->next->previous = to->previous, to->previous->next = from->next;
    from->previous->next = to, to->previous = from->previous;
    link_init(from);
}
#define OWNER(link_pointer, type, member) ((type *)((char *)(link_pointer) - offsetof(type, member)))

/* What an epoll event leads to. */
enum watched { WATCHED_WAKE, WATCHED_ENTRANCE, WATCHED_HALF, WATCHED_RECEIVER, WATCHED_CLIENT };

/* A message to all threads; each takes it from its inbox once. */
struct letter {
    enum { LETTER_STOP, LETTER_PORT_REMOVED, LETTER_ENTRANCE_LEFT, LETTER_ENTRANCE_CLOSED } kind;
    struct letter *next[MAX_THREADS];
};

/* A thread's interest in an entrance. */
struct watch {
    enum watched watched;                          /* an entrance, or one of datagrams: a receiver */
    struct entrance *entrance;
    struct link paused;                            /* in the thread's list while it does not accept there */
};

/* A socket that answers to clients leave from. */
struct outlet {
    int fd;                                        /* open while there are clients */
    unsigned clients;
};

struct entrance {
    struct letter letter, leaving;
    struct port *port;                             /* NULL: ports are looked up */
    int fd;
    uint16_t protocol;
    uint16_t host_port;                            /* 0: shared */
    _Atomic uint16_t family;                       /* of the last client's container, which the next one's has mostly, too */
    bool is_anywhere;                              /* bound to all addresses */
    struct thread *home;                           /* the one that serves it; NULL: all do */
    _Atomic uint64_t *binding;                     /* shared, of datagrams: the variable of ebpf/steering.bpf.c */
    atomic_bool is_closed;
    atomic_uint references;                        /* threads that may have an event of it */
    struct watch watches[MAX_THREADS];
};

struct port {
    struct letter letter;
    struct core_port_settings settings;
    struct entrance *entrance;                     /* its own; NULL: the shared ones serve it */
    atomic_bool is_removed;
    bool was_refused;                              /* core_add_port failed: nobody waits for a note */
    atomic_uint references;                        /* flows, entrance, threads with a letter, and one until it is removed */
    struct link clients;                           /* of UDP, used by one thread; the one that is silent longest is first */
    unsigned client_count;
    struct link with_clients;                      /* in the thread's list of ports that have some */
    struct outlet *outlets;                        /* shared: one for each port of the range; NULL: not needed yet */
    struct outlet only;                            /* its own socket, or the raw one: it answers from all of them */
    int raw;                                       /* -1: none */
    struct port *next_removed;
    _Atomic uint64_t counters[sizeof(struct core_counters) / sizeof(uint64_t)];
};

/* The counter of a port that struct core_counters has under this name. */
#define COUNTER(port, name) ((port)->counters[offsetof(struct core_counters, name) / sizeof(uint64_t)])

static inline void count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

struct pipe {
    int read_end, write_end;                       /* -1: none */
    size_t bytes;
    bool is_small;                                 /* the user's pipe memory is used up */
};

/* One side of a flow: its socket, and the direction from there to the other side. */
struct half {
    enum watched watched;
    int fd;
    struct flow *flow;
    struct half *peer;
    bool is_reading, is_bulky;
    bool was_urgent;                               /* there was urgent data */
    uint8_t streak;                                /* full reads in a row; if bulky, scarce transfers */
    enum event stalled, drained, ended, was_reset; /* what it reports */
    char *held;                                    /* read, and not sent yet */
    size_t held_from, held_to;
    struct pipe pipe;                              /* with bytes that are not sent yet */
    struct link soon;                              /* in the thread's list while it is to be called again */
};

struct flow {
    struct half client, backend;
    struct thread *thread;
    struct port *port;
    enum state state;
    uint32_t client_events;                        /* of the client while the backend is being connected to */
    uint16_t backend_port;
    int64_t began_ms;
    struct link all;                               /* in one of its thread's lists passed, flows, closing */
    struct link young;
};

/* Bytes of one port that are counted already, and not yet in its counters, which threads share. */
struct tally {
    struct port *port;
    uint64_t up_bytes, down_bytes;
};

/* Who sent a datagram, and to which address and port of the host: compared and hashed as bytes. */
struct client_key {
    const struct port *own;                        /* the port, if its entrance serves no other; else NULL */
    struct core_end from, to;                      /* to: its family is 0 if the kernel has not said it */
};
_Static_assert(sizeof(struct client_key) == 7 * sizeof(uint64_t), "no padding");

/* A socket address of either family. */
struct name {
    union {
        struct sockaddr any;
        struct sockaddr_in ipv4;
        struct sockaddr_in6 ipv6;
    } as;
    socklen_t size;
};

enum { ORIGIN_BYTES = CMSG_SPACE(20) };            /* struct in6_pktinfo */

/* A client of a UDP port. */
struct client {
    enum watched watched;
    int fd;                                        /* the socket whose port tells the container clients apart */
    struct client *next;                           /* of the same bucket */
    uint64_t hash;
    struct client_key key;
    struct port *port;
    struct outlet *outlet;
    struct link by_age;                            /* in one of its thread's lists by_age, removed */
    struct link of_port;
    uint32_t tick;                                 /* when a datagram was last moved */
    uint16_t backend_port;
    uint16_t burst;                                /* so many answers are received at once */
    bool is_removed, is_tftp;
    bool is_group;                                 /* its last datagram was a broadcast or multicast */
    uint32_t was_told_at;                          /* the tick of a refusal, and one */
    struct name container, name;                   /* `name`: the client's, for answers */
    socklen_t origin_bytes;
    char origin[ORIGIN_BYTES] __attribute__((aligned(8)));   /* the control message that says where answers leave from */
};

struct thread {
    struct core *core;
    pthread_t id;
    unsigned number;
    int epoll, wake, routes;                       /* routes: a netlink socket (admission.c) */
    unsigned rounds;
    enum watched watched;                          /* of `wake` */
    atomic_bool is_asleep;
    atomic_uint flow_count;                        /* those included that are on the way from another thread */
    pthread_mutex_t lock;                          /* of the inbox */
    struct letter *letters, **last_letter;
    struct link passed;                            /* flows from other threads */
    struct link flows, young, closing, soon, paused;
    int64_t tick_ms, resume_ms, expire_ms;         /* when due; 0: not */
    struct datagrams *datagrams;                   /* datagram.c */
    struct clients *clients;                       /* client.c */
    unsigned excluded_seen;                        /* the version of the excluded addresses that its clients are of */
    struct tally tally;
    struct pipe spare[SPARE_PIPES];
    int spares;
    bool is_stopping;
    bool is_chatty;                                /* the last wait was short; bulk transfers do not wait for answers */
    char buffer[MESSAGE_BYTES];
};

struct core {
    struct core_settings settings;
    pthread_rwlock_t lock;                         /* of everything below that threads look up */
    struct port **ports;                           /* shared ones, sorted */
    size_t port_count, port_room;
    struct core_end *excluded;
    _Atomic uint32_t excluded_count;
    atomic_uint excluded_version;
    atomic_uint client_count;                      /* of UDP */
    uint64_t secret;                               /* of hashes: clients choose their ports */
    unsigned homes;                                /* UDP ports with sockets of their own, ever */
    pthread_mutex_t binding_lock;                  /* the variable `binding` is the same for both families */
    _Atomic int64_t starved_until_ms;              /* no client is accepted before: one has just been lost; 0: none */
    pthread_mutex_t notes_lock;
    int notes_fd;
    struct core_note notes[NOTES];
    unsigned note_count;
    struct port *removed;
    unsigned thread_count;
    struct thread *threads[MAX_THREADS];
};

/* ports.c */
struct port *acquire_port(struct core *core, const struct entrance *entrance, const struct core_end *host,
                          uint16_t *backend_port);
bool is_excluded(const struct core *core, const struct core_end *at);
void release_port(struct core *core, struct port *port);
void release_entrance(struct core *core, struct entrance *entrance);
void note(struct core *core, const struct core_note *note);
void note_backend(struct core *core, const struct port *port, uint16_t backend_port, enum core_note_kind kind, int error,
                  uint16_t host_port);
struct core_end end_of(const struct name *name);
struct name name_of(const struct core_end *end, uint16_t port);
bool have_same_address(const struct core_end *one, const struct core_end *other);
void tell_all(struct core *core, struct letter *letter);

/* admission.c */
bool is_admitted(const struct thread *thread, const struct port *port, const struct core_end *client);

/* accept.c */
int watch_entrance(struct thread *thread, struct watch *watch);
void accept_client(struct thread *thread, struct watch *watch);
void leave_entrance(struct thread *thread, struct watch *watch);
void forget_entrance(struct thread *thread, struct watch *watch);
void resume_accepting(struct thread *thread);
void lose_client(struct core *core, struct port *port, int error);

/* flow.c */
struct flow *make_flow(struct port *port, uint16_t backend_port, int client, int backend);
void assign_flow(struct thread *thread, struct flow *flow);
void connect_flow(struct thread *thread, struct flow *flow);
void abandon_flow(struct thread *thread, struct flow *flow);
void reset_on_close(int fd);
void handle(struct flow *flow, enum event event);
void half_event(struct half *half, uint32_t events);
void close_flows(struct thread *thread);
void tick(struct thread *thread, int64_t now_ms);
void disable_delay(int fd, uint16_t protocol);
void enable_keepalive(int fd, uint16_t protocol, int idle_s);

/* pump.c */
void ready(struct half *half, uint32_t events);
void discard(struct half *half);
void flush_tally(struct thread *thread);
void close_pipe(struct pipe *pipe);

/* datagram.c */
struct datagrams *make_datagrams(void);
void release_memory(struct datagrams *datagrams);
int prepare_receiver(int fd, int family, bool is_shared);
void receive_datagrams(struct thread *thread, struct entrance *entrance);
void receive_answers(struct thread *thread, struct client *client, uint32_t events);
void send_answers(struct thread *thread);

/* client.c */
struct clients *make_clients(uint32_t most);
struct client *find_client(struct thread *thread, const struct client_key *key, uint64_t *hash);
struct client *make_client(struct thread *thread, struct entrance *entrance, const struct client_key *key, uint64_t hash,
                           const struct name *name);
int open_udp(struct thread *thread, struct port *port, int family);
void touch(struct thread *thread, struct client *client);
void remove_clients(struct thread *thread, const struct port *port);
void remove_excluded(struct thread *thread);
void free_removed_clients(struct thread *thread);
void expire_clients(struct thread *thread, int64_t now_ms);
bool may_be_told(struct thread *thread, struct client *client);

/* outlet.c */
socklen_t write_control(char *control, int level, int type, const void *data, size_t bytes);
socklen_t write_origin(const struct client_key *key, char *control);
struct outlet *acquire_outlet(struct thread *thread, struct entrance *entrance, const struct client *client);
void release_outlet(struct client *client);
struct udphdr;
void write_udp_header(const struct client *client, const void *data, size_t bytes, struct udphdr *header);
void report_refusal(const struct core *core, const struct client *client);

/* thread.c */
void *run_thread(void *thread);
void wake(struct thread *thread);
int64_t clock_ms(void);

#endif
