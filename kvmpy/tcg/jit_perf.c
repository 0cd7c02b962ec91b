/* SPDX-License-Identifier: Apache-2.0
 *
 * Names of host code for Linux' perf, in /tmp/perf-PID.map as tools/perf/Documentation/jit-interface.txt has it:
 * "START SIZE name", hexadecimal, a line for each piece of code. Only with KVMPY_JIT=perf.
 */
#define _GNU_SOURCE
#include "jit_code.h"

#if HAVE_JIT
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* protects the two */
static pid_t owner;
static int map = -1;

/* The file of this process, made anew: a name in /tmp may be somebody else's, or a link. -1: it cannot be. */
static int open_map(void)
{
    char path[32];
    if (owner == getpid())
        return map;
    owner = getpid(); /* also in a forked child, which has a map of its own */
    snprintf(path, sizeof path, "/tmp/perf-%d.map", (int)owner);
    map = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (map < 0)
        fprintf(stderr, "kvmpy: KVMPY_JIT=perf: no %s: %m\n", path);
    return map;
}

void jit_tell_perf(uint64_t rip, const struct piece *pieces, unsigned count)
{
    char text[256];
    pthread_mutex_lock(&lock);
    int fd = open_map();
    for (unsigned i = 0; i < count && fd >= 0; i++) {
        int n = snprintf(text, sizeof text, "%lx %x guest_%llx%s\n", (unsigned long)(uintptr_t)pieces[i].start, pieces[i].size,
                         (unsigned long long)rip, i ? "_slow" : "");
        if (pieces[i].size && write(fd, text, (size_t)n) != n) { /* disk full: perf shows plain addresses from here on */
            close(fd);
            fd = map = -1;
        }
    }
    pthread_mutex_unlock(&lock);
}
#endif
