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
 * A lease ends with its connection.  A launcher that is told to stop shuts its side down and waits for the daemon to close,
 * so the port is free when it exits; one that is killed loses its port all the same.  When the daemon dies, the relay goes
 * on serving the port, and the launcher takes its lease from the next daemon.
 *
 * Starting the daemon.  Its sockets are in a runtime folder, one for each network namespace (src/gangway/runtime.py).  A
 * launcher that finds no daemon locks the folder, looks again, and if there is still none starts one: two at once start
 * one.  The daemon holds a lock of its own for as long as it runs.  While one that is starting or ending has that lock but no
 * socket, a launcher waits.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71                         /* Linux 5.14 */
#endif
#define LEASE_VERSION "1"                          /* src/gangway/relay/protocol.py: VERSION */

enum { STATUS_FD = 3, PASSED_FD = 4 };             /* cmd/docker-proxy: fd 3 is the status pipe, fd 4 the socket */
enum { ANSWER_MS = 10000, STOP_MS = 2000, RETRY_MS = 500, BUSY_MS = 10, ATTEMPTS = 3 };     /* dockerd waits 16 s for the status */

static const char *proto = "tcp", *host_ip = "0.0.0.0", *container_ip = "0.0.0.0";
static int host_port = -1, container_port = -1;
static bool use_listen_fd, version, help;
static char socket_path[sizeof(((struct sockaddr_un *)0)->sun_path)];
static int signals = -1;                           /* signalfd: SIGINT or SIGTERM came */
static char reason[512];                           /* why the last call that failed did */
static bool is_busy;                               /* the daemon did not start because another one is starting or ending */

static const struct flag { const char *name; const char **text; int *number; bool *truth; const char *usage; } FLAGS[] = {
    { "container-ip", &container_ip, NULL, NULL, "container ip" },
    { "container-port", NULL, &container_port, NULL, "container port (default -1)" },
    { "h", NULL, NULL, &help, NULL },
    { "help", NULL, NULL, &help, NULL },
    { "host-ip", &host_ip, NULL, NULL, "host ip" },
    { "host-port", NULL, &host_port, NULL, "host port (default -1)" },
    { "proto", &proto, NULL, NULL, "proxy protocol (default \"tcp\")" },
    { "use-listen-fd", NULL, NULL, &use_listen_fd, "use a passed listen fd" },
    { "v", NULL, NULL, &version, "print version information and quit" },
    { "version", NULL, NULL, &version, "print version information and quit" },
};
enum { FLAG_COUNT = sizeof(FLAGS) / sizeof(FLAGS[0]) };

static const struct protocol { const char *name; int type, number; } PROTOCOLS[] = {
    { "tcp", SOCK_STREAM, IPPROTO_TCP },
    { "udp", SOCK_DGRAM, IPPROTO_UDP },
    { "sctp", SOCK_STREAM, IPPROTO_SCTP },
};
static const struct protocol *protocol;

/* Sets `reason`; returns false, so that a caller can return in one line. */
static bool fails(const char *format, ...) {
    va_list facts;
    va_start(facts, format);
    vsnprintf(reason, sizeof reason, format, facts);
    va_end(facts);
    return false;
}

/* The errno as docker-proxy words it: Go's own table (syscall/zerrors_linux_amd64.go), lower case. */
static const char *words(int error) {
    switch (error) {
    case EADDRINUSE: return "address already in use";
    case EADDRNOTAVAIL: return "cannot assign requested address";
    case EACCES: return "permission denied";
    case EAFNOSUPPORT: return "address family not supported by protocol";
    case EINVAL: return "invalid argument";
    case EMFILE: return "too many open files";
    case EPROTONOSUPPORT:
    case ESOCKTNOSUPPORT: return "protocol not supported";
    default: return strerror(error);
    }
}

