/*
 * load: the benchmark's traffic generator, client and server.
 *
 *   load serve PORT                          echo on PORT (tcp, udp), discard on PORT+1, source on PORT+2
 *   load rr   ADDRESS PORT CLIENTS SECONDS   1-byte request/response on CLIENTS connections
 *   load rr16k ADDRESS PORT CLIENTS SECONDS  the same with 16 KiB each way
 *   load crr  ADDRESS PORT CLIENTS SECONDS [SOURCE ...]
 *                                            connect, send 1 byte, receive it, close; CLIENTS at once
 *   load up   ADDRESS PORT CLIENTS SECONDS   bulk to PORT+1
 *   load down ADDRESS PORT CLIENTS SECONDS   bulk from PORT+2
 *   load udp  ADDRESS PORT CLIENTS SECONDS   1-byte request/response on CLIENTS udp sockets
 *   load idle ADDRESS PORT CLIENTS 0         exchange 1 byte on CLIENTS connections, and keep them open
 *   load refused ADDRESS PORT SECONDS        connect to a port without a server
 *   load served ADDRESS PORT SECONDS         connect to a port of this process
 *
 * A client's last line is "RATE DONE FAILED P99": operations (rr, crr, udp) or bytes (up, down) per second, the total,
 * how many were lost or refused and retried, and the 99th percentile of the seconds from a request to its answer (rr,
 * udp; else 0). `crr` also prints a line for each whole second before, to show a rate that falls. The clock starts when
 * every client of rr and udp has received one answer and every bulk client is connected; with SECONDS 0, rr and udp end
 * at that point. crr connects from the SOURCE addresses in rotation: with TIME_WAIT, the local ports of a single address
 * limit the number of connections per second.
 *
 * `idle` prints "ready" when every connection is open, and keeps them until the end of its standard input.
 *
 * `refused` and `served` read standard input: for each byte they connect for SECONDS, in batches, and print the median
 * seconds for one connect; they exit at the end of the input. So one process can measure with and without something,
 * in alternation.
 *
 * In crr a refused connection is counted and retried: a proxy without a free port must show a low rate, not an error.
 * In rr, up and down it ends the run.
 *
 * It is written in C, unlike the rest of the benchmark, because a generator slower than what it measures would pull
 * every ratio towards 1.
 */
#include "load.h"

enum { MAX_CLIENTS = 1 << 14, LOST_MS = 200, ANSWER_MS = 10000, RETRY_MS = 10 };
enum { LONG_BYTES = 16384 };
enum { MAX_LATENCY_US = 1000000 };

static char chunk[CHUNK];

struct client {
	int fd;
	char sequence; /* of the last request: a late answer must not count twice */
	ssize_t missing; /* bytes of the answer, on a connection */
	double sent_s;
};

struct run {
	struct peer to;
	int count, ep;
	double seconds, start_s, end_s;
	ssize_t bytes; /* of a request and of its answer */
	unsigned long long done, failed, opened;
	unsigned int latencies[MAX_LATENCY_US]; /* answers by their microseconds; the last one counts all above, too */
	struct peer *sources;
	int source_count;
	struct client clients[MAX_CLIENTS];
};

static void start_clock(struct run *r)
{
	r->start_s = now_s();
	r->end_s = r->start_s + r->seconds;
}

static void record_latency(struct run *r, double seconds)
{
	long us = (long)(seconds * 1e6);

	r->latencies[us < MAX_LATENCY_US ? us : MAX_LATENCY_US - 1]++;
}

/* Returns the seconds within which 99 of 100 answers arrived; 0 if no latencies are recorded. */
static double p99_s(const struct run *r)
{
	unsigned long long slower = 0;
	int us = r->done ? MAX_LATENCY_US : 0;

	while (us > 0 && (slower += r->latencies[us - 1]) <= r->done / 100)
		us--;
	return us / 1e6;
}

static void report(struct run *r)
{
	double elapsed_s = now_s() - r->start_s;

	printf("%.1f %llu %llu %.6f\n", (double)r->done / elapsed_s, r->done, r->failed, p99_s(r));
}

