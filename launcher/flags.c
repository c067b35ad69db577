/* The command line: the rules and messages of Go's flag package. */
#include "launcher.h"
#include <limits.h>

struct options options = {
    .proto = "tcp", .host_ip = "0.0.0.0", .container_ip = "0.0.0.0", .host_port = -1, .container_port = -1,
};

static const struct flag { const char *name; const char **text; int *number; bool *truth; const char *usage; } FLAGS[] = {
    { "container-ip", &options.container_ip, NULL, NULL, "container ip" },
    { "container-port", NULL, &options.container_port, NULL, "container port (default -1)" },
    { "h", NULL, NULL, &options.help, NULL },
    { "help", NULL, NULL, &options.help, NULL },
    { "host-ip", &options.host_ip, NULL, NULL, "host ip" },
    { "host-port", NULL, &options.host_port, NULL, "host port (default -1)" },
    { "proto", &options.proto, NULL, NULL, "proxy protocol (default \"tcp\")" },
    { "use-listen-fd", NULL, NULL, &options.use_listen_fd, "use a passed listen fd" },
    { "v", NULL, NULL, &options.version, "print version information and quit" },
    { "version", NULL, NULL, &options.version, "print version information and quit" },
};
enum { FLAG_COUNT = sizeof(FLAGS) / sizeof(FLAGS[0]) };


void usage(void) {
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

bool parse_flags(char **argument) {
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
