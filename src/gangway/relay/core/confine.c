/* Confines the process: what it calls the kernel for from now on is in a list.

   Calls that are not listed fail with ENOSYS, as with a kernel that does not have them: a later libc that tries something
   new falls back.  Calls by which a process runs programs, looks into others or gets at more of the kernel end it: only
   somebody else's code would make them.  The list is for all threads; threads that are to run have been started.

   seccomp(2).  The kernel decides about a call that is always allowed by a bitmap (Linux 5.11), so that the order does not
   matter; before, the program is run, so what moves bytes comes first.  Without SECCOMP_FILTER_FLAG_SPEC_ALLOW kernels
   before 5.16 would slow down the whole process. */
#include "parts.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/syscall.h>

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#define ARCHITECTURE 0
#endif

static const int allowed[] = {
    /* The data plane */
    SYS_recvfrom, SYS_sendto, SYS_epoll_pwait, SYS_sched_yield, SYS_recvmmsg, SYS_sendmmsg, SYS_sendmsg, SYS_recvmsg,
    SYS_splice, SYS_futex, SYS_close, SYS_accept4, SYS_connect, SYS_shutdown, SYS_setsockopt, SYS_getsockopt,
    SYS_epoll_ctl, SYS_bind, SYS_getsockname, SYS_getpeername, SYS_fcntl, SYS_pipe2, SYS_read, SYS_write,
#ifdef SYS_epoll_wait
    SYS_epoll_wait,
#endif
    /* What a thread does first: it may not have begun yet, and libc ends the process if rseq fails */
    SYS_set_robust_list, SYS_rseq,
    /* Memory, time, the end of the process */
    SYS_mmap, SYS_munmap, SYS_mremap, SYS_mprotect, SYS_madvise, SYS_brk, SYS_clock_gettime, SYS_clock_nanosleep,
    SYS_nanosleep, SYS_gettimeofday, SYS_getrandom, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_sigaltstack, SYS_restart_syscall, SYS_getpid, SYS_gettid, SYS_exit, SYS_exit_group,
    SYS_sched_getaffinity, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid,
    /* The control socket, the log, the source of a line in a traceback */
    SYS_accept, SYS_listen, SYS_dup, SYS_dup3, SYS_ppoll, SYS_openat, SYS_fstat, SYS_lseek, SYS_ioctl, SYS_getdents64,
    SYS_newfstatat, SYS_readlinkat, SYS_unlinkat, SYS_getcwd,
#ifdef SYS_poll
    SYS_poll, SYS_dup2, SYS_stat, SYS_lstat, SYS_open, SYS_readlink, SYS_unlink,
#endif
};

static const int deadly[] = {
    SYS_execve, SYS_execveat, SYS_clone, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_bpf, SYS_mount,
    SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_unshare, SYS_setns, SYS_init_module, SYS_finit_module, SYS_delete_module,
    SYS_kexec_load, SYS_keyctl, SYS_add_key, SYS_request_key, SYS_perf_event_open, SYS_open_by_handle_at, SYS_setuid,
    SYS_setresuid, SYS_setgid, SYS_setresgid, SYS_capset, SYS_reboot, SYS_personality,
    SYS_clone3, SYS_userfaultfd, SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register,
#ifdef SYS_fork
    SYS_fork, SYS_vfork,
#endif
#ifdef SYS_pidfd_getfd
    SYS_pidfd_getfd,
#endif
};

/* Calls that are allowed with some first arguments only, and end the process with others. */
struct limited {
    uint32_t call;
    unsigned value_count;
    uint32_t values[4];
};

enum { CALLS = (sizeof allowed + sizeof deadly) / sizeof(int), LIMITED = 3, MOST_INSTRUCTIONS = 2 * CALLS + 9 * LIMITED + 5 };

static unsigned add_verdicts(struct sock_filter *program, unsigned at, const int *calls, size_t count, uint32_t verdict)
{
    for (size_t number = 0; number < count; number++) {
        program[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)calls[number], 0, 1);
        program[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, verdict);
    }
    return at;
}

static unsigned add_limited(struct sock_filter *program, unsigned at, const struct limited *limited)
{
    enum { LOW_HALF = offsetof(struct seccomp_data, args) };   /* the values are small, and the machines little-endian */
    uint8_t rest = (uint8_t)(limited->value_count + 3);
    program[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, limited->call, 0, rest);
    program[at++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, LOW_HALF);
    for (unsigned number = 0; number < limited->value_count; number++) {
        uint8_t to_allow = (uint8_t)(limited->value_count - number);
        program[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, limited->values[number], to_allow, 0);
    }
    program[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    program[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    return at;
}

int core_confine(void)
{
    const uint32_t own = (uint32_t)getpid();
    const struct limited limited[LIMITED] = {
        {SYS_socket, 4, {AF_INET, AF_INET6, AF_UNIX, AF_NETLINK}}, {SYS_kill, 1, {own}}, {SYS_tgkill, 1, {own}},
    };
    struct sock_filter program[MOST_INSTRUCTIONS] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    };
    unsigned count = add_verdicts(program, 4, allowed, sizeof allowed / sizeof *allowed, SECCOMP_RET_ALLOW);
    for (size_t number = 0; number < LIMITED; number++)
        count = add_limited(program, count, &limited[number]);
    count = add_verdicts(program, count, deadly, sizeof deadly / sizeof *deadly, SECCOMP_RET_KILL_PROCESS);
    program[count++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
    const struct sock_fprog filter = {(unsigned short)count, program};
    const unsigned long flags = SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    if (ARCHITECTURE == 0) {
        errno = ENOSYS;
        return -1;
    }
    long done = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &filter);
    if (done > 0)                                  /* the thread that has a filter of its own */
        errno = ESRCH;
    return done == 0 ? 0 : -1;
}