/* Returns a connected (or connecting) socket, or -1 if connect failed. */
static int try_connect(struct run *r, int type)
{
	int one = 1, fd = open_socket(r->to.address.ss_family, type);

	if (r->source_count) {
		struct peer *from = &r->sources[r->opened++ % r->source_count];

		/* Let connect choose the port: it can reuse one that is in use towards another peer. */
		setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
		if (bind(fd, (void *)&from->address, from->length) < 0)
			die("bind");
	}
	if (connect(fd, (void *)&r->to.address, r->to.length) == 0 || errno == EINPROGRESS)
		return fd;
	close(fd);
	return -1;
}

static int connect_or_die(struct run *r, int type)
{
	int fd = try_connect(r, type);

	if (fd < 0)
		die("connect");
	return fd;
}

static void request(struct run *r, struct client *c, double now)
{
	static char message[LONG_BYTES];

	message[0] = ++c->sequence;
	c->missing = r->bytes;
	c->sent_s = now;
	/* Reports once that an earlier datagram was refused. */
	if (send(c->fd, message, r->bytes, MSG_NOSIGNAL) != r->bytes && errno != ECONNREFUSED)
		die("send");
}

/* Exchanges one message, so that the path to the server is established; a datagram may need several attempts. */
static void first_answer(struct run *r, struct client *c, int type)
{
	struct pollfd answer = { .fd = c->fd, .events = POLLIN };
	double end_s = now_s() + ANSWER_MS / 1e3;

	request(r, c, now_s());
	while (now_s() < end_s) {
		ssize_t n = poll(&answer, 1, LOST_MS) > 0 ? recv(c->fd, chunk, CHUNK, MSG_DONTWAIT) : 0;

		c->missing -= n > 0 ? n : 0;
		if (c->missing <= 0)
			return;
		if (type == SOCK_DGRAM)
			request(r, c, now_s());
	}
	errno = ETIMEDOUT;
	die("first answer");
}

static void read_answer(struct run *r, struct client *c, int type)
{
	ssize_t n = recv(c->fd, chunk, CHUNK, MSG_DONTWAIT);
	double now;

	if (type == SOCK_STREAM && (n == 0 || (n < 0 && errno != EAGAIN)))
		die("recv");
	if (n <= 0 || (type == SOCK_DGRAM && chunk[0] != c->sequence))
		return;
	c->missing -= n;
	if (c->missing > 0)
		return;
	r->done++;
	now = now_s();
	record_latency(r, now - c->sent_s);
	request(r, c, now);
}

static void resend_lost(struct run *r, double now)
{
	for (int i = 0; i < r->count; i++) {
		if (now - r->clients[i].sent_s < LOST_MS / 1e3)
			continue;
		r->failed++;
		request(r, &r->clients[i], now);
	}
}

static void open_clients(struct run *r, int type)
{
	for (int i = 0; i < r->count; i++) {
		r->clients[i].fd = connect_or_die(r, type);
		first_answer(r, &r->clients[i], type);
	}
}

static void run_idle(struct run *r)
{
	open_clients(r, SOCK_STREAM);
	puts("ready");
	fflush(stdout);
	while (getchar() != EOF)
		;
}

static void run_rr(struct run *r, int type)
{
	struct epoll_event events[256];
	double now, check_s;

	open_clients(r, type);
	for (int i = 0; i < r->count; i++)
		watch(r->ep, r->clients[i].fd, EPOLLIN, i);
	start_clock(r);
	check_s = r->start_s + LOST_MS / 1e3;
	for (int i = 0; i < r->count && r->seconds > 0; i++)
		request(r, &r->clients[i], r->start_s);
	while ((now = now_s()) < r->end_s) {
		int n = epoll_wait(r->ep, events, 256, LOST_MS);

		for (int i = 0; i < n; i++)
			read_answer(r, &r->clients[events[i].data.u64], type);
		if (type == SOCK_DGRAM && now >= check_s) {
			resend_lost(r, now);
			check_s = now + LOST_MS / 1e3;
		}
	}
	report(r);
}