/* Waits until `fd` can be read; false after `limit_ms` milliseconds, or when told to stop. */
static bool readable(int fd, int limit_ms) {
    struct pollfd wait[] = { { fd, POLLIN, 0 }, { signals, POLLIN, 0 } };
    return poll(wait, 2, limit_ms) > 0 && !wait[1].revents;
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

/* ---- the command line: the rules and messages of Go's flag package ---- */

static void usage(void) {
    dprintf(STDERR_FILENO, "Usage of docker-proxy:\n");
    for (const struct flag *flag = FLAGS; flag < FLAGS + FLAG_COUNT; flag++)
        if (flag->usage)
            dprintf(STDERR_FILENO, "  -%s%s\n    \t%s\n", flag->name, flag->text ? " string" : flag->number ? " int" : "", flag->usage);
}

static bool parse_number(const char *text, int *number) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 0);
    *number = (int)value;
    return *text && !*end && !errno && value >= INT_MIN && value <= INT_MAX;
}

static bool parse_truth(const char *text, bool *truth) {
    static const char *const YES[] = { "1", "t", "T", "true", "TRUE", "True" }, *const NO[] = { "0", "f", "F", "false", "FALSE", "False" };
    for (int i = 0; i < 6; i++) {
        if (!strcmp(text, YES[i])) return *truth = true;
        if (!strcmp(text, NO[i])) return !(*truth = false);
    }
    return false;
}

static bool set_flag(const struct flag *flag, const char *value) {
    if (flag->text) *flag->text = value;
    else if (flag->truth && !parse_truth(value, flag->truth)) return fails("invalid boolean value \"%s\" for -%s: parse error", value, flag->name);
    else if (flag->number && !parse_number(value, flag->number)) return fails("invalid value \"%s\" for flag -%s: parse error", value, flag->name);
    return true;
}

static bool parse_flags(char **argument) {
    while (*argument && (*argument)[0] == '-' && (*argument)[1]) {
        const char *given = *argument++, *name = given + 1 + (given[1] == '-');
        if (!*name) return true;                   /* "--" ends the flags */
        if (*name == '-' || *name == '=') return fails("bad flag syntax: %s", given);
        const char *value = strchr(name, '=');
        size_t length = value ? (size_t)(value++ - name) : strlen(name);
        const struct flag *flag = FLAGS;
        while (flag < FLAGS + FLAG_COUNT && (strncmp(flag->name, name, length) || flag->name[length])) flag++;
        if (flag == FLAGS + FLAG_COUNT) return fails("flag provided but not defined: -%.*s", (int)length, name);
        if (!value && flag->truth) value = "true";
        if (!value && !*argument) return fails("flag needs an argument: -%s", flag->name);
        if (!set_flag(flag, value ? value : *argument++)) return false;
    }
    return true;
}

static bool known_protocol(void) {
    for (unsigned i = 0; i < sizeof(PROTOCOLS) / sizeof(PROTOCOLS[0]); i++)
        if (!strcmp(proto, PROTOCOLS[i].name)) protocol = &PROTOCOLS[i];
    return protocol || fails("unsupported protocol %s", proto);
}

/* ---- the port's socket ---- */

static bool set_option(int fd, int level, int name) {
    return !setsockopt(fd, level, name, &(int){ 1 }, sizeof(int));
}

static int option(int fd, int name) {
    int value = -1;
    getsockopt(fd, SOL_SOCKET, name, &value, &(socklen_t){ sizeof value });
    return value;
}

/* UDP answers must leave from the address that the client sent to: ip(7) IP_PKTINFO, ipv6(7) IPV6_RECVPKTINFO. */
static bool enable_pktinfo(int fd, int family) {
    return protocol->type != SOCK_DGRAM
        || (family == AF_INET6 ? set_option(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO) : set_option(fd, IPPROTO_IP, IP_PKTINFO));
}

