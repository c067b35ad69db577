/* The port's socket: bound here, or passed by dockerd as descriptor 4. */
#include "launcher.h"
#include <arpa/inet.h>

static const struct protocol { const char *name; int type, number; } PROTOCOLS[] = {
    { "tcp", SOCK_STREAM, IPPROTO_TCP },
    { "udp", SOCK_DGRAM, IPPROTO_UDP },
    { "sctp", SOCK_STREAM, IPPROTO_SCTP },
};
static const struct protocol *protocol;

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

static bool known_protocol(void) {
    for (unsigned i = 0; i < sizeof(PROTOCOLS) / sizeof(PROTOCOLS[0]); i++)
        if (!strcmp(options.proto, PROTOCOLS[i].name)) protocol = &PROTOCOLS[i];
    return protocol || fails("unsupported protocol %s", options.proto);
}

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
        fails("file descriptor %d is not a %s socket", PASSED_FD, options.proto);
    else if (protocol->type == SOCK_STREAM && option(PASSED_FD, SO_ACCEPTCONN) != 1 && listen(PASSED_FD, SOMAXCONN))
        fails("file descriptor %d: listen: %s", PASSED_FD, words(errno));
    else if (fcntl(PASSED_FD, F_SETFD, FD_CLOEXEC) || !enable_pktinfo(PASSED_FD, family))
        fails("file descriptor %d: %s", PASSED_FD, words(errno));
    else return PASSED_FD;
    return -1;
}

/* SO_REUSEADDR as Go sets it: connections in TIME_WAIT do not keep the port in use.  Not for UDP, where it would let two bind. */
static int bound_socket(void) {
    struct sockaddr_in6 six = { .sin6_family = AF_INET6, .sin6_port = htons((uint16_t)options.host_port) };
    struct sockaddr_in four = { .sin_family = AF_INET, .sin_port = htons((uint16_t)options.host_port) };
    bool is_six = inet_pton(AF_INET6, options.host_ip, &six.sin6_addr) == 1;
    if (!is_six && inet_pton(AF_INET, options.host_ip, &four.sin_addr) != 1) return fails("invalid host-ip \"%s\"", options.host_ip), -1;
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
    fails(is_six ? "listen %s6 [%s]:%d: %s: %s" : "listen %s4 %s:%d: %s: %s", options.proto, options.host_ip, options.host_port, step, words(errno));
    if (fd >= 0) close(fd);
    return -1;
}

int open_port(void) {
    if (!known_protocol()) return -1;
    char address[sizeof(struct in6_addr)];
    if (options.host_port < 0 || options.host_port > 65535) fails("invalid host-port %d", options.host_port);
    else if (options.container_port < 1 || options.container_port > 65535) fails("invalid container-port %d", options.container_port);
    else if (inet_pton(AF_INET, options.container_ip, address) != 1 && inet_pton(AF_INET6, options.container_ip, address) != 1)
        fails("invalid container-ip \"%s\"", options.container_ip);
    else return options.use_listen_fd ? passed_socket() : bound_socket();
    return -1;
}