/* One bulk connection per client, as many bytes as possible in the time. */
static void run_bulk(struct run *r, int up)
{
	struct epoll_event events[256];

	for (int i = 0; i < r->count; i++) {
		int fd = connect_or_die(r, SOCK_STREAM);
		fcntl(fd, F_SETFL, O_NONBLOCK);
		watch(r->ep, fd, up ? EPOLLOUT : EPOLLIN, fd);
	}
	start_clock(r);
	while (now_s() < r->end_s) {
		int n = epoll_wait(r->ep, events, 256, 1000);

		for (int i = 0; i < n; i++) {
			int fd = events[i].data.fd;
			ssize_t got = up ? send(fd, chunk, CHUNK, MSG_NOSIGNAL) : recv(fd, chunk, CHUNK, 0);

			if (got > 0)
				r->done += got;
			else if (got == 0 || errno != EAGAIN)
				die(up ? "send" : "recv");
		}
	}
	report(r);
}

/* Handles an event of a crr connection: it is writable, then readable, or it failed. Returns 1 if it is closed. */
static int crr_step(struct run *r, int fd, uint32_t events)
{
	struct epoll_event readable = { .events = EPOLLIN, .data.u64 = fd };

	if (!(events & (EPOLLIN | EPOLLERR | EPOLLHUP)) && send(fd, "x", 1, MSG_NOSIGNAL) == 1) {
		epoll_ctl(r->ep, EPOLL_CTL_MOD, fd, &readable);
		return 0;
	}
	if (recv(fd, chunk, CHUNK, MSG_DONTWAIT) == 1)
		r->done++;
	else
		r->failed++;
	close(fd);
	return 1;
}

/* Opens the missing connections; returns how many are still missing. */
static int crr_open(struct run *r, int missing)
{
	for (; missing > 0; missing--) {
		int fd = try_connect(r, SOCK_STREAM | SOCK_NONBLOCK);

		if (fd < 0) {
			r->failed++;
			break;
		}
		watch(r->ep, fd, EPOLLOUT, fd);
	}
	return missing;
}

static void run_crr(struct run *r)
{
	struct epoll_event events[256];
	unsigned long long before = 0;
	int missing = r->count;
	double now;

	start_clock(r);
	for (double second_s = r->start_s + 1;;) {
		for (now = now_s(); now >= second_s; second_s += 1) {
			printf("%llu\n", r->done - before);
			before = r->done;
		}
		if (now >= r->end_s)
			break;
		missing = crr_open(r, missing);
		int n = epoll_wait(r->ep, events, 256, missing ? RETRY_MS : LOST_MS);

		for (int i = 0; i < n; i++)
			missing += crr_step(r, events[i].data.fd, events[i].events);
	}
	report(r);
}

int main(int argc, char **argv)
{
	static struct run r;

	signal(SIGPIPE, SIG_IGN);
	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(atoi(argv[2]));
	if (argc == 5 && (!strcmp(argv[1], "refused") || !strcmp(argv[1], "served"))) {
		run_connects(peer_of(argv[2], atoi(argv[3])), atof(argv[4]), !strcmp(argv[1], "served"));
		return 0;
	}
	if (argc < 6 || (argc > 6 && strcmp(argv[1], "crr")) || (r.count = atoi(argv[4])) > MAX_CLIENTS) {
		fputs("usage: load serve PORT | load refused|served ADDRESS PORT SECONDS\n"
		      "       load rr|rr16k|crr|up|down|udp|idle ADDRESS PORT CLIENTS SECONDS [SOURCE ...]\n", stderr);
		return 2;
	}
	int port = atoi(argv[3]);
	char *mode = argv[1];

	port += !strcmp(mode, "up") ? DISCARD : !strcmp(mode, "down") ? SOURCE : ECHO;
	r.to = peer_of(argv[2], port);
	r.ep = epoll_create1(0);
	r.seconds = atof(argv[5]);
	r.bytes = strcmp(mode, "rr16k") ? 1 : LONG_BYTES;
	r.source_count = argc - 6;
	r.sources = calloc(argc, sizeof(*r.sources));
	for (int i = 0; i < r.source_count; i++)
		r.sources[i] = peer_of(argv[6 + i], 0);
	if (!strcmp(mode, "rr") || !strcmp(mode, "rr16k"))
		run_rr(&r, SOCK_STREAM);
	else if (!strcmp(mode, "udp"))
		run_rr(&r, SOCK_DGRAM);
	else if (!strcmp(mode, "crr"))
		run_crr(&r);
	else if (!strcmp(mode, "idle"))
		run_idle(&r);
	else
		run_bulk(&r, !strcmp(mode, "up"));
	return 0;
}
