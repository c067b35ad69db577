/* The relay's data plane: moves the bytes of TCP and SCTP connections, and UDP datagrams, between clients and containers.

   The library decides nothing.  Python says which ports lead to which containers and who may connect, and reads what is
   to be logged.  It is loaded by ctypes, and needs nothing but libc.

   Theory of operation
   -------------------
   An *entrance* is a listening socket.  It serves one *port*, or all ports that the kernel steers to it; a port may be a
   range.  Each of N threads has an epoll set of its own (thread.c), and all wait at every entrance; the kernel wakes one
   of them (EPOLLEXCLUSIVE).  The thread that accepts a client keeps it, unless another has fewer.  It connects to
   the container: the two sockets are a *flow* of two *halves* (flow.c).  From then on nothing of the flow crosses a
   thread, and no lock is taken for it.  What follows from an event is in a table that is made from relay/flow.py; how
   bytes move is in pump.c.

   Ports are found in a sorted array under a lock that threads only read (ports.c).  A port that is removed is out of the
   array first, so no flow begins any more; then the threads are told, and each resets its own flows.  Whoever drops the
   last reference (a flow, a thread that was told, the port's own entrance) hands the port back to Python by a note.

   Datagrams arrive at entrances, too; but one thread serves each, so that they stay in order (datagram.c).  For each
   *client* (client.c) it has a socket, whose port tells the container clients apart.  A client is known by its address
   *and* by what it sent to: one that sends to two addresses of the host must get each answer from the right one.
   Answers leave from an *outlet*, a socket that is bound to the port that the client sent to: the port's own, or, as
   long as a shared port has clients, one that is opened for them; or a raw socket, if the port is another program's
   (outlet.c).

   Kernel facts
   ------------
   * A flow's sockets are registered once, edge-triggered, for all events: a handler reads until the kernel has no more
     data, or asks to be called again.  A read from a TCP stream that returns less than was asked for has emptied it
     (epoll(7), Q9), except for an end that arrived with the data (EPOLLRDHUP is set then) and for urgent data, which a
     read stops before (EPOLLPRI).  splice(2) never passes the mark of urgent data: such a half is not bulky any more.
   * The number of a closed descriptor can be used again at once, while an event of the old socket is still among those
     that epoll_wait returned.  So flows are closed after a batch of events.  Closing the last descriptor of a socket
     takes it out of the epoll set (epoll(7), Q6): accepted sockets and those to containers never have another one.
   * A client that is not accepted waits in the kernel's queue and loses nothing.  So the socket for the container is
     made first: without descriptors the client goes on waiting.
   * An accepted socket inherits TCP_NODELAY and keepalive from its listener (net/core/sock.c, sk_clone_lock). */
#ifndef GANGWAY_CORE_H
#define GANGWAY_CORE_H

#include <stdint.h>

#define CORE_API __attribute__((visibility("default")))

struct core;
struct port;
struct entrance;

/* An address and a port.  The sizes are those that library.py relies on. */
struct core_end {
    uint16_t family;                               /* AF_INET or AF_INET6 */
    uint16_t port;                                 /* host byte order */
    uint32_t zone;                                 /* the interface's index, if the address is link-local */
    uint8_t address[16];                           /* network byte order; IPv4 has the first four bytes, the rest is 0 */
};
_Static_assert(sizeof(struct core_end) == 24, "struct core_end");

struct core_subnet {
    uint16_t family;
    uint16_t length;                               /* of the prefix, in bits */
    uint8_t address[16];
};
_Static_assert(sizeof(struct core_subnet) == 20, "struct core_subnet");

struct core_port_settings {
    struct core_end host;                          /* the first port of the range */
    struct core_end backend;                       /* its port is that of the range's first port */
    const struct core_subnet *admitted;            /* who may connect besides the host itself; none: everybody */
    uint32_t admitted_count;
    uint16_t last;                                 /* the last port of the range */
    uint16_t protocol;                             /* IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP */
};
_Static_assert(sizeof(struct core_port_settings) == 64, "struct core_port_settings");

/* Of one port, since it was added. */
struct core_counters {
    uint64_t connections, active;                  /* UDP: clients */
    uint64_t up_bytes, down_bytes;                 /* to the container, to the client */
    uint64_t failed, timeouts;                     /* connection attempts to the container; datagrams that cannot reach it */
    uint64_t resets;                               /* connections that a side has reset; datagrams that were refused */
    uint64_t not_admitted, lost;                   /* lost: out of descriptors, watches or memory */
    uint64_t evicted, dropped;                     /* UDP clients that made room; datagrams not passed on */
};
_Static_assert(sizeof(struct core_counters) == 88, "struct core_counters");

