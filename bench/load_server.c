/* The load generator's server: echo, discard and source. */
#include "load.h"

static char chunk[CHUNK];

static int listen_on(int port, int type)
{
	struct peer any = peer_of("::", port);
	int one = 1, fd = open_socket(AF_INET6, type | SOCK_NONBLOCK);

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (void *)&any.address, any.length) < 0)
		die("bind");
	if ((type & 0xf) == SOCK_STREAM && listen(fd, 4096) < 0)
		die("listen");
	return fd;
}

static void serve_datagrams(int fd)
{
	struct peer from = { .length = sizeof(from.address) };
	ssize_t n;

	while ((n = recvfrom(fd, chunk, CHUNK, MSG_DONTWAIT, (void *)&from.address, &from.length)) >= 0)
		sendto(fd, chunk, n, 0, (void *)&from.address, from.length);
}

static void serve_stream(int fd, enum role role)
{
	ssize_t n = role == SOURCE ? send(fd, chunk, CHUNK, MSG_DONTWAIT | MSG_NOSIGNAL) : recv(fd, chunk, CHUNK, MSG_DONTWAIT);

	if (n > 0 && role == ECHO)
		n = send(fd, chunk, n, MSG_NOSIGNAL);
	if (n == 0 || (n < 0 && errno != EAGAIN))
		close(fd);
}

static void serve_accept(int ep, int listener, enum role role)
{
	int one = 1, fd;

	while ((fd = accept4(listener, NULL, NULL, role == SOURCE ? SOCK_NONBLOCK : 0)) >= 0) {
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		watch(ep, fd, role == SOURCE ? EPOLLOUT : EPOLLIN, (uint64_t)role << 32 | fd);
	}
}

void serve(int port)
{
	struct epoll_event events[256];
	int ep = epoll_create1(0);

	for (int role = ECHO; role <= SOURCE; role++) {
		int fd = listen_on(port + role, SOCK_STREAM);
		watch(ep, fd, EPOLLIN, (uint64_t)(role | LISTEN) << 32 | fd);
	}
	int udp = listen_on(port, SOCK_DGRAM);
	watch(ep, udp, EPOLLIN, (uint64_t)DATAGRAM << 32 | udp);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(ep, events, 256, -1);

		for (int i = 0; i < n; i++) {
			enum role role = events[i].data.u64 >> 32;
			int fd = (int)events[i].data.u64;

			if (role & LISTEN)
				serve_accept(ep, fd, role & ~LISTEN);
			else if (role & DATAGRAM)
				serve_datagrams(fd);
			else
				serve_stream(fd, role);
		}
	}
}
