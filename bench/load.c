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
 *   load refused ADDRESS PORT SECONDS        connect to a port without a server
 *   load served ADDRESS PORT SECONDS         connect to a port of this process
 *
 * A client's last line is "RATE DONE FAILED": operations (rr, crr, udp) or bytes (up, down) per second, the total, and
 * how many were lost or refused and retried. `crr` also prints a line for each whole second before, to show a rate that
 * falls. The clock starts when every client of rr and udp has received one answer and every bulk client is connected;
 * with SECONDS 0, rr and udp end at that point. crr connects from the SOURCE addresses in rotation: with TIME_WAIT, the
 * local ports of a single address limit the number of connections per second.
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

enum { MAX_CLIENTS = 4096, LOST_MS = 200, ANSWER_MS = 10000, RETRY_MS = 10 };
enum { LONG_BYTES = 16384 };
enum { BATCH = 32, MAX_BATCHES = 1 << 16 };

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
	struct peer *sources;
	int source_count;
	struct client clients[MAX_CLIENTS];
};

static void start_clock(struct run *r)
{
	r->start_s = now_s();
	r->end_s = r->start_s + r->seconds;
}

static void report(struct run *r)
{
	printf("%.1f %llu %llu\n", (double)r->done / (now_s() - r->start_s), r->done, r->failed);
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

static void request(struct run *r, struct client *c)
{
	static char message[LONG_BYTES];

	message[0] = ++c->sequence;
	c->missing = r->bytes;
	c->sent_s = now_s();
	/* Reports once that an earlier datagram was refused. */
	if (send(c->fd, message, r->bytes, MSG_NOSIGNAL) != r->bytes && errno != ECONNREFUSED)
		die("send");
}

/* Exchanges one message, so that the path to the server is established; a datagram may need several attempts. */
static void first_answer(struct run *r, struct client *c, int type)
{
	struct pollfd answer = { .fd = c->fd, .events = POLLIN };
	double end_s = now_s() + ANSWER_MS / 1e3;

	request(r, c);
	while (now_s() < end_s) {
		ssize_t n = poll(&answer, 1, LOST_MS) > 0 ? recv(c->fd, chunk, CHUNK, MSG_DONTWAIT) : 0;

		c->missing -= n > 0 ? n : 0;
		if (c->missing <= 0)
			return;
		if (type == SOCK_DGRAM)
			request(r, c);
	}
	errno = ETIMEDOUT;
	die("first answer");
}

static void read_answer(struct run *r, struct client *c, int type)
{
	ssize_t n = recv(c->fd, chunk, CHUNK, MSG_DONTWAIT);

	if (type == SOCK_STREAM && (n == 0 || (n < 0 && errno != EAGAIN)))
		die("recv");
	if (n <= 0 || (type == SOCK_DGRAM && chunk[0] != c->sequence))
		return;
	c->missing -= n;
	if (c->missing > 0)
		return;
	r->done++;
	request(r, c);
}

static void resend_lost(struct run *r, double now)
{
	for (int i = 0; i < r->count; i++) {
		if (now - r->clients[i].sent_s < LOST_MS / 1e3)
			continue;
		r->failed++;
		request(r, &r->clients[i]);
	}
}

static void run_rr(struct run *r, int type)
{
	struct epoll_event events[256];
	double now, check_s;

	for (int i = 0; i < r->count; i++) {
		r->clients[i].fd = connect_or_die(r, type);
		first_answer(r, &r->clients[i], type);
		watch(r->ep, r->clients[i].fd, EPOLLIN, i);
	}
	start_clock(r);
	check_s = r->start_s + LOST_MS / 1e3;
	for (int i = 0; i < r->count && r->seconds > 0; i++)
		request(r, &r->clients[i]);
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

static int by_value(const void *one, const void *other)
{
	double a = *(const double *)one, b = *(const double *)other;

	return (a > b) - (a < b);
}

/* Returns the seconds per connect of a batch. Each connect has its own socket, created before and closed after the timing.
 * `listener` is -1 if the connects must be refused; else it accepts them afterwards. */
static double connect_s(const struct peer *to, int listener)
{
	double start_s, elapsed_s;
	int fds[BATCH];

	for (int i = 0; i < BATCH; i++)
		fds[i] = open_socket(to->address.ss_family, SOCK_STREAM);
	start_s = now_s();
	for (int i = 0; i < BATCH; i++)
		if (connect(fds[i], (void *)&to->address, to->length) ? listener >= 0 || errno != ECONNREFUSED : listener < 0)
			die("connect");
	elapsed_s = now_s() - start_s;
	for (int i = 0; i < BATCH; i++) {
		struct linger reset = { .l_onoff = 1 };

		setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(fds[i]);
		if (listener >= 0)
			close(accept(listener, NULL, NULL));
	}
	return elapsed_s / BATCH;
}

static void run_connects(struct peer to, double seconds, int listens)
{
	int listener = listens ? open_socket(to.address.ss_family, SOCK_STREAM) : -1;
	int yes = 1;

	if (listens && (setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) ||
			bind(listener, (void *)&to.address, to.length) || listen(listener, BATCH)))
		die("listen");
	static double batches[MAX_BATCHES];

	while (getchar() != EOF) {
		double end_s = now_s() + seconds;
		int count = 0;

		do
			batches[count++] = connect_s(&to, listener);
		while (count < MAX_BATCHES && now_s() < end_s);
		qsort(batches, count, sizeof(*batches), by_value);
		printf("%.9g\n", batches[count / 2]);
		fflush(stdout);
	}
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
		      "       load rr|rr16k|crr|up|down|udp ADDRESS PORT CLIENTS SECONDS [SOURCE ...]\n", stderr);
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
	else
		run_bulk(&r, !strcmp(mode, "up"));
	return 0;
}