enum core_note_kind {
    NOTE_PORT_REMOVED = 1,                         /* `port` has no flow any more; its memory is free */
    NOTE_CANNOT_CONNECT,                           /* to `end`: `error` */
    NOTE_CLIENTS_WAIT,                             /* new ones are not accepted for a while: `error` */
    NOTE_CLIENT_LOST,                              /* no socket, or no watch for it: `error` */
    NOTE_UDP_CLIENT_LOST,                          /* of a container: `error` */
    NOTE_NOT_SENT_UP, NOTE_NOT_SENT_DOWN,          /* a datagram to or from a container: `error` */
    NOTE_UNREACHABLE,                              /* a datagram has not reached `end`: `error` */
};

struct core_note {
    uint64_t port;                                 /* the pointer that core_add_port returned */
    struct core_end end;
    int32_t kind, error;                           /* error: errno */
    uint32_t protocol, host_port;                  /* host_port: of a UDP client that is lost */
};
_Static_assert(sizeof(struct core_note) == 48, "struct core_note");

struct core_settings {
    uint32_t threads, keepalive_s, connect_timeout_ms;
    uint32_t udp_timeout_s;                        /* when a client is forgotten that neither sends nor is answered */
    uint32_t udp_clients, udp_clients_per_port;    /* at most; client.c says which are forgotten first */
    int32_t icmp, icmp6;                           /* from core_open_icmp; they belong to the library from now on */
};

/* Return a raw socket of AF_INET or AF_INET6 to tell UDP clients by that nobody listens in their container.  It receives
   nothing.  -1: errno, without CAP_NET_RAW. */
CORE_API int core_open_icmp(int family);

/* Every function that can fail returns NULL or -1 and sets errno. */

/* Start the threads; stop them, which resets all connections.  Remove the ports and close the entrances before. */
CORE_API struct core *core_start(const struct core_settings *settings);
CORE_API void core_stop(struct core *core);

/* Let the process call the kernel only for what is listed in confine.c.  Calls that no relay makes, such as execve, end it
   from now on.  The process must have no-new-privileges, and all its threads.  -1: errno; the kernel cannot. */
CORE_API int core_confine(void);

/* A descriptor that is readable when there are notes; core_read_notes reads up to `most` and returns how many.  If too
   many are unread new ones are lost, except that a port was removed. */
CORE_API int core_notes_fd(const struct core *core);
CORE_API int core_read_notes(struct core *core, struct core_note *notes, int most);

/* Serve the shared ports, which are found by what a client connected or sent to.  The socket belongs to the library from
   now on, also after a failure.  One that is closed accepts nobody any more; clients that wait stay in its queue.  UDP
   needs the map `binding` of ebpf/steering.bpf.c, too; its descriptor stays the caller's. */
CORE_API struct entrance *core_listen(struct core *core, int fd, int binding);
CORE_API void core_close_entrance(struct core *core, struct entrance *entrance);

/* Stop accepting at an entrance, or at a port's own one, once, because another process accepts there, too.  What has been
   accepted goes on.  The socket stays open: UDP clients are answered from it. */
CORE_API void core_leave_entrance(struct core *core, struct entrance *entrance);
CORE_API void core_leave_port(struct core *core, struct port *port);

/* Serve a port by a socket `fd` of its own, or, with -1, by the shared ones.  The answers of a UDP port leave by the raw
   socket `raw`, if it is not -1.  Both belong to the library, also after a failure.  At a socket that is bound to all
   addresses, clients of excluded ones are refused. */
CORE_API struct port *core_add_port(struct core *core, const struct core_port_settings *settings, int fd, int raw);

/* Stop serving a port, and reset its connections.  Returns at once: NOTE_PORT_REMOVED follows. */
CORE_API void core_remove_port(struct core *core, struct port *port);

CORE_API void core_read_counters(const struct port *port, struct core_counters *counters);

/* Refuse new clients of these addresses at entrances that are bound to all addresses; forget UDP clients of them. */
CORE_API int core_exclude(struct core *core, const struct core_end *addresses, uint32_t count);

/* True if one of the subnets has the client's address. */
CORE_API int core_admits(const struct core_subnet *subnets, uint32_t count, const struct core_end *client);

/* The number of connections and UDP clients. */
CORE_API uint64_t core_active(const struct core *core);

#endif