static int passed_socket(void) {
    struct stat status;
    int family = option(PASSED_FD, SO_DOMAIN);
    if (fstat(PASSED_FD, &status)) fails("file descriptor %d: bad file descriptor", PASSED_FD);
    else if (!S_ISSOCK(status.st_mode)) fails("file descriptor %d is not a socket", PASSED_FD);
    else if (family != AF_INET && family != AF_INET6) fails("file descriptor %d is not an internet socket", PASSED_FD);
    else if (option(PASSED_FD, SO_PROTOCOL) != protocol->number || option(PASSED_FD, SO_TYPE) != protocol->type)
        fails("file descriptor %d is not a %s socket", PASSED_FD, proto);
    else if (protocol->type == SOCK_STREAM && option(PASSED_FD, SO_ACCEPTCONN) != 1 && listen(PASSED_FD, SOMAXCONN))
        fails("file descriptor %d: listen: %s", PASSED_FD, words(errno));
    else if (fcntl(PASSED_FD, F_SETFD, FD_CLOEXEC) || !enable_pktinfo(PASSED_FD, family))
        fails("file descriptor %d: %s", PASSED_FD, words(errno));
    else return PASSED_FD;
    return -1;
}

/* SO_REUSEADDR as Go sets it: connections in TIME_WAIT do not keep the port in use.  Not for UDP, where it would let two bind. */
static int bound_socket(void) {
    struct sockaddr_in6 six = { .sin6_family = AF_INET6, .sin6_port = htons((uint16_t)host_port) };
    struct sockaddr_in four = { .sin_family = AF_INET, .sin_port = htons((uint16_t)host_port) };
    bool is_six = inet_pton(AF_INET6, host_ip, &six.sin6_addr) == 1;
    if (!is_six && inet_pton(AF_INET, host_ip, &four.sin_addr) != 1) return fails("invalid host-ip \"%s\"", host_ip), -1;
    const char *step = "socket";
    int fd = socket(is_six ? AF_INET6 : AF_INET, protocol->type | SOCK_CLOEXEC, protocol->number);
    if (fd < 0 && (errno == EPROTONOSUPPORT || errno == ESOCKTNOSUPPORT)) return fails("%s", words(errno)), -1;
    bool ready = fd >= 0 && (!is_six || set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY)) && enable_pktinfo(fd, is_six ? AF_INET6 : AF_INET)
        && (protocol->type == SOCK_DGRAM || set_option(fd, SOL_SOCKET, SO_REUSEADDR));
    if (ready) {
        step = "bind";
        ready = !(is_six ? bind(fd, (struct sockaddr *)&six, sizeof six) : bind(fd, (struct sockaddr *)&four, sizeof four));
    }
    if (ready && protocol->type == SOCK_STREAM) {
        step = "listen";
        ready = !listen(fd, SOMAXCONN);
    }
    if (ready) return fd;
    fails(is_six ? "listen %s6 [%s]:%d: %s: %s" : "listen %s4 %s:%d: %s: %s", proto, host_ip, host_port, step, words(errno));
    if (fd >= 0) close(fd);
    return -1;
}

static int open_socket(void) {
    char address[sizeof(struct in6_addr)];
    if (host_port < 0 || host_port > 65535) fails("invalid host-port %d", host_port);
    else if (container_port < 1 || container_port > 65535) fails("invalid container-port %d", container_port);
    else if (inet_pton(AF_INET, container_ip, address) != 1 && inet_pton(AF_INET6, container_ip, address) != 1)
        fails("invalid container-ip \"%s\"", container_ip);
    else return use_listen_fd ? passed_socket() : bound_socket();
    return -1;
}

/* ---- the daemon: finding it, starting it ---- */

/* Writes the name of this network namespace: its cookie, or on an older kernel its inode number. */
static bool name_namespace(char *name, size_t size) {
    unsigned long long cookie = 0;
    struct stat namespace;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool told = fd >= 0 && !getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &(socklen_t){ sizeof cookie });
    if (fd >= 0) close(fd);
    if (told) return snprintf(name, size, "netns-%llu", cookie) > 0;
    if (stat("/proc/self/ns/net", &namespace)) return fails("/proc/self/ns/net: %s", strerror(errno));
    return snprintf(name, size, "netns-inode-%lu", (unsigned long)namespace.st_ino) > 0;
}

