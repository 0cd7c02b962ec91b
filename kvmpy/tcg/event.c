/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "event.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* All eventfds share one inode; the kernel tells them apart in fdinfo ("eventfd-id", Linux 5.2). */
static int identity(int fd, uint64_t *id)
{
    char path[48], text[512];
    if (fcntl(fd, F_GETFD) < 0)
        return -EBADF;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    int info = open(path, O_RDONLY | O_CLOEXEC);
    if (info < 0)
        return -EBADF;
    ssize_t size = read(info, text, sizeof text - 1);
    close(info);
    text[size > 0 ? size : 0] = 0;
    const char *line = strstr(text, "eventfd-id:");
    if (!line)
        return -EINVAL;
    *id = strtoull(line + strlen("eventfd-id:"), NULL, 10);
    return 0;
}

int event_hold(struct event *event, int fd)
{
    int error = identity(fd, &event->id);
    if (error)
        return error;
    event->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    return event->fd < 0 ? -errno : 0;
}

bool event_same(const struct event *event, int fd)
{
    uint64_t id;
    return identity(fd, &id) == 0 && id == event->id;
}

void event_release(struct event *event)
{
    close(event->fd);
}

void event_signal(const struct event *event)
{
    uint64_t one = 1;
    ssize_t written;
    do
        written = write(event->fd, &one, sizeof one);
    while (written < 0 && errno == EINTR);
    /* EAGAIN: the counter is at its limit, so whoever waits is signalled already */
}

bool event_take(const struct event *event)
{
    uint64_t count;
    struct iovec into = {&count, sizeof count};
    ssize_t size = preadv2(event->fd, &into, 1, -1, RWF_NOWAIT); /* O_NONBLOCK belongs to user space */
    if (size < 0 && errno == EOPNOTSUPP) {
        struct pollfd ready = {.fd = event->fd, .events = POLLIN};
        if (poll(&ready, 1, 0) <= 0)
            return false;
        size = read(event->fd, &count, sizeof count);
    }
    return size == sizeof count;
}
