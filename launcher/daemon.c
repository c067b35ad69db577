/* The daemon: its runtime folder, a connection to it, and its start. */
#include "launcher.h"
#include <limits.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71                         /* Linux 5.14 */
#endif
enum { BUSY_MS = 10, MOST_VARIABLES = 64 };

static char socket_path[sizeof(((struct sockaddr_un *)0)->sun_path)];
static bool is_busy;                               /* the daemon did not start because another one is starting or ending */

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

/* True if no other user can create a socket in a folder. */
static bool is_safe(int fd, const char *path) {
    struct stat folder;
    if (fd < 0 || fstat(fd, &folder)) return fails("%s: %s", path, strerror(errno));
    if (folder.st_uid == geteuid() && !(folder.st_mode & 022)) return true;
    return fails("%s must belong to uid %d and be writable by it alone", path, (int)geteuid());
}

/* Opens the runtime folder, created if it does not exist; -1 if it cannot be used. */
int open_folder(void) {
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
        for (int tries = 3; fd < 0 && tries; tries--) {          /* a daemon that ends may remove the folder in between */
            mkdirat(parent, name, 0750);
            fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        }
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

/* Becomes the daemon: descriptor 3 is its status pipe; it inherits no other descriptor of ours. */
static void become_daemon(int status) {
    char python[PATH_MAX], *environment[MOST_VARIABLES + 1] = { "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8" };
    int count = 2;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (char **one = environ; *one && count < MOST_VARIABLES; one++)    /* GANGWAY_…: its settings */
        if (!strncmp(*one, "GANGWAY_", 8) || !strncmp(*one, "XDG_RUNTIME_DIR=", 16)) environment[count++] = *one;
    ssize_t length = readlink("/proc/self/exe", python, sizeof python - sizeof "python3");
    python[length < 0 ? 0 : length] = 0;
    char *name = strrchr(python, '/');
    strcpy(name ? name + 1 : python, "python3");
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (chdir("/") || null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0 || dup2(status, 3) < 0) _exit(1);
    syscall(SYS_close_range, 4, ~0U, 0);           /* Linux 5.9; before it, descriptors that our parent did not mark CLOEXEC are inherited */
    char *cache = geteuid() ? "-I" : "-Xpycache_prefix=/var/cache/gangway";    /* runtime.py: python_flags */
    execve(python, (char *[]){ python, "-I", "-OO", cache, "-m", "gangway.daemon", "{\"until_idle\":true,\"ready_fd\":3}", NULL }, environment);
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
    if (!child) {                                  /* twice: init reaps the daemon, so the launcher need not wait for it */
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
int find_daemon(void) {
    int daemon = connect_daemon();
    if (daemon >= 0 || !is_absent(errno)) return daemon;
    int folder = open_folder();
    if (folder < 0) return -1;
    daemon = start_and_connect(folder);
    close(folder);
    return daemon;
}