/* True if nobody else can put a socket into a folder. */
static bool is_safe(int fd, const char *path) {
    struct stat folder;
    if (fd < 0 || fstat(fd, &folder)) return fails("%s: %s", path, strerror(errno));
    if (folder.st_uid == geteuid() && !(folder.st_mode & 022)) return true;
    return fails("%s must belong to uid %d and be writable by it alone", path, (int)geteuid());
}

/* Opens the runtime folder, created if it does not exist; -1 if it cannot be used. */
static int open_folder(void) {
    const char *base = geteuid() ? getenv("XDG_RUNTIME_DIR") : "/run";
    char name[48], path[sizeof socket_path];
    if (!base) return fails("XDG_RUNTIME_DIR is not set: no place for the daemon's socket"), -1;
    if (!name_namespace(name, sizeof name)) return -1;
    if (snprintf(socket_path, sizeof socket_path, "%s/gangway/%s/lease.sock", base, name) >= (int)sizeof socket_path)
        return fails("XDG_RUNTIME_DIR is too long: %s", base), -1;
    snprintf(path, sizeof path, "%s/gangway", base);
    mkdir(path, 0755);
    int parent = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), fd = -1;
    if (is_safe(parent, path)) {
        snprintf(path, sizeof path, "%s/gangway/%s", base, name);
        mkdirat(parent, name, 0750);
        fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (!is_safe(fd, path) && fd >= 0) close(fd), fd = -1;
    }
    if (parent >= 0) close(parent);
    return fd;
}

/* A connection to the daemon, or -1.  `errno` ENOENT and ECONNREFUSED mean that there is none. */
static int connect_daemon(void) {
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct ucred peer;
    strcpy(address.sun_path, socket_path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){ ANSWER_MS / 1000, 0 }, sizeof(struct timeval));   /* for connect, too */
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) fails("%s: %s", socket_path, strerror(errno));
    else if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &(socklen_t){ sizeof peer }) || peer.uid != geteuid())
        fails("%s belongs to another user", socket_path), errno = EPERM;
    else return fd;
    int error = errno;
    if (fd >= 0) close(fd);
    errno = error;
    return -1;
}

static bool is_absent(int error) {
    return error == ENOENT || error == ECONNREFUSED;
}

/* Becomes the daemon: descriptor 3 is its status pipe; nothing else of ours goes along. */
static void become_daemon(int status) {
    char python[PATH_MAX], runtime[PATH_MAX] = "", *environment[] = { "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", NULL, NULL };
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (getenv("XDG_RUNTIME_DIR") && snprintf(runtime, sizeof runtime, "XDG_RUNTIME_DIR=%s", getenv("XDG_RUNTIME_DIR")) < (int)sizeof runtime)
        environment[2] = runtime;
    ssize_t length = readlink("/proc/self/exe", python, sizeof python - sizeof "python3");
    python[length < 0 ? 0 : length] = 0;
    char *name = strrchr(python, '/');
    strcpy(name ? name + 1 : python, "python3");
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (chdir("/") || null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0 || dup2(status, 3) < 0) _exit(1);
    syscall(SYS_close_range, 4, ~0U, 0);           /* Linux 5.9; before it, what our parent forgot to mark CLOEXEC goes along */
    execve(python, (char *[]){ python, "-I", "-OO", "-m", "gangway.daemon", "{\"until_idle\":true,\"ready_fd\":3}", NULL }, environment);
    dprintf(3, "HostRefused cannot start gangway's daemon: %s: %s", python, strerror(errno));
    _exit(1);
}

