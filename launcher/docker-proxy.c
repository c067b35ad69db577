/* gangway-docker-proxy: what dockerd starts for each published port, in docker-proxy's place.
 *
 * What this file knows: docker-proxy's command line and status pipe, and how to take a lease from gangway's daemon.  What it
 * must not know: what is done with a connection.
 *
 * dockerd starts one of these for each port and family, and keeps it for as long as the port is published.  So it is small,
 * and holds just two things: the port's socket, which it binds (or is given as descriptor 4), and a lease: a connection to
 * the daemon of its network namespace, over which it has handed that socket (src/gangway/relay/protocol.py).
 *
 *     launcher → daemon   lease VERSION PROTO CONTAINER-IP CONTAINER-PORT     with the port's socket (SCM_RIGHTS)
 *     daemon → launcher   ok        or        error TEXT
 *
 * A lease ends with its connection.  A launcher that gets a signal to stop shuts its side down and waits for the daemon to
 * close, so the port is free when it exits; the port of a killed launcher is unpublished, too.  When the daemon exits, the
 * relay keeps serving the port, and the launcher takes a lease from the next daemon.
 *
 * Starting the daemon.  Its sockets are in a runtime folder, one for each network namespace (src/gangway/runtime.py).  A
 * launcher that finds no daemon locks the folder, looks again, and if there is still none starts one: two at once start
 * one.  The daemon holds a lock of its own for as long as it runs.  While one that is starting or ending has that lock but no
 * socket, a launcher waits.
 */
#include "launcher.h"
#include <signal.h>
#include <stdarg.h>
#include <sys/signalfd.h>

#define LEASE_VERSION "1"                          /* src/gangway/relay/protocol.py */
enum { STOP_MS = 2000, RETRY_MS = 500, ATTEMPTS = 3 };

char reason[512];
int signals = -1;

/* Sets `reason`; returns false, so that a caller can return in one line. */
bool fails(const char *format, ...) {
    va_list facts;
    va_start(facts, format);
    vsnprintf(reason, sizeof reason, format, facts);
    va_end(facts);
    return false;
}

/* Waits until `fd` can be read; false after `limit_ms` milliseconds, or after a signal to stop. */
bool readable(int fd, int limit_ms) {
    struct pollfd wait[] = { { fd, POLLIN, 0 }, { signals, POLLIN, 0 } };
    return poll(wait, 2, limit_ms) > 0 && !wait[1].revents;
}

/* Waits for `wait_ms` milliseconds; true at once after a signal to stop. */
bool told_to_stop(int wait_ms) {
    return poll(&(struct pollfd){ signals, POLLIN, 0 }, 1, wait_ms) > 0;
}

/* dockerd reads the pipe to its end: the whole status is one write, and no other process may hold the pipe. */
static void report(const char *status) {
    if (write(STATUS_FD, status, strlen(status)) < 0 && errno == EPIPE) exit(1);
    close(STATUS_FD);
}

static int refuse(void) {
    char status[sizeof reason + 2];
    snprintf(status, sizeof status, "1\n%s", reason);
    dprintf(STDERR_FILENO, "docker-proxy: %s\n", reason);
    report(status);
    return 1;
}

/* Hands the port's socket over and waits for the answer.  1: granted, 0: refused, -1: the daemon exited. */
static int hand_over(int daemon, int port) {
    char text[sizeof reason], control[CMSG_SPACE(sizeof(int))] = { 0 };
    int length = snprintf(text, sizeof text, "lease " LEASE_VERSION " %s %s %d", options.proto, options.container_ip, options.container_port);
    struct iovec part = { text, (size_t)length };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof port);
    memcpy(CMSG_DATA(rights), &port, sizeof port);
    if (sendmsg(daemon, &message, MSG_NOSIGNAL) < 0) return fails("gangway's daemon went away: %s", strerror(errno)), -1;
    if (!readable(daemon, ANSWER_MS)) return fails("gangway's daemon does not answer"), 0;
    ssize_t got = recv(daemon, text, sizeof text - 1, 0);
    if (got <= 0) return fails("gangway's daemon went away"), -1;
    text[got] = 0;
    if (!strcmp(text, "ok")) return 1;
    return fails("%s", strncmp(text, "error ", 6) ? text : text + 6), 0;
}

/* A lease for the port, or -1.  If the daemon is just exiting, the next attempt starts another one. */
static int take_lease(int port) {
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        int daemon = find_daemon();
        if (daemon < 0) return -1;
        int answer = hand_over(daemon, port);
        if (answer > 0) return daemon;
        close(daemon);
        if (!answer) return -1;
    }
    return -1;
}

/* Holds the port until a signal says stop.  While there is no daemon, tries again twice a second. */
static void hold(int port, int lease) {
    struct pollfd wait[] = { { signals, POLLIN, 0 }, { lease, POLLIN, 0 } };
    while (poll(wait, 2, wait[1].fd < 0 ? RETRY_MS : -1) < 0 || !wait[0].revents) {
        if (wait[1].fd >= 0 && wait[1].revents) close(wait[1].fd), wait[1].fd = -1;
        if (wait[1].fd < 0) wait[1].fd = take_lease(port);
    }
    close(port);
    if (wait[1].fd < 0) return;                    /* the relay, should it run, frees the port when this process has exited */
    shutdown(wait[1].fd, SHUT_WR);                 /* the daemon closes its side once the port is free */
    poll(&wait[1], 1, STOP_MS);
}

int main(int count, char **arguments) {
    sigset_t stop;
    for (int fd = 0; fd <= STATUS_FD; fd++)        /* so that no descriptor that we open gets one of these numbers */
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);
    fcntl(STATUS_FD, F_SETFD, FD_CLOEXEC);
    bool good = parse_flags(arguments + (count > 0));
    if (!good) dprintf(STDERR_FILENO, "%s\n", reason);
    if (!good || options.help) return usage(), good ? 0 : 2;
    if (options.version) return dprintf(STDOUT_FILENO, "docker-proxy (gangway) version %s\n", VERSION), 0;

    sigemptyset(&stop);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    sigprocmask(SIG_BLOCK, &stop, NULL);
    signal(SIGPIPE, SIG_IGN);
    int port = open_port(), lease = -1;
    signals = signalfd(-1, &stop, SFD_CLOEXEC);    /* after the socket: it must not be given descriptor 4 */
    if (port >= 0) {
        int folder = open_folder();
        if (folder >= 0) close(folder), lease = take_lease(port);
    }
    if (lease < 0) return refuse();
    report("0\n");
    hold(port, lease);
    return 0;
}
