/* What the files of the launcher share. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { STATUS_FD = 3, PASSED_FD = 4 };             /* cmd/docker-proxy: fd 3 is the status pipe, fd 4 the socket */
enum { ANSWER_MS = 60000 };                        /* as long as a command waits; dockerd gives up after 16 s */

struct options {                                   /* the command line: the flags that dockerd gives */
    const char *proto, *host_ip, *container_ip;
    int host_port, container_port;
    bool use_listen_fd, version, help;
};
extern struct options options;
extern char reason[512];                           /* why the last failed call failed */
extern int signals;                                /* signalfd: SIGINT or SIGTERM came */

bool fails(const char *format, ...);
bool readable(int fd, int limit_ms);
bool told_to_stop(int wait_ms);

bool parse_flags(char **argument);                 /* flags.c */
void usage(void);
int open_port(void);                               /* port.c: the port's socket, or -1 */
int open_folder(void);                             /* daemon.c: the runtime folder, or -1 */
int find_daemon(void);                             /* daemon.c: a connection to the daemon, started if there is none, or -1 */
