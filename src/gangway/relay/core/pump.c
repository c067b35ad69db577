/* Moves the bytes of one direction of a stream from a socket to its peer.

   A half moves what its own socket receives in one of two ways: `pump` moves data that fits the thread's buffer with recv
   and send, two system calls for a message, which no other way beats.  When several reads in a row fill the buffer the
   half is bulky, and `pour` moves pages with splice(2), without copying them, until several transfers in a row were scarce.
   A pipe belongs to a half only while bytes are stuck in it.  For a flow with a bulky half a thread does not poll: while it
   sleeps more bytes arrive, and more at once cost less.

   Stalls.  A half that cannot send what it has read holds it (one buffer or one pipe full at most), and reads nothing
   until the peer has accepted all of it.  So a client that does not read stalls its own flow only: TCP's window closes
   behind it, and memory does not grow.

   Kernel facts:
   * recv returns the data in the queue before the reset that came after it, so a reset overtakes no data.
   * SCTP has no half-close.  A message is read whole or in parts but never together with the next one, so a short read
     does not mean an empty queue; after a shutdown recv can fail with ENOTCONN where TCP returns the end. */
#include "parts.h"

#include <fcntl.h>

enum { STREAK = 4 };                               /* so many full reads make a half bulky, so many scarce transfers end it */
enum { SCARCE_BYTES = SMALL_BYTES / 4 };           /* a transfer below this is scarce */
enum { TURN = 16 };                                /* transfers of one half before others get a turn */

static bool would_wait(int error)
{
    return error == EAGAIN || error == EINTR;
}

/* The half is called again in the next round. */
static void call_soon(struct half *half)
{
    if (link_is_free(&half->soon))
        link_append(&half->flow->thread->soon, &half->soon);
}

void flush_tally(struct thread *thread)
{
    struct tally *tally = &thread->tally;
    if (tally->port != NULL && tally->up_bytes + tally->down_bytes > 0) {
        count(&COUNTER(tally->port, up_bytes), tally->up_bytes);
        count(&COUNTER(tally->port, down_bytes), tally->down_bytes);
    }
    *tally = (struct tally){0};
}

static void count_bytes(struct half *half, size_t bytes)
{
    struct flow *flow = half->flow;
    struct tally *tally = &flow->thread->tally;
    if (tally->port != flow->port) {
        flush_tally(flow->thread);
        tally->port = flow->port;
    }
    *(half == &flow->client ? &tally->up_bytes : &tally->down_bytes) += bytes;
}

/* Pipes */

static struct pipe acquire_pipe(struct thread *thread)
{
    int ends[2];
    if (thread->spares > 0)
        return thread->spare[--thread->spares];
    if (pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0)
        return (struct pipe){.read_end = -1};
    bool is_small = fcntl(ends[1], F_SETPIPE_SZ, PIPE_BYTES) < 0;
    return (struct pipe){.read_end = ends[0], .write_end = ends[1], .is_small = is_small};
}

void close_pipe(struct pipe *pipe)
{
    if (pipe->read_end >= 0) {
        close(pipe->read_end);
        close(pipe->write_end);
    }
    pipe->read_end = -1;
}

/* Take back a pipe, which is empty. */
static void release_pipe(struct thread *thread, struct pipe *pipe)
{
    if (pipe->is_small || thread->spares == SPARE_PIPES)
        close_pipe(pipe);
    else
        thread->spare[thread->spares++] = *pipe;
    pipe->read_end = -1;
}

