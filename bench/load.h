/* What the load generator's client and server share. */
#ifndef LOAD_H
#define LOAD_H
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 131072 };
enum role { ECHO, DISCARD, SOURCE, LISTEN = 4, DATAGRAM = 8 };

struct peer {
	struct sockaddr_storage address;
	socklen_t length;
};

/* Serves echo, discard and source on `port` and the two after it, until the process is ended. */
void serve(int port);

/* For each byte of standard input, connects for `seconds`, and prints the median seconds of one connect(). `listens`: to a
 * port of this process; else the port must refuse. Returns at the end of the input. */
void run_connects(struct peer to, double seconds, int listens);

static inline double now_s(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static inline void die(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static inline struct peer peer_of(const char *address, int port)
{
	struct peer p = { .length = sizeof(struct sockaddr_in) };
	struct sockaddr_in *v4 = (void *)&p.address;
	struct sockaddr_in6 *v6 = (void *)&p.address;

	if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		return p;
	}
	if (inet_pton(AF_INET6, address, &v6->sin6_addr) != 1)
		die(address);
	v6->sin6_family = AF_INET6;
	v6->sin6_port = htons(port);
	p.length = sizeof(*v6);
	return p;
}

static inline int open_socket(int family, int type)
{
	int one = 1, fd = socket(family, type, 0);

	if (fd < 0)
		die("socket");
	if ((type & 0xf) == SOCK_STREAM)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

static inline void watch(int ep, int fd, uint32_t events, uint64_t tag)
{
	struct epoll_event e = { .events = events, .data.u64 = tag };

	if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e) < 0)
		die("epoll_ctl");
}

#endif
