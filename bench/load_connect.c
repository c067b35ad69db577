/* The load generator's client that measures connect() itself. */
#include "load.h"

enum { BATCH = 32, MAX_BATCHES = 1 << 16 };

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

void run_connects(struct peer to, double seconds, int listens)
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