/* Move everything in the pipe to the peer; -1: errno says why not all of it is there. */
static int empty_pipe(struct half *half, struct pipe *pipe)
{
    while (pipe->bytes > 0) {
        ssize_t moved = splice(pipe->read_end, NULL, half->peer->fd, NULL, pipe->bytes, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        if (moved <= 0) {
            errno = moved == 0 ? EPIPE : errno;
            return -1;
        }
        count_bytes(half, (size_t)moved);
        pipe->bytes -= (size_t)moved;
    }
    return 0;
}

/* Ends */

/* The peer accepts no more data.  What it sent before (a server's "413", and then its end) is passed on first. */
static void send_failed(struct half *half)
{
    half->is_reading = false;
    if (half->peer->is_reading)
        ready(half->peer, UNTIL_EMPTY);
    handle(half->flow, half->peer->was_reset);
}

static void receive_failed(struct half *half, int error)
{
    handle(half->flow, error == ENOTCONN ? half->ended : half->was_reset);
}

void discard(struct half *half)
{
    half->is_reading = false;
    free(half->held);
    half->held = NULL;
    close_pipe(&half->pipe);
    link_remove(&half->soon);
}

/* Transfers */

/* gcc believes that `half` is forgotten when a flow is reset; `discard` frees what it holds. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wanalyzer-malloc-leak"

/* Keep what the peer's socket had no room for; false: there is no memory. */
static bool hold(struct half *half, const char *data, size_t bytes)
{
    half->held = malloc(bytes);
    if (half->held == NULL)
        return false;
    memcpy(half->held, data, bytes);
    half->held_from = 0;
    half->held_to = bytes;
    return true;
}
#pragma GCC diagnostic pop

/* Stop being bulky: the rest is moved by `pump`, in the next round, so that one half never keeps the thread. */
static void end_bulk(struct half *half)
{
    half->is_bulky = false;
    half->streak = 0;
    call_soon(half);
}

/* Move pages to the peer until none are left, the peer has no room, or others need a turn. */
static void pour(struct half *half)
{
    struct thread *thread = half->flow->thread;
    struct pipe pipe = acquire_pipe(thread);
    if (pipe.read_end < 0) {                       /* out of descriptors */
        end_bulk(half);
        return;
    }
    for (int turn = 0; turn < TURN; turn++) {
        ssize_t moved = splice(half->fd, NULL, pipe.write_end, NULL, PIPE_BYTES, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        if (moved <= 0) {
            int error = errno;
            release_pipe(thread, &pipe);
            if (moved == 0)                        /* an end, or the mark of urgent data: recv tells which */
                end_bulk(half);
            else if (!would_wait(error))
                receive_failed(half, error);
            return;
        }
        pipe.bytes = (size_t)moved;
        if (empty_pipe(half, &pipe) < 0) {
            half->pipe = pipe;                     /* discarded with the flow, if that ends */
            if (would_wait(errno))
                handle(half->flow, half->stalled);
            else
                send_failed(half);
            return;
        }
        half->streak = moved < SCARCE_BYTES ? half->streak + 1 : 0;
        if (half->streak == STREAK) {
            release_pipe(thread, &pipe);
            end_bulk(half);
            return;
        }
    }
    release_pipe(thread, &pipe);
    call_soon(half);
}

/* Move messages to the peer until none are left, the peer has no room, or others need a turn. */
static void pump(struct half *half, uint32_t events)
{
    struct flow *flow = half->flow;
    char *buffer = flow->thread->buffer;
    const bool is_stream = flow->port->settings.protocol == IPPROTO_TCP;
    const size_t room = is_stream ? SMALL_BYTES : MESSAGE_BYTES;
    const bool until_empty = events & ENDED_EVENTS || half->was_urgent;
    for (int turn = 0; turn < TURN; turn++) {
        ssize_t got = recv(half->fd, buffer, room, MSG_DONTWAIT);
        if (got <= 0) {
            if (got == 0)
                handle(flow, half->ended);
            else if (!would_wait(errno))
                receive_failed(half, errno);
            return;
        }
        ssize_t sent = send(half->peer->fd, buffer, (size_t)got, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && !would_wait(errno)) {
            send_failed(half);
            return;
        }
        sent = sent < 0 ? 0 : sent;
        count_bytes(half, (size_t)sent);
        if (sent < got) {
            handle(flow, hold(half, buffer + sent, (size_t)(got - sent)) ? half->stalled : half->was_reset);
            return;
        }
        half->streak = (size_t)got < room ? 0 : half->streak + 1;
        if (is_stream && half->streak == 0 && !until_empty)
            return;
        if (is_stream && half->streak == STREAK && !half->was_urgent) {
            half->is_bulky = true;
            half->streak = 0;
            pour(half);
            return;
        }
    }
    call_soon(half);
}

/* Send what is held, now that the peer's socket has room again. */
static void drain(struct half *half)
{
    if (half->held != NULL) {
        size_t left = half->held_to - half->held_from;
        ssize_t sent = send(half->peer->fd, half->held + half->held_from, left, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (!would_wait(errno))
                send_failed(half);
            return;
        }
        count_bytes(half, (size_t)sent);
        half->held_from += (size_t)sent;
        if (half->held_from < half->held_to)
            return;
        free(half->held);
        half->held = NULL;
    } else {
        if (empty_pipe(half, &half->pipe) < 0) {
            if (!would_wait(errno))
                send_failed(half);
            return;
        }
        release_pipe(half->flow->thread, &half->pipe);
    }
    handle(half->flow, half->drained);
}

void ready(struct half *half, uint32_t events)
{
    struct half *peer = half->peer;
    if (half->is_bulky || peer->is_bulky)
        half->flow->thread->is_chatty = false;
    if (events & EPOLLPRI) {                       /* splice would stop before the mark for ever */
        half->was_urgent = true;
        half->is_bulky = false;
    }
    if (events & EPOLLOUT && (peer->held != NULL || peer->pipe.read_end >= 0))
        drain(peer);
    if (half->is_reading && events & ~(uint32_t)EPOLLOUT) {
        if (half->is_bulky)
            pour(half);
        else
            pump(half, events);
    } else if (events & EPOLLERR) {
        handle(half->flow, half->was_reset);
    }
}