/* Reads the daemon's status to its end: `0\n`, or the kind of an error and its text. */
static bool read_status(int status) {
    char said[sizeof reason];
    size_t length = 0;
    ssize_t got = 1;
    while (got > 0 && length < sizeof said - 1) {
        if (!readable(status, ANSWER_MS)) return fails("gangway's daemon does not report whether it started");
        got = read(status, said + length, sizeof said - 1 - length);
        if (got > 0) length += (size_t)got;
    }
    said[length] = 0;
    if (!strcmp(said, "0\n")) return true;
    if (!length) return fails("gangway's daemon exited before it was ready");
    is_busy = !strncmp(said, "Conflict ", 9);
    const char *text = strchr(said, ' ');
    return fails("%s", text ? text + 1 : said);
}

static bool start_daemon(void) {
    int status[2];
    is_busy = false;
    if (pipe2(status, O_CLOEXEC)) return fails("pipe: %s", strerror(errno));
    pid_t child = fork();
    if (!child) {                                  /* twice, so that the daemon is nobody's child that has to be waited for */
        setsid();
        if (fork()) _exit(0);
        become_daemon(fcntl(status[1], F_DUPFD_CLOEXEC, 10));    /* out of the way of the descriptors put in place there */
    }
    close(status[1]);
    if (child > 0) waitpid(child, NULL, 0);
    bool up = child > 0 ? read_status(status[0]) : fails("fork: %s", strerror(errno));
    close(status[0]);
    return up;
}

/* Waits for `wait_ms` milliseconds, or until told to stop. */
static bool told_to_stop(int wait_ms) {
    return poll(&(struct pollfd){ signals, POLLIN, 0 }, 1, wait_ms) > 0;
}

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Locks the runtime folder and starts the daemon, unless another process has by then; a connection to it, or -1. */
static int start_and_connect(int folder) {
    char why[sizeof reason] = "another process takes too long to start gangway's daemon";
    bool is_locked = false;
    long long deadline = now_ms() + ANSWER_MS;
    do {
        is_locked = is_locked || !flock(folder, LOCK_EX | LOCK_NB);
        int daemon = connect_daemon();
        if (daemon >= 0 || !is_absent(errno)) return daemon;
        if (!is_locked) continue;
        bool up = start_daemon();
        strcpy(why, reason);
        daemon = connect_daemon();                 /* also if ours did not start: a command may have started one */
        if (daemon >= 0 || up) return daemon;
    } while ((!is_locked || is_busy) && now_ms() < deadline && !told_to_stop(BUSY_MS));
    strcpy(reason, why);
    return -1;
}

/* A connection to the daemon, which is started if there is none; or -1. */
static int find_daemon(void) {
    int daemon = connect_daemon();
    if (daemon >= 0 || !is_absent(errno)) return daemon;
    int folder = open_folder();
    if (folder < 0) return -1;
    daemon = start_and_connect(folder);
    close(folder);
    return daemon;
}

/* ---- the lease ---- */

/* Hands the port's socket over and waits for the answer.  1: granted, 0: refused, -1: the daemon went away. */
static int hand_over(int daemon, int port) {
    char text[sizeof reason], control[CMSG_SPACE(sizeof(int))] = { 0 };
    int length = snprintf(text, sizeof text, "lease " LEASE_VERSION " %s %s %d", proto, container_ip, container_port);
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

/* A lease for the port, or -1.  A daemon that ends just now is no reason to fail: the next attempt starts another. */
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
    for (int fd = 0; fd <= STATUS_FD; fd++)        /* so that no descriptor of ours gets a number with a meaning */
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);
    fcntl(STATUS_FD, F_SETFD, FD_CLOEXEC);
    bool good = parse_flags(arguments + (count > 0));
    if (!good) dprintf(STDERR_FILENO, "%s\n", reason);
    if (!good || help) return usage(), good ? 0 : 2;
    if (version) return dprintf(STDOUT_FILENO, "docker-proxy (gangway) version %s\n", VERSION), 0;

    sigemptyset(&stop);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    sigprocmask(SIG_BLOCK, &stop, NULL);
    signal(SIGPIPE, SIG_IGN);
    int port = known_protocol() ? open_socket() : -1, lease = -1;
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
